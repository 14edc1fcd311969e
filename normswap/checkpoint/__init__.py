"""Checkpoints: reading them, what makes which parameter, and publishing a folder whole or not at all."""
