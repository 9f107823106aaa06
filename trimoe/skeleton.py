"""The model on paper, by the name under which scripts import it."""

from trimoe.model.skeleton import Skeleton

__all__ = ["Skeleton"]
