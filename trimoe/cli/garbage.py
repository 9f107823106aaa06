"""When Python looks for reference cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Search for no reference cycles meanwhile. Where many objects are made that stay, as imports and headers are, each search goes through
    all of them and finds nothing. For the command's own process alone: it is not a library's business."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
