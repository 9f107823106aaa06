"""How expert_drop decides, and what trimoe.json says of it beside the decision: scores, and losses of other ways to choose. That is
deterministic and small: a report is drawn from it, nothing is computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trimoe.calibration.statistics import Stats
from trimoe.methods.expert_drop import receptive_field, scores, search, stability
from trimoe.methods.expert_drop.options import Drop, Exhaustive
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.methods.lab import Lab
from trimoe.model.decision import Decisions
from trimoe.show.format import runs
from trimoe.walk.decided import masked
from trimoe.walk.sensitivity import probe_size, shrunk

if TYPE_CHECKING:
    from trimoe.methods.expert_drop.expert_drop import ExpertDrop

FEW_SETS = 2048  # in a layer, all of which are evaluated beside any search
DRAWS = 1000  # random sets at most that a search is compared with


@dataclass(frozen=True)
class Choice:
    """A step at work on a model. `protected`: experts of each layer that stay if they can."""

    step: ExpertDrop
    lab: Lab
    stats: Stats
    protected: dict[int, Drop]

    @classmethod
    def of(cls, step: ExpertDrop, lab: Lab) -> Choice:
        stats = lab.statistics(step.needs, step.reach(lab.sites))
        return cls(step, lab, stats, scores.super_experts(stats.layers) if step.protect_super_experts else {})

    def decided(self) -> tuple[Decisions, dict[str, Any]]:
        step, lab = self.step, self.lab
        menus, sensitive, probed = self._menus() if step.counts == "optimal" else (None, None, {})
        counts = step.layer_counts(lab.sites, self.stats.layers, lab.seed, menus=menus, sensitivity=sensitive)
        found = lab.each_layer(lambda index: self._searched(index, counts[index]), "Search")
        made = lab.each_layer(lambda index: self._recorded(index, counts[index], found[index]), "Compare with greedy and random")
        rows = {str(index): row for index, (row, _) in made.items()}
        instead = {index: drop for index, (_, drop) in made.items() if drop is not None}
        drops = {index: best.drops[0] for index, best in found.items()} | instead
        if instead:
            lab.reporter.say(
                f"In layers {runs(sorted(instead))} the experts of the lowest gate go: sets that half of the search tokens chose did "
                "worse on the other half."
            )
        searched_on = {index: routed for index in lab.sites if (routed := rows[str(index)].get("search_tokens_per_expert"))}
        metrics: dict[str, Any] = {"layers": rows, "gate_instead": list(instead)}
        metrics["measured_on"] = probed | lab.text_seen(self.stats, searched_on)
        metrics["warnings"] = self._warnings(rows, searched_on)
        if sensitive is not None:
            metrics["sensitivity"] = {str(i): value for i, value in sensitive.items()}
        if step.receptive_field is not None:
            few, metrics["measured_on"]["receptive_field"] = lab.probe("Receptive field", receptive_field.streams(step.receptive_field))
            chosen = receptive_field.choose(
                lab.skeleton,
                few,
                {i: (drops[i], *(drop for drop in best.drops if drop != drops[i]))[: len(best.drops)] for i, best in found.items()},
                step.receptive_field,
                decisions=lab.decisions,
                device=lab.device,
                reporter=lab.reporter,
                team=lab.team,
            )
            drops, metrics["receptive_field"] = chosen.drops, chosen.blocks
        return step.without(lab.decisions, drops), metrics

    def _space(self, index: int, dropped: int) -> search.Space:
        return self.step.space(self.lab.sites[index], dropped, self.protected.get(index, ()))

    def _searched(self, index: int, dropped: int) -> search.Found:
        site, lab = self.lab.sites[index], self.lab
        return self.step.drop_sets(site, self.stats.layers[index], dropped, self.protected.get(index, ()), lab.seed, lab.device)

    def _menus(self) -> tuple[dict[int, dict[int, float]], dict[int, float], dict[str, Any]]:
        """Per layer the loss of the best nested set of every count, how much the model minds (KL per squared relative loss), and by
        what probes that was found."""
        sites = self.lab.sites
        uniform, paths = self.step.uniform(sites), self.lab.each_layer(self._path, "Loss of every count")
        menus = {index: {n: loss for n, (_, loss) in path.items()} for index, path in paths.items()}
        dropped = {index: probe_size(menus[index], max(uniform[index], site.rule.groups)) for index, site in sites.items()}
        drops = {index: paths[index][count][0] for index, count in dropped.items()}
        perturb = {index: partial(masked, drop=drop) if drop else shrunk for index, drop in drops.items()}
        sensitive, probed = self.lab.sensitivity(perturb, dropped)
        return menus, sensitive, probed

    def _path(self, index: int) -> dict[int, tuple[Drop, float]]:
        site, loss = self.lab.sites[index], SubsetLoss(self.stats.layers[index], device=self.lab.device)
        most = min(site.num_experts - self.step.floor(site, self.step.share(self.lab.sites)), loss.max_drop)
        spared = self._space(index, most // site.rule.groups * site.rule.groups).protected
        return search.greedy_path(loss, site.num_experts, most, site.rule.groups, spared)

    def _recorded(self, index: int, dropped: int, best: search.Found) -> tuple[dict[str, Any], Drop | None]:
        """What was found in a layer and what it costs, beside greedy, random and, of few sets, the best there is, where the exact loss is at hand;
        and the set of the lowest gate, if that is better than what is found on as few tokens (`cross_check`).

        `drop` is what goes, with the loss `losses[0]`; in place of `searched` the set of the lowest gate, with `gate_loss`.
        `trace` and `random_trace`: [evaluations, best loss so far] of the search and of random draws, wherever it fell.
        """
        step, site, layer, device = self.step, self.lab.sites[index], self.stats.layers[index], self.lab.device
        protected = self.protected.get(index, ())
        row: dict[str, Any] = {
            "dropped": dropped, "drop": best.drops[0], "protected": protected, "evaluations": best.evaluations,
            "tokens_per_expert": layer["count_E"].tolist(), "score": step.importance(layer, self.lab.seed).tolist(),
        }  # fmt: skip
        if not layer.search:
            return row, None
        row["search_tokens_per_expert"] = layer.routed
        if step.score != "leave_one_out":
            row["leave_one_out"] = scores.leave_one_out(layer).tolist()
        loss = SubsetLoss(layer, device=device)
        if not dropped or dropped > loss.max_drop:
            return row, None
        space = self._space(index, dropped)
        mask = torch.zeros(len(best.drops), site.num_experts, dtype=torch.bool)
        for place, drop in enumerate(best.drops):
            mask[place, list(drop)] = True
        row["losses"] = loss(mask).tolist()
        row["greedy"] = search.greedy(loss, space).losses[0]
        drawn = search.random(loss, space, draws=min(max(best.evaluations, 20), DRAWS), seed=self.lab.seed, keep=DRAWS)
        row["random"] = sum(drawn.losses) / len(drawn.losses)
        row["random_trace"] = drawn.trace
        row["trace"] = best.trace
        if isinstance(step.search, Exhaustive) or space.size() <= FEW_SETS:
            found = best if isinstance(step.search, Exhaustive) else search.exhaustive(loss, space)
            row["exhaustive"], row["sets"] = found.losses[0], space.size()
        halves = stability.halves(step, site, layer, dropped, protected, device)
        if halves is None:
            return row, None
        row["stability"] = halves.jaccard(site.num_experts)
        row["by_other_half"] = {"searched" if step.search is not None else "leave_one_out": halves.loss, "gate": halves.lowest_loss}
        other = halves.lowest != best.drops[0] and any(drop != halves.lowest for drop in halves.drops)
        if not (step.cross_check and step.search is not None and other and halves.loss > halves.lowest_loss):
            return row, None
        mask = torch.zeros(1, site.num_experts, dtype=torch.bool)
        mask[0, list(halves.lowest)] = True
        row |= {"drop": halves.lowest, "searched": best.drops[0], "gate_loss": loss(mask).tolist()[0]}
        return row, halves.lowest

    def _warnings(self, rows: dict[str, Any], searched_on: dict[int, list[int]]) -> list[str]:
        seen = {index: self.stats.layers[index]["count_E"].tolist() for index in self.lab.sites}
        unstable = stability.warning(rows)
        said = [*stability.scarce(seen), *stability.few_searched(seen, searched_on), *([unstable] if unstable is not None else [])]
        for warning in said:
            self.lab.reporter.say(f"warning: {warning}")
        return said
