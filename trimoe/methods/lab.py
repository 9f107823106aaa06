"""From statistics to decisions, one recipe step at a time; what was decided already is taken from the journal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from trimoe.calibration import gather
from trimoe.calibration.gather import statistics
from trimoe.calibration.search_tokens import ENOUGH, gram_side, search_wanted
from trimoe.calibration.statistics import Stats
from trimoe.errors import UserError
from trimoe.journal import Journal
from trimoe.methods import BlockDrop, ExpertDrop, LayerDrop, LowRank, Quantize, Step, WeightPrune, evidence, recorded
from trimoe.methods.depth import candidates
from trimoe.methods.expert_drop import receptive_field, search, stability
from trimoe.methods.expert_drop.expert_drop import Drop
from trimoe.methods.expert_drop.scores import super_experts
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.methods.scope import with_linears
from trimoe.model.decision import Decisions, LayerDecision, decided_sites
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.progress import Reporter
from trimoe.show.format import runs
from trimoe.team import ALONE, Team
from trimoe.text.samples import in_batches
from trimoe.text.spec import CalibrationSpec
from trimoe.walk.decided import masked
from trimoe.walk.sensitivity import probe_size, sensitivity, shrunk, streams
from trimoe.walk.versions import divergence, probe_rows, skipped, without_moe

Value = TypeVar("Value")


@dataclass(frozen=True)
class Lab:
    """What every stage needs to know."""

    skeleton: Skeleton
    steps: tuple[Step, ...]
    spec: CalibrationSpec
    batches: list[torch.Tensor]
    seed: int
    device: str
    about: dict[str, Any]
    reporter: Reporter
    team: Team = ALONE
    domains: tuple[str, ...] = ()  # of every calibration sample

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


def by_domain(domains: Iterable[str]) -> dict[str, int]:
    """How many there are of each."""
    return dict(Counter(domains))


def _each(domains: dict[str, int]) -> str:
    return f": {', '.join(f'{count} of {domain}' for domain, count in domains.items())}" if len(domains) > 1 else ""


def decide(
    run: Lab, journal: Journal, number: int, step: Step, decisions: Decisions, given: Stats | None
) -> tuple[Decisions, dict[str, Any]]:
    """One step's decisions, from the journal if they were taken already."""
    known = journal.get(f"decisions-{number}")
    if known is None:
        sites = decided_sites(run.skeleton.sites, decisions)
        if isinstance(step, ExpertDrop):
            decided, metrics = _decide_drops(run, journal, number, step, sites, decisions, given)
        elif isinstance(step, Quantize | WeightPrune):
            decided, metrics = with_linears(run.skeleton, {**decisions, **step.decide(sites, decisions)}, step, sites), {}
        elif isinstance(step, LowRank):
            decided, metrics = _decide_ranks(run, journal, number, step, sites, decisions, given)
        else:
            decided, metrics = _decide_depth(run, journal, number, step, sites, decisions, given)
        decided = {**decisions, **decided}
        known = json.loads(json.dumps({"decisions": {str(i): d.to_json() for i, d in decided.items()}, "metrics": rounded(metrics)}))
        journal.put(f"decisions-{number}", known)
    return {int(i): LayerDecision.from_json(value) for i, value in known["decisions"].items()}, known["metrics"]


def _stats_for(
    run: Lab, journal: Journal, number: int, step: Step, sites: dict[int, MoeBlock], given: Stats | None, decisions: Decisions
) -> Stats:
    reach = step.reach(sites)
    if given is not None and reach:
        for index, layer in given.layers.items():
            have = layer.search["order_TM"].shape[1] if layer.search else 0
            if have < (need := gram_side(sites[index], reach)):
                raise UserError(
                    f"The statistics file reaches {have} experts a token in layer {index}, the recipe needs {need}; leave --stats out."
                )
    stats = given if given is not None else journal.get_stats(f"stats-{number}")
    if stats is None:
        stats = statistics(
            run.skeleton, run.batches, decisions=decisions, reach=reach, search_tokens=run.spec.search_tokens,
            search_memory=run.spec.search_memory, seed=run.seed, device=run.device, about=run.about, reporter=run.reporter, needs=step.needs & gather.ROUTING,
            extra=step.spectra if isinstance(step, LowRank) and "spectra" in step.needs else None, team=run.team,
        )  # fmt: skip
        journal.put_stats(f"stats-{number}", stats)
    return stats


