"""Recovery training of finished folders."""

from trimoe.recover.run import Recovered, recover

__all__ = ["Recovered", "recover"]
