"""Sections on what was decided, and by what: experts, layers, searches, ranks, singular values, depth, bits and zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimoe.report import charts
from trimoe.report.charts import alt
from trimoe.report.read import Finished, Step, layer_rows
from trimoe.report.section import Figure, Section, Table

STEPS = 40  # points of an averaged trace
DENSE = -1  # the rank of a matrix that was left whole
DENSE_CELLS = 3000  # cells from which a heat map is painted, not drawn
GONE = {"moe": "MoE sub-layer dropped", "block": "layer dropped"}


def sections(folder: Finished) -> list[Section]:
    """Those that the record has something to say on."""
    made = [_experts(folder), *(_search(step) for step in folder.steps), *(_ranks(folder, step) for step in folder.steps)]
    made += [_depth(step) for step in folder.steps]
    made += [_numbers(folder), _decisions(folder)]
    named: dict[str, Section] = {}
    for section in made:
        if section is not None:
            named.setdefault(section.name, section)
    return list(named.values())


# ---- experts


def _experts(folder: Finished) -> Section | None:
    blocks = [figure for figure in (_importance(folder), _counts(folder), *_minded(folder)) if figure is not None]
    if not blocks:
        return None
    return Section(
        name="experts", title="Experts and layers", blocks=blocks,
        text="Which experts mattered on the calibration text, which were kept, and how much each layer minds.",
    )  # fmt: skip


def _importance(folder: Finished) -> Figure | None:
    """Scores of a drop in all of the original's experts; where there was none, the importance or the tokens that low_rank went by."""
    before = {row["layer"]: row["experts"] for row in folder.layers}
    for step in folder.steps:
        scores = {index: row["score"] for index, row in layer_rows(step).items() if row.get("score")}
        title = str(step.fields.get("score", "leave_one_out"))
        if step.name == "low_rank":
            scores = {int(index): values for index, values in (step.metrics.get("score") or {}).items()}
        scores = {index: values for index, values in scores.items() if before.get(index) == len(values)}
        if scores:
            break
    else:
        routed: dict[str, Any] = next(
            (step.metrics["tokens_per_expert"] for step in folder.steps if step.metrics.get("tokens_per_expert")), {}
        )
        scores = {int(index): values for index, values in routed.items() if before.get(int(index)) == len(values)}
        title = "tokens routed"
    if not scores:
        return None
    tokens = {index: row.get("tokens_per_expert") for step in folder.steps for index, row in layer_rows(step).items()}
    rows = []
    for index, values in sorted(scores.items()):
        kept, most = set(folder.decisions[index]["keep"]), max(values) or 1.0
        gone = folder.decisions[index].get("gone") is not None
        counts = tokens.get(index) or []
        total = sum(counts)
        for expert, value in enumerate(values):
            rows.append(
                {"layer": index, "expert": expert, "share": value / most, "score": value, "dropped": gone or expert not in kept,
                 "what": "dropped" if gone or expert not in kept else "kept",
                 "tokens": counts[expert] / total if total and len(counts) == len(values) else None}
            )  # fmt: skip
    some = any(row["dropped"] for row in rows)
    more = [alt.Tooltip("score:Q", title=title, format=".3~g"), alt.Tooltip("what:N", title="decision")]
    if any(row["tokens"] is not None for row in rows):
        more.append(alt.Tooltip("tokens:Q", title="of the routed tokens", format=".1%"))
    width = max(len(values) for values in scores.values())
    return Figure(
        name="importance", title=f"Importance of each expert ({title.replace('_', ' ')})" + (", and what was kept" if some else ""),
        chart=charts.heat(rows, value="share", title="share of the layer's most important", marked="dropped", limits=(0.0, 1.0), more=more,
                          across="expert, by its number in the original"),
        note="Dark is important to its layer on a light page, light on a dark one." + (" A cross marks the experts that were dropped." if some else ""),
        wide=90 + 22 * width if width > 10 else 0, dense=len(rows) > DENSE_CELLS,
        table=Table(
            caption=f"scores of each expert ({title.replace('_', ' ')})", head=("layer", "kept", "dropped", "scores, expert 0 first (dropped in brackets)"),
            rows=[
                (str(index), str(len(folder.decisions[index]["keep"])),
                 ", ".join(str(row["expert"]) for row in rows if row["layer"] == index and row["dropped"]) or "none",
                 ", ".join(f"[{row['score']:.3g}]" if row["dropped"] else f"{row['score']:.3g}" for row in rows if row["layer"] == index))
                for index in sorted(scores)
            ],
            prose=True,
        ),
    )  # fmt: skip


def _counts(folder: Finished) -> Figure | None:
    found = [row for row in folder.layers if row["experts"]]
    if all(row["kept"] == row["experts"] for row in found):
        return None
    rows = [{"layer": row["layer"], "experts": row["kept"], "what": "kept"} for row in found]
    rows += [{"layer": row["layer"], "experts": row["experts"] - row["kept"], "what": "dropped"} for row in found]
    return Figure(
        name="counts", title="Experts kept in each layer",
        chart=charts.bars(rows, x="layer", y="experts", x_title="layer", y_title="experts", series="what", stacked=True, faint="dropped", form="d"),
        wide=60 + 16 * len(found) if len(found) > 20 else 0,
        table=Table(
            caption="Experts kept in each layer", head=("layer", "before", "kept"),
            rows=[(str(row["layer"]), str(row["experts"]), str(row["kept"])) for row in found],
        ),
    )  # fmt: skip


def _minded(folder: Finished) -> list[Figure]:
    """Per layer: the mean leave-one-out loss, and the measured sensitivity of the model's end."""
    figures = []
    for step in folder.steps:
        mean = {}
        for index, row in layer_rows(step).items():
            values = row.get("leave_one_out") or (row.get("score") if step.fields.get("score") == "leave_one_out" else None)
            if values:
                mean[index] = sum(values) / len(values)
        if mean:
            figures.append(
                _by_layer("layer-importance", "Importance of each layer", mean, "mean leave-one-out loss",
                          "The mean over a layer's experts of the relative error of its output when that one expert is missing.")
            )  # fmt: skip
        sensitive = {int(index): value for index, value in (step.metrics.get("sensitivity") or {}).items()}
        if sensitive:
            what = "its experts pruned" if step.name == "expert_drop" else "its experts' outputs shrunk"
            figures.append(
                _by_layer(f"sensitivity-{step.name.replace('_', '-')}", f"How much the model minds each layer, as {step.name} measured it",
                          sensitive, "KL per squared relative error",
                          f"What the next-token distributions of the whole model lose (KL) with one layer changed ({what}), over its squared error.")
            )  # fmt: skip
    return figures


def _by_layer(name: str, title: str, values: dict[int, float], y_title: str, note: str) -> Figure:
    rows = [{"layer": index, "value": value} for index, value in sorted(values.items())]
    return Figure(
        name=name, title=title, note=note, wide=60 + 16 * len(rows) if len(rows) > 20 else 0,
        chart=charts.bars(rows, x="layer", y="value", x_title="layer", y_title=y_title, height=200),
        table=Table(caption=title, head=("layer", y_title), rows=[(str(row["layer"]), f"{row['value']:.4g}") for row in rows]),
    )  # fmt: skip


# ---- search


def _search(step: Step) -> Section | None:
    layers = {index: row for index, row in layer_rows(step).items() if row.get("losses") and row.get("greedy") is not None}
    if not layers:
        return None
    way = step.fields.get("search")
    how = next(iter(way)) + " search" if isinstance(way, dict) and way else f"lowest {str(step.fields.get('score')).replace('_', ' ')}"
    blocks = [figure for figure in (_found(layers, how), _trace(layers, how)) if figure is not None]
    return Section(
        name="search", title="The search for which experts go", blocks=blocks,
        text=f"Experts were chosen by {how}. The loss is the relative error of a layer's output on calibration tokens, re-routed without the "
        "dropped experts. Lower is better.",
    )  # fmt: skip


