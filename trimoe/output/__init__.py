"""Decisions to files: the layout of a checkpoint, its writer, its record and its card."""
