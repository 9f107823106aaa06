"""What one pass over calibration text leaves behind for each MoE layer: sums, so that batches and processes merge by adding.

Letters: T tokens, E experts, k chosen, H hidden size, I expert width. g is the weight that really multiplies an expert's output,
y the output before it; only routed tokens count, except in the search tokens' Gram.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trimoe.checkpoint.atomic import aside
from trimoe.errors import UserError, first_line
from trimoe.model.router import RoutingRule
from trimoe.team import Team
from trimoe.walk.finite import checked
from trimoe.walk.hidden_states import room

FORMAT = "trimoe-stats-3"
MAXIMA = frozenset({"max_abs_E"})
OF_WEIGHTS = frozenset({"weight_score_E", "in_spectrum_ER", "out_spectrum_ER"})  # belong to the weights, not to tokens: kept as they are
BLOCK = "block_cosine"
SEARCH = ("logits_TE", "order_TM", "gram_TMM", "weight_T")


def similarity(a_TH: torch.Tensor, b_TH: torch.Tensor) -> torch.Tensor:
    """Cosine of each pair of rows, [T]."""
    norm_T = torch.linalg.vector_norm(a_TH, dim=-1) * torch.linalg.vector_norm(b_TH, dim=-1)
    return torch.bmm(a_TH.unsqueeze(1), b_TH.unsqueeze(2)).flatten() / norm_T.clamp_min(1e-16)


class OtherFormat(UserError):
    """The statistics were written by another version, or it is another file."""


@dataclass(eq=False)
class LayerStats:
    """Statistics of one MoE layer. `sums` holds float64 tensors by name:

    routing     tokens, count_E, gate_sum_E (sum of g), coactivation_EE (how often two experts share a token)
    outputs     norm_sum_E (sum ||y||), gate_norm_sum_E (sum g||y||), gate_norm_sq_E (sum (g||y||)^2), max_abs_E (largest |y|),
                mean_output_EH (sum of y), energy_EE (sum g g' <y, y'>; its total is ||F(X)||^2)
    channels    x_sq_EH, gx_sq_EH, h_sq_EI, gh_sq_EI: per-channel sums of squares of both expert inputs, plain and weighted by g
    cosines     sublayer_cosine, output_cosine: sums over tokens of cos(x, x + MoE) and cos(x, MoE)
    weights     weight_score_E (mean |w| / rms(w)); spectra (low rank): in_spectrum_ER, out_spectrum_ER, squared singular values
    and for the search tokens (search_tokens.py): logits_TE, order_TM (each token's M best experts), gram_TMM (<y_a, y_b> among them),
    weight_T (how many calibration tokens each stands for).
    """

    layer: int
    rule: RoutingRule
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    search: dict[str, torch.Tensor] = field(default_factory=dict)
    bias_E: torch.Tensor | None = None

    def add(self, name: str, value: torch.Tensor | float) -> None:
        """Add one batch's sum (or take the maximum, for maxima), in float64."""
        value = torch.as_tensor(value).double()
        if name not in self.sums:
            self.sums[name] = value.clone()
        elif name in OF_WEIGHTS:
            pass
        elif name in MAXIMA:
            torch.maximum(self.sums[name], value, out=self.sums[name])
        else:
            self.sums[name] += value.to(self.sums[name].device)

    def taken(self) -> dict[str, torch.Tensor]:
        """The sums so far, on the CPU, after which it starts again from nothing."""
        self.to_cpu()
        sums, self.sums = self.sums, {}
        return sums

    def merge(self, other: LayerStats) -> None:
        """Take in the statistics of other tokens of the same layer."""
        for name, value in other.sums.items():
            self.add(name, value)
        for name, tensor in other.search.items():
            self.search[name] = torch.cat([self.search[name], tensor]) if name in self.search else tensor

    def to_cpu(self) -> None:
        self.sums = {name: value.cpu() for name, value in self.sums.items()}
        self.bias_E = None if self.bias_E is None else self.bias_E.cpu()

    def check(self, dtype: torch.dtype) -> None:
        """Raises Inside where a sum, or a search token's Gram, is not finite: experts that no token chose run for search tokens alone."""
        for name, tensor in (*self.sums.items(), *self.search.items()):
            checked(tensor, f"its statistics ({name})", dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.sums[name]

    @property
    def num_experts(self) -> int:
        return len(self.sums["count_E"])

    @property
    def routed(self) -> list[int]:
        """How many search tokens chose each expert."""
        chosen_TK = self.rule.route(self.search["logits_TE"], self.bias_E)[1]
        counts: list[int] = torch.bincount(chosen_TK.flatten(), minlength=self.num_experts).tolist()
        return counts

    @property
    def output_norm(self) -> float:
        """||F(X)||_F over all calibration tokens."""
        return float(self.sums["energy_EE"].sum().clamp_min(0).sqrt())


def added(total: dict[str, torch.Tensor], part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`total` with another batch's sums (or maxima) taken in, in place."""
    for name, value in part.items():
        if name not in total:
            total[name] = value
        elif name in MAXIMA:
            torch.maximum(total[name], value, out=total[name])
        else:
            total[name] += value
    return total


@dataclass(eq=False)
class Stats:
    """All MoE layers of one model over one calibration set; `about` says which (fingerprints, samples, length, seed)."""

    about: dict[str, Any]
    layers: dict[int, LayerStats] = field(default_factory=dict)
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)  # every decoder layer: [sum over tokens of cos(in, out), tokens]

    def see_block(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """One batch's hidden states before and after decoder layer `index`, [..., H]."""
        before, after = (x.reshape(-1, x.shape[-1]).float() for x in (before, after))
        cosine_T = similarity(before, after)
        self.blocks[index] = self.blocks.get(index, 0) + torch.stack([cosine_T.double().sum(), cosine_T.new_tensor(len(cosine_T)).double()])

    def merge(self, other: Stats) -> None:
        for index, sums in other.blocks.items():
            self.blocks[index] = self.blocks.get(index, 0) + sums
        for index, layer in other.layers.items():
            if index in self.layers:
                self.layers[index].merge(layer)
            else:
                self.layers[index] = layer

    def without_search(self) -> Stats:
        """The same sums, and no search tokens."""
        layers = {index: replace(layer, search={}) for index, layer in self.layers.items()}
        return replace(self, layers=layers)

    def save(self, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        rules: dict[str, Any] = {}
        for index, layer in self.layers.items():
            named: dict[str, torch.Tensor] = {**layer.sums, **layer.search}
            if layer.bias_E is not None:
                named["bias_E"] = layer.bias_E
            tensors |= {f"{index}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}
            rules[str(index)] = layer.rule.__dict__
        tensors |= {f"{index}.{BLOCK}": sums.cpu() for index, sums in self.blocks.items()}
        head = {"format": FORMAT, "about": json.dumps(self.about), "rules": json.dumps(rules)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as part:
            save_file(tensors, part, metadata=head)

    @classmethod
    def load(cls, path: Path) -> Stats:
        if path.is_dir():
            raise UserError(f"{path} is a folder; a statistics file is expected (trimoe stats writes one).")
        try:
            with safe_open(path, "pt") as file:
                head: Mapping[str, str] = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a statistics file that can be read ({first_line(error)}).") from None
        if head.get("format") != FORMAT:
            raise OtherFormat(
                f"{path} is not a statistics file of this version of trimoe (format {head.get('format')!r}, wanted {FORMAT!r})."
            )
        try:
            stats = cls(json.loads(head["about"]))
            for index, rule in json.loads(head["rules"]).items():
                stats.layers[int(index)] = LayerStats(int(index), RoutingRule(**rule))
            for key, tensor in tensors.items():
                index, _, name = key.partition(".")
                if name == BLOCK:
                    stats.blocks[int(index)] = tensor
                    continue
                layer = stats.layers[int(index)]
                if name == "bias_E":
                    layer.bias_E = tensor
                else:
                    (layer.search if name in SEARCH else layer.sums)[name] = tensor
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is a damaged statistics file: its description cannot be read.") from None
        return stats


def from_main(team: Team, load: Callable[[], Stats | None]) -> Stats | None:
    """What `load` returns in the main process, for all: layer by layer, and search tokens straight to where they stay, for all layers' may be
    more than memory holds."""
    loaded: list[Stats] = []

    def head() -> tuple[dict[str, Any], dict[int, torch.Tensor], list[int]] | None:
        if (stats := load()) is None:
            return None
        loaded.append(stats)
        return stats.about, stats.blocks, list(stats.layers)

    found = team.from_main(head)
    if found is None or team.count == 1:
        return loaded[0] if loaded else None
    about, blocks, indices = found
    made, held = loaded[0] if loaded else Stats(about, blocks=blocks), 0
    for index in indices:

        def layer_of(index: int = index) -> tuple[LayerStats, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
            own = loaded[0].layers[index]
            return replace(own, search={}), {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.search.items()}

        layer, shapes = team.from_main(layer_of)
        if not team.main:
            layer.search = {}
            for name, (shape, dtype) in shapes.items():
                layer.search[name] = room(shape, dtype, torch.device("cpu"), held)
                held += layer.search[name].nbytes
            made.layers[index] = layer
        for name, (shape, _) in shapes.items():
            whole = made.layers[index].search[name]
            team.fill(whole, [slice(0, shape[0]), *[slice(0, 0)] * (team.count - 1)])
    return made
