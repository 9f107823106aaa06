"""Many settings of a recipe from one pass over the text, and their frontier."""
