"""Recovery: training of finished folders to win back quality. The settings are a section of the recipe (recipe/recover.py)."""
