"""How much disk a recipe needs, where, and for what; checked before anything is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from trimoe import measurements
from trimoe.errors import UserError
from trimoe.methods import LowRank
from trimoe.paper import search_bytes
from trimoe.recipe import Recipe
from trimoe.recover.spec import Recover
from trimoe.skeleton import Skeleton
from trimoe.spill import BUDGET, streams_budget

STATISTICS = "statistics, until it is done"
BESIDE = "files beside the weights"
ENTRY, EXPERT, LEAST = 160, 400, 1 << 18  # bytes of a tensor's line in the index, of what is recorded of an expert, and of all else


def output_need(skeleton: Skeleton, recipe: Recipe, result: int, tokens: int) -> dict[str, int]:
    """Bytes in the output folder at once, by what they are: the result of `result` bytes, and what lies in OUT/.trimoe until the run is done."""
    checkpoint, experts = skeleton.checkpoint, sum(site.num_experts for site in skeleton.sites.values())
    beside = (
        sum((checkpoint.folder / name).stat().st_size for name in checkpoint.side_files())
        + ENTRY * len(checkpoint.tensors)
        + EXPERT * experts
        + LEAST
    )
    found = {"result": result, BESIDE: beside}
    kept = sum(statistics(skeleton, recipe, number, tokens) for number in range(len(recipe.steps)))
    if kept:
        found[STATISTICS] = kept
    if recipe.recover is not None:
        found["result before recovery, until it is done"] = result + beside
        found["training, until it is done"] = _training(skeleton, recipe.recover)
    return found


def spilled(skeleton: Skeleton, recipe: Recipe, tokens: int) -> int:
    """Bytes of files in TMPDIR: hidden states, of one walk or of all versions walked side by side, inputs that one layer's experts are
    fitted to, and search tokens of all layers, beyond their budgets in memory."""
    hidden = tokens * next(iter(skeleton.sites.values())).hidden * skeleton.dtype.itemsize
    fitted = any(isinstance(step, LowRank) or getattr(step, "calibrated", False) for step in recipe.steps)
    walked = max(0, hidden - BUDGET) * (2 if fitted else 1)
    sites = list(skeleton.sites.values())
    made = [one.nbytes for step in recipe.steps for one in measurements.of_step(skeleton, step, sites, recipe.calibration, tokens)]
    streams = max(made, default=0) - streams_budget(skeleton.largest_layer, torch.device("cpu"))
    return max(walked, streams) + search_spilled(skeleton, recipe, tokens)


def search_spilled(skeleton: Skeleton, recipe: Recipe, tokens: int) -> int:
    """Bytes of search tokens in TMPDIR, at most: every process of a machine has those of all layers."""
    most = 0
    for step in recipe.steps:
        held = spilled = 0
        for nbytes in search_bytes(step, dict(skeleton.sites), recipe, tokens):
            held += nbytes
            spilled += nbytes if held > BUDGET else 0  # as spill.room has it
        most = max(most, spilled)
    return most


def statistics(skeleton: Skeleton, recipe: Recipe, number: int, tokens: int, needs: frozenset[str] = frozenset()) -> int:
    """Bytes of the file of statistics that a step keeps so that a killed run need not gather them again, of more than it `needs` where that is
    said."""
    step = recipe.steps[number]
    if not step.gathers:
        return 0  # nothing is gathered
    total = sum(search_bytes(step, dict(skeleton.sites), recipe, tokens))
    for site in skeleton.sites.values():
        sums = 2 * site.num_experts**2 + site.num_experts * site.hidden
        if "channels" in step.needs | needs:
            sums += 2 * site.num_experts * (site.hidden + site.width)
        if "spectra" in step.needs:
            sums += site.num_experts * (min(site.first, site.hidden) + min(site.hidden, site.width))
        total += 8 * sums
    return total


def _training(skeleton: Skeleton, spec: Recover) -> int:
    """States of training (numbers, two moments; the best; each beside the one that replaces it) and the original's answers."""
    answers = spec.samples * min(spec.length, skeleton.context) * (8 * spec.top_k + 4) if spec.method in ("router", "logits") else 0
    return 2 * trained(skeleton, spec) * 4 * 4 + answers


def trained(skeleton: Skeleton, spec: Recover) -> int:
    """Parameters that a recovery trains at once, at most; 0 where it is a layer at a time."""
    matrices = [tensor for layer in skeleton.layers for tensor in layer.parameters() if tensor.dim() > 1]
    if spec.by_layer:
        return 0  # into the result itself
    if spec.method == "router":
        return sum(site.num_experts * site.hidden for site in skeleton.sites.values())
    if spec.whole:
        return sum(tensor.numel() for tensor in skeleton.model.parameters())
    if spec.method == "experts":
        return sum(site.num_experts * site.hidden * (site.first + site.width) for site in skeleton.sites.values())
    return sum(spec.rank * _edges(tensor) for tensor in matrices)


def _edges(tensor: torch.Tensor) -> int:
    """Rows and columns of a matrix, or of all matrices in a stack."""
    return (tensor.shape[-1] + tensor.shape[-2]) * (tensor.numel() // (tensor.shape[-1] * tensor.shape[-2]))


def check(out: Path, wanted: int, spill: int = 0, *, left: int | None = None) -> None:
    """Raises UserError where the disk of `out` has no room for `wanted` bytes, or that of temporary files none for `spill`.

    Of what is wanted `left` bytes are there already; by default what a killed run left in `out`.
    """
    existing = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    there = size(out) if left is None else left
    scratch = Path(tempfile.gettempdir())
    if spill and os.stat(scratch).st_dev == os.stat(existing).st_dev:
        wanted, spill = wanted + spill, 0
    for place, need, have in ((existing, wanted, there), (scratch, spill, 0)):
        free = shutil.disk_usage(place).free + have
        if need and free < need:
            what = "The result needs" if place == existing else "Hidden states that do not fit in memory need"
            hint = "" if place == existing else "; set TMPDIR to a folder on a larger disk, or take fewer calibration tokens"
            raise UserError(f"{what} {human(need)} of disk at {place}, which has {human(free)} free{hint}.")


def size(folder: Path) -> int:
    """Bytes of all files in a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def probe(path: Path, option: str) -> None:
    """Raises UserError where no file can be made in the folder of `path`: found out before hours of work, not after."""
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}.") from None


def human(count: float) -> str:
    """1234567890 -> '1.15 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError
