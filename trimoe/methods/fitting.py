"""One layer in the last walk, as the methods that change its matrices get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from trimoe.model.decision import LayerDecision
from trimoe.team import Team
from trimoe.walk.expert_shards import Share

Value = TypeVar("Value")


@dataclass
class LayerFit:
    """What a fit changes in place. `part`: this process's experts and what they were given, None where none are left. `weights`: the
    matrices beside them that the decision names, by path; `moments` of their inputs, where text is read. `stored(path)`: the dtype
    that a matrix has in the files, without a path that of the experts."""

    team: Team
    decision: LayerDecision
    part: Share | None
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor | None]
    stored: Callable[[str | None], torch.dtype]

    def each_linear(self, work: Callable[[str], Value]) -> dict[str, Value]:
        """work(path) for all `weights`; of a team each process does some."""
        return dict(zip(self.weights, self.team.shared(list(self.weights), work), strict=True))
