"""What a method may ask for while it decides: the model as earlier steps leave it, its text, and measurements on both."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from trimoe.calibration import gather
from trimoe.calibration.search_tokens import ENOUGH, gram_side, search_wanted
from trimoe.calibration.statistics import Stats
from trimoe.errors import UserError
from trimoe.journal import Journal
from trimoe.methods import evidence
from trimoe.methods.method import Method
from trimoe.model.decision import Decisions, LayerDecision, decided_sites
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.progress import Reporter
from trimoe.team import ALONE, Team
from trimoe.text.samples import in_batches
from trimoe.text.spec import CalibrationSpec
from trimoe.walk import versions
from trimoe.walk.sensitivity import sensitivity, streams
from trimoe.walk.versions import Change, probe_rows

Value = TypeVar("Value")


@dataclass(frozen=True)
class Lab:
    """One run, and for the step whose `number` it is: the decisions of those before it, where its statistics are kept, and
    statistics that the user gives. `domains`: of every calibration sample."""

    skeleton: Skeleton
    steps: tuple[Method, ...]
    spec: CalibrationSpec
    batches: list[torch.Tensor]
    seed: int
    device: str
    about: dict[str, Any]
    reporter: Reporter
    team: Team = ALONE
    domains: tuple[str, ...] = ()
    number: int = 0
    decisions: Decisions = field(default_factory=dict)
    journal: Journal | None = None
    given: Stats | None = None

    @cached_property
    def sites(self) -> dict[int, MoeBlock]:
        """The MoE blocks that earlier steps leave, as they leave them."""
        return decided_sites(self.skeleton.sites, self.decisions)

    def probe(self, label: str, streams: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Samples for so many versions of the model walked side by side, in batches, and how many there are."""
        samples_NL = torch.cat(self.batches)
        rows, length = probe_rows(self.skeleton, samples_NL, streams, self.domains), samples_NL.shape[1]
        domains = by_domain(self.domains[row] for row in rows if self.domains)
        self.reporter.say(f"{label} on {len(rows):,} of {len(samples_NL):,} samples ({len(rows) * length:,} tokens){_each(domains)}.")
        return in_batches(samples_NL[rows], self.device), {"samples": len(rows), "tokens": len(rows) * length, "domains": domains}

    @property
    def own(self) -> list[torch.Tensor]:
        """This process's batches."""
        return self.batches[self.team.span(len(self.batches))]

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    @property
    def first(self) -> int:
        """How many tokens lie before this process's."""
        return sum(batch.numel() for batch in self.batches[: self.team.span(len(self.batches)).start])

    # ---- measurements

    def statistics(self, needs: frozenset[str], reach: int, extra: gather.Extra | None = None) -> Stats:
        """The statistics of the calibration text, from the user or the journal where they are there; all as for gather.statistics."""
        if self.given is not None:
            self._refuse_short(self.given, reach)
            return self.given
        name = f"stats-{self.number}"
        stats = None if self.journal is None else self.journal.get_stats(name)
        if stats is None:
            stats = gather.statistics(
                self.skeleton, self.batches, decisions=self.decisions, reach=reach, search_tokens=self.spec.search_tokens,
                search_memory=self.spec.search_memory, seed=self.seed, device=self.device, about=self.about,
                reporter=self.reporter, needs=needs & gather.ROUTING, extra=extra, team=self.team,
            )  # fmt: skip
            if self.journal is not None:
                self.journal.put_stats(name, stats)
        return stats

    def _refuse_short(self, stats: Stats, reach: int) -> None:
        for index, layer in stats.layers.items() if reach else ():
            have = layer.search["order_TM"].shape[1] if layer.search else 0
            if have < (need := gram_side(self.sites[index], reach)):
                raise UserError(
                    f"The statistics file reaches {have} experts a token in layer {index}, the recipe needs {need}; leave --stats out."
                )

    def sensitivity(self, perturb: Mapping[int, Any], dropped: Mapping[int, int]) -> tuple[dict[int, float], dict[str, Any]]:
        """How much the model minds an error in each layer, and by what that was measured. `dropped`: experts that the probe took away."""
        few, probed = self.probe("Sensitivity", streams(list(perturb), self.skeleton.dtype))
        found = sensitivity(
            self.skeleton, few, perturb, decisions=self.decisions, device=self.device, reporter=self.reporter, team=self.team
        )
        probed["layers"] = {
            str(i): {"dropped": dropped.get(i, 0), "loss": found.loss[i], "kl": found.kl[i], "floor": found.floor[i]} for i in perturb
        }
        return found.weights(), {"sensitivity": probed}

    def divergence(self, few: Sequence[torch.Tensor], changes: Mapping[Any, Mapping[int, Change]], label: str) -> dict[Any, float]:
        """The KL at the model's output that each version costs, on the batches of a probe; the version None is compared with."""
        return versions.divergence(
            self.skeleton, few, changes, None, decisions=self.decisions, device=self.device, reporter=self.reporter, label=label,
            team=self.team,
        )  # fmt: skip

    def each_layer(self, work: Callable[[int], Value], label: str) -> dict[int, Value]:
        """work(layer) for every MoE layer that is left; of a team each process does some."""
        made = self.team.shared(list(self.sites), work, lambda mine: self.reporter.track(mine, label, len(mine)))
        return dict(zip(self.sites, made, strict=True))

    def text_seen(self, stats: Stats, routed: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        """How much text the statistics and the search saw. `routed`: search tokens of each expert, by layer."""
        made: dict[str, Any] = {"statistics": {
            "samples": sum(map(len, self.batches)), "tokens": self.tokens, "domains": by_domain(self.domains),
        }}  # fmt: skip
        if routed:
            every = sorted(count for layer in routed.values() for count in layer)
            tokens = max(len(stats.layers[index].search["logits_TE"]) for index in routed)
            few = {index: [count for count in layer if count < ENOUGH] for index, layer in routed.items()}
            wanted = min(self.tokens, search_wanted(list(self.skeleton.sites.values()), self.spec.search_tokens))
            made["search"] = {
                "tokens": tokens, "wanted": wanted, "routed_least": every[0], "routed_median": every[len(every) // 2],
                "enough": ENOUGH,
                "fewer": {str(index): {"experts": len(counts), "least": min(counts)} for index, counts in few.items() if counts},
            }  # fmt: skip
            self.reporter.say(
                f"Search on {tokens:,} of {self.tokens:,} tokens: an expert was chosen by {every[len(every) // 2]:,} of them (median), "
                f"{every[0]:,} at least{evidence.fewer(made['search'])}."
            )
        return made


def by_domain(domains: Iterable[str]) -> dict[str, int]:
    """How many there are of each."""
    return dict(Counter(domains))


def _each(domains: dict[str, int]) -> str:
    return f": {', '.join(f'{count} of {domain}' for domain, count in domains.items())}" if len(domains) > 1 else ""


def decide(lab: Lab) -> tuple[Decisions, dict[str, Any]]:
    """The decisions of the lab's step and all before it, and what is recorded of the step: from the journal if they were taken already."""
    assert lab.journal is not None
    known = lab.journal.get(f"decisions-{lab.number}")
    if known is None:
        decided, metrics = lab.steps[lab.number].decide(lab)
        decided = {**lab.decisions, **decided}
        known = json.loads(json.dumps({"decisions": {str(i): d.to_json() for i, d in decided.items()}, "metrics": rounded(metrics)}))
        lab.journal.put(f"decisions-{lab.number}", known)
    return {int(i): LayerDecision.from_json(value) for i, value in known["decisions"].items()}, known["metrics"]


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers as they are reported: what other thread counts change of a sum lies behind these digits (docs/scale.md)."""
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
