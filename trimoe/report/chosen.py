"""Sections on what was decided, and by what: experts, layers, searches, ranks, singular values, depth, bits and zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trimoe.methods import evidence
from trimoe.model.decision import LayerDecision
from trimoe.output.record import Record, Step
from trimoe.report import charts, experts, searched
from trimoe.report.experts import DENSE_CELLS, by_layer
from trimoe.report.section import Figure, Section
from trimoe.show.format import GONE
from trimoe.show.table import Table

DENSE = -1  # the rank of a matrix that was left whole


def sections(record: Record) -> list[Section]:
    """Those that the record has something to say on."""
    made: list[Section | None] = [experts.section(record)]
    for of_step in (searched.section, lambda step: _ranks(record, step), _depth):
        made += _of_steps(record, of_step)
    made += [_numbers(record), _decisions(record)]
    return [section for section in made if section is not None]


def _of_steps(record: Record, of_step: Callable[[Step], Section | None]) -> list[Section]:
    """The section on each step that has one; where several steps have one of the same kind, each says which it is."""
    found = [(number, step, section) for number, step in enumerate(record.steps, 1) if (section := of_step(step)) is not None]
    if len(found) == 1:
        return [found[0][2]]
    made: list[Section] = []
    for number, step, section in found:
        which = f"-{number}" if made else ""
        blocks = [replace(block, name=block.name + which) if isinstance(block, Figure) else block for block in section.blocks]
        made.append(replace(section, name=section.name + which, title=f"{section.title}: step {number}, {step.name}", blocks=blocks))
    return made


# ---- ranks


def _ranks(record: Record, step: Step) -> Section | None:
    if step.name != "low_rank":
        return None
    blocks = []
    for key, what in (("in", "first projection (gate and up)"), ("out", "last projection")):
        blocks += [figure for figure in (_rank_map(record, key, what), _spectra(step, key, what)) if figure is not None]
    return Section(
        name="ranks", title="Ranks and singular values", blocks=blocks,
        text=f"Each expert's matrices became products of two factors (rank: {step.fields.get('rank')}, ratio {step.fields.get('ratio')}).",
    )  # fmt: skip


def _rank_map(record: Record, key: str, what: str) -> Figure | None:
    found = {index: decision for index, decision in record.decisions.items() if getattr(decision, f"{key}_ranks")}
    if not found:
        return None
    rows = [
        {"layer": index, "expert": expert, "rank": None if rank == DENSE else rank, "whole": rank == DENSE}
        for index, decision in found.items() for expert, rank in zip(decision.keep, getattr(decision, f"{key}_ranks"), strict=True)
    ]  # fmt: skip
    width = max(row["expert"] for row in rows) + 1
    some = any(row["whole"] for row in rows)
    return Figure(
        name=f"ranks-{key}", title=f"Rank of each expert's {what}",
        chart=charts.heat(rows, value="rank", title="rank", marked="whole", across="expert, by its number in the original"),
        note="Empty cells are experts that were dropped." + (" A cross marks matrices that were left whole." if some else ""),
        wide=90 + 22 * width if width > 10 else 0, dense=len(rows) > DENSE_CELLS,
        table=Table(
            caption=f"Ranks, {what}", head=("layer", "rank by expert"), words=range(2),
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


def _numbers(record: Record) -> Section | None:
    """Bits and zeros of every layer's experts."""
    found = {index: decision for index, decision in record.decisions.items() if decision.bits or decision.sparsity or decision.pattern}
    if not found:
        return None
    step = next((step for step in record.steps if step.name in ("quantize", "weight_prune")), None)
    recorded = step.layers if step is not None else {}
    zeros = {index: recorded.get(index, {}).get("zeros", _zeros(decision)) for index, decision in found.items() if not decision.bits}
    bits = {index: decision.bits for index, decision in found.items() if decision.bits}
    blocks = []
    if bits:
        blocks.append(by_layer("bits", "Bits of each expert weight, by layer", bits, "bits", ""))
    if zeros:
        blocks.append(by_layer("zeros", "Zeros among the expert weights, by layer", zeros, "share that is zero", ""))
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


def _zeros(decision: LayerDecision) -> float:
    if decision.pattern:
        keep, of = decision.pattern
        return 1 - keep / of
    return decision.sparsity or 0.0


def _decisions(record: Record) -> Section:
    before = {row["layer"]: row["experts"] for row in record.layers}
    rows = []
    for index, decision in sorted(record.decisions.items()):
        done = [GONE[decision.gone]] if decision.gone else []
        for ranks, what in ((decision.in_ranks, "first"), (decision.out_ranks, "last")):
            if ranks and not decision.gone:
                done.append(f"{what} ranks " + " ".join("whole" if rank == DENSE else str(rank) for rank in ranks))
        done += ["multiplied out again"] if decision.merged else []
        done += [f"{decision.bits} bits, groups of {decision.group}"] if decision.bits else []
        done += [f"{decision.sparsity:.0%} zeros"] if decision.sparsity else []
        done += ["{} of {} stay".format(*decision.pattern)] if decision.pattern else []
        done += [f"also {', '.join(decision.linears)}"] if decision.linears else []
        count = before.get(index, 0)
        gone = [str(expert) for expert in range(count) if expert not in set(decision.keep)] if not decision.gone else []
        rows.append(
            (str(index), str(count), str(0 if decision.gone else len(decision.keep)), " ".join(gone) or "-", "; ".join(done) or "-")
        )
    return Section(
        name="decisions", title="The decisions",
        text="Everything that was decided, layer by layer; trimoe.json holds the same, and a checkpoint is the source plus these.",
        blocks=[
            *_evidence(record),
            Table(caption="Decisions by layer", head=("layer", "experts before", "after", "dropped", "and"), rows=rows, words=range(5)),
        ],
    )  # fmt: skip


def _evidence(record: Record) -> list[Table]:
    """On how much text each step was decided."""
    rows = [
        (f"{number}, {step.name}: {name}", *cells)
        for number, step in enumerate(record.steps, 1)
        for name, *cells in evidence.rows(step.metrics.get("measured_on") or {})
    ]
    return (
        [Table(caption="On how much text it was decided", head=("step", *evidence.HEAD[1:]), rows=rows, words=range(len(evidence.HEAD)))]
        if rows
        else []
    )
