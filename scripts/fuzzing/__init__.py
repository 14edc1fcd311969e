"""Hostile checkpoints: seeds, ways to spoil them, and what has to be true of normswap whatever it is given."""