def _decide_drops(
    run: Lab, journal: Journal, number: int, step: ExpertDrop, sites: dict[int, MoeBlock], decisions: Decisions, given: Stats | None
) -> tuple[Decisions, dict[str, Any]]:
    uniform = step.uniform(sites)
    stats = _stats_for(run, journal, number, step, sites, given, decisions)
    protected = super_experts(stats.layers) if step.protect_super_experts else {}
    menus = sensitive = None
    probed: dict[str, Any] = {}
    if step.counts == "optimal":
        menus, sensitive, probed = _drop_menus(run, step, sites, decisions, stats, uniform, protected)
    counts = step.layer_counts(
        sites, stats.layers, run.seed,
        menus=None if menus is None else {i: {n: loss for n, (_, loss) in menu.items()} for i, menu in menus.items()}, sensitivity=sensitive,
    )  # fmt: skip

    def searched(index: int) -> search.Found:
        return step.drop_sets(sites[index], stats.layers[index], counts[index], protected.get(index, ()), run.seed, run.device)

    found: dict[int, search.Found] = _by_layer(run, sites, searched, "Search")
    drops: dict[int, Drop] = {index: best.drops[0] for index, best in found.items()}
    rows, instead = _drop_metrics(run, step, sites, stats, found, counts, protected)
    metrics: dict[str, Any] = {"layers": rows, "gate_instead": list(instead), "measured_on": probed}
    drops |= instead
    if instead:
        run.reporter.say(
            f"In layers {runs(sorted(instead))} the experts of the lowest gate go: sets that half of the search tokens chose did worse on the other half."
        )
    unstable = stability.warning(metrics["layers"])
    seen = {index: stats.layers[index]["count_E"].tolist() for index in sites}
    searched_on = {index: row for index in sites if (row := metrics["layers"][str(index)].get("search_tokens_per_expert"))}
    metrics["measured_on"] |= _searched(run, stats, searched_on)
    metrics["warnings"] = [
        *stability.scarce(seen), *stability.few_searched(seen, searched_on), *([unstable] if unstable is not None else []),
    ]  # fmt: skip
    for warning in metrics["warnings"]:
        run.reporter.say(f"warning: {warning}")
    if sensitive is not None:
        metrics["sensitivity"] = {str(i): value for i, value in sensitive.items()}
    if step.receptive_field is not None:
        few, metrics["measured_on"]["receptive_field"] = run.probe("Receptive field", receptive_field.streams(step.receptive_field))
        chosen = receptive_field.choose(
            run.skeleton,
            few,
            {i: (drops[i], *(drop for drop in best.drops if drop != drops[i]))[: len(best.drops)] for i, best in found.items()},
            step.receptive_field,
            decisions=decisions,
            device=run.device,
            reporter=run.reporter,
            team=run.team,
        )
        drops, metrics["receptive_field"] = chosen.drops, chosen.blocks
    return step.decide(decisions, drops), metrics


def _drop_menus(
    run: Lab,
    step: ExpertDrop,
    sites: dict[int, MoeBlock],
    decisions: Decisions,
    stats: Stats,
    uniform: dict[int, int],
    protected: dict[int, Drop],
) -> tuple[dict[int, dict[int, tuple[Drop, float]]], dict[int, float], dict[str, Any]]:
    """Per layer the best nested set and its loss for every count, how much the model minds (KL per squared relative loss), and by what
    probes that was found."""

    def menu(index: int) -> dict[int, tuple[Drop, float]]:
        site = sites[index]
        loss = SubsetLoss(stats.layers[index], device=run.device)
        most = min(site.num_experts - step.floor(site, step.share(sites)), loss.max_drop)
        return search.greedy_path(loss, site.num_experts, most, site.rule.groups, _spare(step, site, most, protected.get(index, ())))

    menus, perturb, dropped = _by_layer(run, sites, menu, "Loss of every count"), {}, {}
    for index, site in sites.items():
        dropped[index] = probe_size({n: loss for n, (_, loss) in menus[index].items()}, max(uniform[index], site.rule.groups))
        drop = menus[index][dropped[index]][0]
        perturb[index] = (lambda layer, at, drop=drop: masked(layer, at, drop)) if drop else shrunk
    sensitive, probed = _sensitivity(run, decisions, perturb, dropped)
    return menus, sensitive, probed


