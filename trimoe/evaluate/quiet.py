"""Other libraries' voices, turned down."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

from tqdm import tqdm


@contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """What is called inside says only what went wrong; without `bars` it draws no progress bars."""
    names = ("lm_eval", "datasets", "huggingface_hub", "fsspec", "httpx")
    before = {name: logging.getLogger(name).level for name in names}
    start = tqdm.__init__
    if not bars:
        tqdm.__init__ = partialmethod(start, disable=True)  # not every library has a switch for its own
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        tqdm.__init__ = start
