"""Observe: one forward pass of a model gives a Trace."""