def _sensitivity(
    run: Lab, decisions: Decisions, perturb: dict[int, Any], dropped: dict[int, int]
) -> tuple[dict[int, float], dict[str, Any]]:
    """How much the model minds an error in each layer, and by what that was measured. `dropped`: experts that the probe took away."""
    few, probed = run.probe("Sensitivity", streams(list(perturb), run.skeleton.dtype))
    found = sensitivity(run.skeleton, few, perturb, decisions=decisions, device=run.device, reporter=run.reporter, team=run.team)
    probed["layers"] = {
        str(i): {"dropped": dropped.get(i, 0), "loss": found.loss[i], "kl": found.kl[i], "floor": found.floor[i]} for i in perturb
    }
    return found.weights(), {"sensitivity": probed}


def _searched(run: Lab, stats: Stats, routed: dict[int, list[int]]) -> dict[str, Any]:
    """How much text the statistics and the search saw. `routed`: search tokens of each expert, by layer."""
    made: dict[str, Any] = {"statistics": {
        "samples": sum(map(len, run.batches)), "tokens": run.tokens, "domains": by_domain(run.domains),
    }}  # fmt: skip
    if routed:
        every = sorted(count for layer in routed.values() for count in layer)
        tokens = max(len(stats.layers[index].search["logits_TE"]) for index in routed)
        few = {index: [count for count in layer if count < ENOUGH] for index, layer in routed.items()}
        made["search"] = {
            "tokens": tokens, "wanted": min(run.tokens, search_wanted(list(run.skeleton.sites.values()), run.spec.search_tokens)),
            "routed_least": every[0], "routed_median": every[len(every) // 2], "enough": ENOUGH,
            "fewer": {str(index): {"experts": len(counts), "least": min(counts)} for index, counts in few.items() if counts},
        }  # fmt: skip
        run.reporter.say(
            f"Search on {tokens:,} of {run.tokens:,} tokens: an expert was chosen by {every[len(every) // 2]:,} of them (median), {every[0]:,} at least"
            f"{evidence.fewer(made['search'])}."
        )
    return made


def _by_layer(run: Lab, sites: dict[int, MoeBlock], work: Callable[[int], Value], label: str) -> dict[int, Value]:
    """work(layer) for every layer of `sites`; of a team each process does some."""
    made = run.team.shared(list(sites), work, lambda mine: run.reporter.track(mine, label, len(mine)))
    return dict(zip(sites, made, strict=True))


def _spare(step: ExpertDrop, site: MoeBlock, most: int, protected: Drop) -> Drop:
    """Protected experts, unless so many are that a layer could not lose `most` without them (the rule of `ExpertDrop.space`)."""
    return step.space(site, most // site.rule.groups * site.rule.groups, protected).protected


def _drop_metrics(
    run: Lab, step: ExpertDrop, sites: dict[int, MoeBlock], stats: Stats, found: dict[int, search.Found], counts: dict[int, int], protected: dict[int, Drop]
) -> tuple[dict[str, Any], dict[int, Drop]]:  # fmt: skip
    """What was found in each layer and what it costs, beside greedy and random where the exact loss is at hand; and the sets of the lowest gate,
    in those layers where they are better than what is found on as few tokens (`cross_check`)."""

    def row_of(index: int) -> tuple[dict[str, Any], Drop | None]:
        site, layer, spared = sites[index], stats.layers[index], protected.get(index, ())
        halves = stability.halves(step, site, layer, counts[index], spared, run.device)
        row = recorded.expert_drop(step, site, layer, found[index], halves, counts[index], spared, run.seed, run.device)
        worse = step.cross_check and step.search is not None and halves is not None and halves.loss > halves.lowest_loss
        return row, halves.lowest if worse and halves is not None else None

    made = _by_layer(run, sites, row_of, "Compare with greedy and random")
    return {str(index): row for index, (row, _) in made.items()}, {index: drop for index, (_, drop) in made.items() if drop is not None}


def _decide_ranks(
    run: Lab, journal: Journal, number: int, step: LowRank, sites: dict[int, MoeBlock], decisions: Decisions, given: Stats | None
) -> tuple[Decisions, dict[str, Any]]:
    """Importance is measured again, on the model as the earlier steps leave it."""
    if not step.needs:
        return step.decide(sites, decisions, {}), {}
    stats = _stats_for(run, journal, number, step, sites, given, decisions)
    sensitive: dict[int, float] | None = None
    probed: dict[str, Any] = {}
    if "sensitivity" in step.needs:
        sensitive, probed = _sensitivity(run, decisions, dict.fromkeys(sites, shrunk), {})
    decided = step.decide(sites, decisions, stats.layers, sensitivity=sensitive)
    metrics: dict[str, Any] = {
        "tokens_per_expert": {str(i): layer["count_E"].tolist() for i, layer in stats.layers.items()},
        "sensitivity": None if sensitive is None else {str(i): value for i, value in sensitive.items()},
        "measured_on": probed,
    }
    searched_on = {index: recorded.routed(layer) for index, layer in stats.layers.items() if layer.search}
    metrics["measured_on"] |= _searched(run, stats, searched_on)
    if "spectra" in step.needs:
        metrics["spectra"] = {str(i): recorded.spectra(layer) for i, layer in stats.layers.items()}
    elif step.rank == "importance":
        metrics["score"] = {str(i): recorded.importance(layer) for i, layer in stats.layers.items()}
    return decided, metrics


def _decide_depth(
    run: Lab,
    journal: Journal,
    number: int,
    step: LayerDrop | BlockDrop,
    sites: dict[int, MoeBlock],
    decisions: Decisions,
    given: Stats | None,
) -> tuple[Decisions, dict[str, Any]]:
    """The most similar parts; or of a shortlist twice as long, one after the other, what costs the least KL at the end."""
    stats = _stats_for(run, journal, number, step, sites, given, decisions)
    left = candidates.left(run.skeleton, decisions, blocks=isinstance(step, BlockDrop) or step.blocks)
    similar, total = step.similarity(step.candidates(left), stats), step.total(left)
    chosen = step.pick(similar, left, total, mixed=step.blocks)
    if not chosen:
        run.reporter.say(f"{step.name}: nothing is above the threshold {step.threshold}; the most similar is {max(similar.values()):.4f}.")
    metrics: dict[str, Any] = {"similarity": {f"{kind} {index}": value for (kind, index), value in similar.items()}}
    metrics["measured_on"] = _searched(run, stats, {})
    if step.rerank == "kl" and total is not None:
        shortlist = candidates.ranked(similar, mixed=step.blocks)[: 2 * len(chosen) + 2]
        shortlist += [part for part in chosen if part not in shortlist]
        few, count = run.probe("Rerank", len(shortlist) + 1)
        metrics["measured_on"]["rerank"] = count
        chosen, metrics["rerank"] = _rerank(run, few, decisions, shortlist, left, total, mixed=step.blocks)
    metrics["dropped"] = [f"{kind} {index}" for kind, index in chosen]
    return {index: replace(decisions.get(index, LayerDecision()), gone=kind) for kind, index in chosen}, metrics


def _rerank(
    run: Lab,
    few: list[torch.Tensor],
    decisions: Decisions,
    shortlist: list[candidates.Part],
    left: candidates.Depth,
    total: int,
    *,
    mixed: bool,
) -> tuple[list[candidates.Part], list[dict[str, Any]]]:
    """Greedy: each time the part that, with those already chosen, costs the least KL (per sub-layer, in a mixture) against the model as
    `decisions` leave it."""
    chosen: list[candidates.Part] = []
    rounds: list[dict[str, Any]] = []
    before = 0.0
    while True:
        grown = {part: new for part in shortlist if (new := left.add(chosen, part, total, mixed=mixed)) != chosen}
        if not grown:
            return chosen, rounds
        versions = {part: {index: skipped if kind == "block" else without_moe for kind, index in new} for part, new in grown.items()}
        kl = divergence(
            run.skeleton, few, {**versions, None: {}}, None, decisions=decisions, device=run.device, reporter=run.reporter,
            label=f"Rerank, {len(chosen)} dropped", team=run.team,
        )  # fmt: skip
        costs = {part: (kl[part] - before) / left.cost(part, chosen, mixed=mixed) for part in grown}
        best = min(costs, key=lambda part: (costs[part], -part[1]))
        rounds.append({"kl": {f"{kind} {index}": kl[kind, index] for kind, index in grown}, "dropped": f"{best[0]} {best[1]}"})
        chosen, before = grown[best], kl[best]
        shortlist = [part for part in shortlist if part != best]


def rounded(value: Any, digits: int = 5) -> Any:
    """Numbers as they are reported: what other thread counts change of a sum lies behind these digits (docs/scale.md)."""
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
