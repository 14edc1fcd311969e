"""Calibrate: the constants of a plan, and what can be refitted, from what the original does on data."""
