"""Recipes: conversions that are healed by a fine-tune."""
