"""Understand: a Trace gives a NormMap."""
