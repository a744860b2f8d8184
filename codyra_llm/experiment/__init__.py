"""A run: from a recipe to its folder."""
