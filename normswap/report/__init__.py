"""What a person reads and looks at."""
