"""normswap's own kernels: LayerNorm and RMSNorm, with the residual add before or after them, forward and backward."""
