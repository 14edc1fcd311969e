"""A report as one HTML file: no network, no scripts, drawings inline."""
