"""What to do next: rules that look at findings and say what is bad, and what to try. Each is a function of its own."""
