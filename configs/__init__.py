"""Recipes, a file each: what to train, on what, and for how long."""
