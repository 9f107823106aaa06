"""What is to be done: YAML in, frozen dataclasses out."""

from trimoe.recipe.recipe import Recipe, load

__all__ = ["Recipe", "load"]
