"""Source: the text of a model's own methods, changed at single expressions, and classes made of it."""
