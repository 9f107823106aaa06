"""Random generators that belong to the caller, lent to code that draws from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

SEED, FEWSHOT_SEED = 0, 1234  # lm-eval's own: of Python's generator, and of all others


@contextmanager
def seeded() -> Iterator[None]:
    """Python's, numpy's and torch's generators (on every device in use) start alike every time, and go on afterwards where they were."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        random.seed(SEED)
        np.random.seed(FEWSHOT_SEED)
        if devices:
            torch.manual_seed(FEWSHOT_SEED)
        else:  # a seed for GPUs would wait until they are first used, long after this
            torch.default_generator.manual_seed(FEWSHOT_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
