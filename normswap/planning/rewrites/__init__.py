"""One file per rewrite, each with its mathematics and its claim."""
