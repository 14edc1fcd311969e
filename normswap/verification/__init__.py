"""Verify: models side by side, and the proof that stands before a publication."""
