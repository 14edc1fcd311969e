"""Fused norm kernels under any model: what a site asks, which backends can serve it, and the choice between them."""
