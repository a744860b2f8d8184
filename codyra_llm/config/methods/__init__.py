"""The settings of every method, by family, as its section of a recipe has them. No torch here."""
