"""Recovery training of finished folders. The recipe, of which settings of training are a section, is read before what trains is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimoe.recover.run import Recovered, recover

__all__ = ["Recovered", "recover"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from trimoe.recover import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