def _found(layers: dict[int, dict[str, Any]], how: str) -> Figure:
    names = {how: lambda row: row["losses"][0], "greedy": lambda row: row["greedy"], "random sets, mean": lambda row: row["random"],
             "exhaustive (the optimum)": lambda row: row.get("exhaustive")}  # fmt: skip
    if how == "exhaustive search":
        del names["exhaustive (the optimum)"]
    if how == "greedy search":
        del names["greedy"]
    rows = [
        {"layer": f"layer {index}", "loss": value, "way": name}
        for index, row in layers.items() for name, get in names.items() if (value := get(row)) is not None
    ]  # fmt: skip
    used = [name for name in names if any(row["way"] == name for row in rows)]
    return Figure(
        name="search-losses", title="Loss in each layer, by the way of choosing",
        chart=charts.dots(rows, y="layer", x="loss", x_title="relative loss of the layer", series="way", order=used, zero=True),
        table=Table(
            caption="Loss in each layer", head=("layer", "dropped", "evaluations", *used),
            rows=[
                (str(index), str(row["dropped"]), f"{row['evaluations']:,}",
                 *(f"{value:.4f}" if (value := names[name](row)) is not None else "-" for name in used))
                for index, row in layers.items()
            ],
        ),
    )  # fmt: skip


def _trace(layers: dict[int, dict[str, Any]], how: str) -> Figure | None:
    """Over all layers: the best loss so far over the best that any way found, by evaluations."""
    layers = {index: row for index, row in layers.items() if row.get("random_trace") and row["losses"][0] > 0}
    if not layers:
        return None
    floor = {
        index: min(
            value for value in (row["losses"][0], row["greedy"], row.get("exhaustive"), row["random_trace"][-1][1]) if value is not None
        )
        for index, row in layers.items()
    }
    layers = {index: row for index, row in layers.items() if floor[index] > 0}
    end = max((max(row["evaluations"], row["random_trace"][-1][0]) for row in layers.values()), default=0)
    if end < 2:
        return None
    grid = sorted({round(math.exp(math.log(end) * at / (STEPS - 1))) for at in range(STEPS)})
    series = {"random, best so far": "random_trace"} | (
        {how: "trace"} if any(len(row.get("trace") or ()) > 0 for row in layers.values()) else {}
    )
    rows = []
    for name, key in series.items():
        for at in grid:
            ratios = [best / floor[index] for index, row in layers.items() if (best := _best(row.get(key) or (), at)) is not None]
            if len(ratios) == len(layers):
                rows.append({"evaluations": at, "loss": sum(ratios) / len(ratios), "way": name})
    greedy = sum(row["greedy"] / floor[index] for index, row in layers.items()) / len(layers)
    rows += [{"evaluations": at, "loss": greedy, "way": "greedy"} for at in (grid[0], grid[-1])]
    return Figure(
        name="search-trace", title="Best loss so far, mean over the layers",
        chart=charts.lines(rows, x="evaluations", y="loss", x_title="sets of experts evaluated", y_title="loss / best found by any way",
                           series="way", log_x=True, log_y=True, step=True, order=[how, "greedy", "random, best so far"] if how in series else None),
        note="1 is the best loss that any way found in a layer (the optimum, where all sets were evaluated).",
        table=Table(
            caption="Best loss so far", head=("way", "evaluations", "loss / best found"),
            rows=[(row["way"], f"{row['evaluations']:,}", f"{row['loss']:.4f}") for row in rows],
        ),
    )  # fmt: skip


def _best(trace: Sequence[Sequence[float]], at: int) -> float | None:
    return next((value for evaluations, value in reversed(trace) if evaluations <= at), None)


# ---- ranks


def _ranks(folder: Finished, step: Step) -> Section | None:
    if step.name != "low_rank":
        return None
    blocks = []
    for key, what in (("in", "first projection (gate and up)"), ("out", "last projection")):
        blocks += [figure for figure in (_rank_map(folder, key, what), _spectra(step, key, what)) if figure is not None]
    return Section(
        name="ranks", title="Ranks and singular values", blocks=blocks,
        text=f"Each expert's matrices became products of two factors (rank: {step.fields.get('rank')}, ratio {step.fields.get('ratio')}).",
    )  # fmt: skip


