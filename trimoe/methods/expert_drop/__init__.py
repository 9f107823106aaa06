"""Whole experts go: scores, exact subset losses, searches and the reception field."""
