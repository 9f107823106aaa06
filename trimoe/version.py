"""Versions: of trimoe and of what its results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version

VERSION = "0.2.0"


def versions() -> dict[str, str]:
    """Of Python and the libraries that numbers depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "numpy", "scipy")},
    }