def _rank_map(folder: Finished, key: str, what: str) -> Figure | None:
    found = {index: decision for index, decision in folder.decisions.items() if decision.get(f"{key}_ranks")}
    if not found:
        return None
    rows = [
        {"layer": index, "expert": expert, "rank": None if rank == DENSE else rank, "whole": rank == DENSE}
        for index, decision in found.items() for expert, rank in zip(decision["keep"], decision[f"{key}_ranks"], strict=True)
    ]  # fmt: skip
    width = max(row["expert"] for row in rows) + 1
    some = any(row["whole"] for row in rows)
    return Figure(
        name=f"ranks-{key}", title=f"Rank of each expert's {what}",
        chart=charts.heat(rows, value="rank", title="rank", marked="whole", across="expert, by its number in the original"),
        note="Empty cells are experts that were dropped." + (" A cross marks matrices that were left whole." if some else ""),
        wide=90 + 22 * width if width > 10 else 0, dense=len(rows) > DENSE_CELLS,
        table=Table(
            caption=f"Ranks, {what}", head=("layer", "rank by expert"), prose=True,
            rows=[
                (str(index), ", ".join(f"{row['expert']}: {'whole' if row['whole'] else row['rank']}" for row in rows if row["layer"] == index))
                for index in found
            ],
        ),
    )  # fmt: skip


def _spectra(step: Step, key: str, what: str) -> Figure | None:
    found = {int(index): entry[key] for index, entry in (step.metrics.get("spectra") or {}).items()}
    if not found:
        return None
    rows = [
        {"layer": index, "rank": rank, "value": value}
        for index, entry in found.items() for rank, value in zip(entry["rank"], entry["median"], strict=True) if value and value > 1e-6
    ]  # fmt: skip
    numbers = next(iter(found.values()))["rank"]
    shown = [at for at in (0, 1, 2, 4, 8, 16, 24, 31) if at < len(numbers)]
    return Figure(
        name=f"spectrum-{key}", title=f"Singular values, {what}: median over a layer's experts",
        chart=charts.lines(rows, x="rank", y="value", x_title="number of the singular value", y_title="share of the largest", series="layer", numeric=True,
                           log_y=True),
        note="Of each expert's matrix as it was factored (weighed by its inputs). A curve that falls fast can be cut early.",
        table=Table(
            caption=f"Singular values, {what}", head=("layer", *(f"no. {numbers[at]}" for at in shown)),
            rows=[(str(index), *(f"{entry['median'][at]:.3g}" for at in shown)) for index, entry in found.items()],
        ),
    )  # fmt: skip


# ---- depth


def _depth(step: Step) -> Section | None:
    similar = step.metrics.get("similarity")
    if not similar:
        return None
    dropped = set(step.metrics.get("dropped") or ())
    rows = [
        {"part": part.replace("moe", "MoE").replace("block", "layer"), "value": value, "what": "dropped" if part in dropped else "kept"}
        for part, value in sorted(similar.items(), key=lambda item: (item[0].split()[0], int(item[0].split()[-1])))
    ]
    title = "How little each part changes its input"
    blocks = [
        Figure(
            name="similarity", title=title,
            chart=charts.dots([{**row, "part": row["part"]} for row in rows], y="part", x="value", x_title="cosine of input and output", series="what",
                              order=["kept", "dropped"]),
            note="1: the part passes on what it is given, and can be left out unnoticed.",
            table=Table(caption=title, head=("part", "cosine", "decision"), rows=[(row["part"], f"{row['value']:.4f}", row["what"]) for row in rows]),
        )
    ]  # fmt: skip
    rounds = step.metrics.get("rerank") or []
    if rounds:
        curve = [{"round": number, "kl": entry["kl"][entry["dropped"]], "part": entry["dropped"]} for number, entry in enumerate(rounds, 1)]
        blocks.append(
            Figure(
                name="rerank", title="KL after each part that went",
                chart=charts.bars([{**row, "name": f"{row['round']}: {row['part']}"} for row in curve], x="name", y="kl", x_title="round: part",
                                  y_title="KL, nats/token", height=200),
                note="Each round drops the part that, with those already dropped, costs the least KL on calibration text.",
                table=Table(caption="KL after each part", head=("round", "part", "KL, nats/token", "tried"),
                            rows=[(str(number), entry["dropped"], f"{entry['kl'][entry['dropped']]:.4f}", str(len(entry["kl"])))
                                  for number, entry in enumerate(rounds, 1)]),
            )
        )  # fmt: skip
    return Section(
        name="depth", title="Layers and sub-layers dropped", blocks=blocks,
        text=f"{len(dropped)} of {len(similar)} candidates went: {', '.join(sorted(dropped)) or 'none'}.",
    )  # fmt: skip


