"""A model on disk. Nothing in it is trusted."""

from trimoe.checkpoint.folder import Checkpoint

__all__ = ["Checkpoint"]
