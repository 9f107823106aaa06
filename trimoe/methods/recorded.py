"""Which recipes made a model before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def earlier(source: Path) -> list[Any]:
    """Return the recipes that made `source`, first to last, if it is itself a result of trimoe; none where it is not, or says nothing usable."""
    try:
        record = json.loads((source / "trimoe.json").read_text(encoding="utf-8"))
        return [*record.get("earlier", []), record["recipe"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
