"""What a statistics file adds to a plan: how stable kept sets are, how many tokens experts saw, the traffic of expert parallelism before and
after, and whether compress would take it. Of the weights only what the fingerprint is made of is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trimoe.calibration.statistics import Stats
from trimoe.errors import UserError
from trimoe.methods.expert_drop import stability
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET, Reporter
from trimoe.recipe.recipe import Recipe
from trimoe.text.samples import calibrate, is_here
from trimoe.walk.expert_parallel import WAYS, Traffic


def known(skeleton: Skeleton, recipe: Recipe, path: Path, reporter: Reporter = QUIET) -> tuple[list[str], dict[str, dict[str, float]]]:
    """(warnings, traffic by number of devices): hidden-state bytes a token, `before`, and `after` as many experts of every layer as the
    recipe's first step drops (equal shares), those of the lowest leave-one-out scores. Of the file's search tokens; none, no traffic.
    Raises UserError for statistics of another model."""
    stats, step = Stats.load(path), recipe.steps[0]
    counts = {index: layer.num_experts for index, layer in stats.layers.items()}
    if counts != {index: site.num_experts for index, site in skeleton.sites.items()}:
        raise UserError(f"The statistics file {path} is of another model: its layers and experts are not those of {skeleton.name}.")
    warnings = [
        *_other_text(skeleton, recipe, stats, path),
        *stability.scarce({index: layer["count_E"].tolist() for index, layer in stats.layers.items()}),
    ]
    said, drops = step.foretell(skeleton.sites, reporter.track(stats.layers.items(), "Stability and traffic", len(stats.layers)))
    before, after = Traffic(), Traffic()
    for index, drop in drops.items():
        site, layer = skeleton.sites[index], stats.layers[index]
        if not layer.search:
            continue
        logits_TE, weight_T = layer.search["logits_TE"], layer.search["weight_T"]
        before.add(index, site.num_experts, site.hidden, site.rule.route(logits_TE, layer.bias_E)[1], weight_T)
        keep_E = torch.ones(site.num_experts, dtype=torch.bool)
        keep_E[list(drop)] = False
        number_E = keep_E.long().cumsum(0) - 1  # experts that stay are numbered anew
        chosen = number_E[site.rule.route(logits_TE, layer.bias_E, keep_E)[1]]
        after.add(index, site.num_experts - len(drop), site.hidden, chosen, weight_T)
    return warnings + said, _ways(before, after)


def _other_text(skeleton: Skeleton, recipe: Recipe, stats: Stats, path: Path) -> Iterator[str]:
    """Raises UserError where the weights are another model's; says what else would make `compress --stats` refuse the file."""
    checkpoint, spec = skeleton.checkpoint, recipe.calibration
    if not all((checkpoint.folder / name).is_file() for name in checkpoint.files()):
        yield f"whether {path} is of this very model is not known: the weights are not here, and layers and experts alone were compared."
    elif stats.about.get("model") != checkpoint.fingerprint:
        raise UserError(f"The statistics file {path} is of another model of the same shapes; gather it again, or leave --stats out.")
    dtype = str(skeleton.dtype).removeprefix("torch.")
    if stats.about.get("dtype") != dtype:
        yield f"{path} was gathered in {stats.about.get('dtype')}, and compress runs in {dtype}: it would refuse the file."
    if "spectra" in recipe.steps[0].needs:
        yield f"{recipe.steps[0].name} with these options starts from singular values, which {path} does not hold: compress would refuse the file."
    seed = int(stats.about.get("seed", 0))
    if seed:
        yield f"{path} was gathered with --seed {seed}: give compress the same."
    if not recipe.reads_text:
        return
    held = int(next(iter(stats.layers.values()))["tokens"])
    if not all(map(is_here, spec.sources)):
        yield f"whether {path} is of this calibration text is not known: {', '.join(spec.sources)} is not on this machine."
        return
    text = calibrate(
        checkpoint, spec.sources, samples=spec.samples, length=spec.length, context=skeleton.context,
        vocabulary=skeleton.config.get_text_config().vocab_size, seed=seed, apart=spec.packing == "separate",
    )  # fmt: skip
    if stats.about.get("calibration") != text.fingerprint:
        yield (
            f"{path} holds {held:,} tokens of other calibration text than the {text.samples_NL.numel():,} that the recipe asks for "
            f"({', '.join(spec.sources)}, {len(text.samples_NL)} samples of {text.samples_NL.shape[1]}): compress would refuse the file."
        )


def _ways(before: Traffic, after: Traffic) -> dict[str, dict[str, Any]]:
    found = {}
    for ways in WAYS:
        one, other = before.report(ways) if before.layers else None, after.report(ways) if after.layers else None
        if one is not None and other is not None:
            found[str(ways)] = {"before": one["bytes_per_token"], "after": other["bytes_per_token"]}
    return found