# ---- bits, zeros; everything


def _numbers(folder: Finished) -> Section | None:
    """Bits and zeros of every layer's experts."""
    found = {
        index: decision
        for index, decision in folder.decisions.items()
        if decision.get("bits") or decision.get("sparsity") or decision.get("pattern")
    }
    if not found:
        return None
    step = next((step for step in folder.steps if step.name in ("quantize", "weight_prune")), None)
    recorded = layer_rows(step) if step is not None else {}
    zeros = {index: recorded.get(index, {}).get("zeros", _zeros(decision)) for index, decision in found.items() if not decision.get("bits")}
    bits = {index: decision["bits"] for index, decision in found.items() if decision.get("bits")}
    blocks = []
    if bits:
        blocks.append(_by_layer("bits", "Bits of each expert weight, by layer", bits, "bits", ""))
    if zeros:
        blocks.append(_by_layer("zeros", "Zeros among the expert weights, by layer", zeros, "share that is zero", ""))
    borrowed = sum(row.get("borrowed", 0) for row in recorded.values())
    unseen = sum(row.get("unseen_experts", 0) for row in recorded.values())
    text = []
    share = step.metrics.get("quantized_share") if step is not None else None
    if share is not None:
        text.append(f"{share:.1%} of the expert weights are held as integers.")
    if borrowed:
        text.append(f"{borrowed} experts saw too few tokens and were fitted to their layer's inputs.")
    if unseen:
        text.append(f"{unseen} experts saw no token and were pruned by magnitude.")
    return Section(name="numbers", title="Bits and zeros", text=" ".join(text), blocks=blocks)


def _zeros(decision: dict[str, Any]) -> float:
    if decision.get("pattern"):
        keep, of = decision["pattern"]
        return 1 - keep / of
    return decision["sparsity"]


def _decisions(folder: Finished) -> Section:
    experts = {row["layer"]: row["experts"] for row in folder.layers}
    rows = []
    for index, decision in sorted(folder.decisions.items()):
        done = [GONE[decision["gone"]]] if decision.get("gone") else []
        for key, what in (("in_ranks", "first"), ("out_ranks", "last")):
            if decision.get(key) and not decision.get("gone"):
                done.append(f"{what} ranks " + " ".join("whole" if rank == DENSE else str(rank) for rank in decision[key]))
        done += ["multiplied out again"] if decision.get("merged") else []
        done += [f"{decision['bits']} bits, groups of {decision.get('group')}"] if decision.get("bits") else []
        done += [f"{decision['sparsity']:.0%} zeros"] if decision.get("sparsity") else []
        done += ["{} of {} stay".format(*decision["pattern"])] if decision.get("pattern") else []
        done += [f"also {', '.join(decision['linears'])}"] if decision.get("linears") else []
        keep, count = decision.get("keep") or [], experts.get(index, 0)
        gone = [str(expert) for expert in range(count) if expert not in set(keep)] if not decision.get("gone") else []
        rows.append((str(index), str(count), str(0 if decision.get("gone") else len(keep)), " ".join(gone) or "-", "; ".join(done) or "-"))
    return Section(
        name="decisions", title="The decisions",
        text="Everything that was decided, layer by layer; trimoe.json holds the same, and a checkpoint is the source plus these.",
        blocks=[Table(caption="Decisions by layer", head=("layer", "experts before", "after", "dropped", "and"), rows=rows, prose=True)],
    )  # fmt: skip
