"""Sections on what it weighs and how fast it is; and what has to be known to make it again."""

from __future__ import annotations

from typing import Any

import yaml

from trimoe.output.card import SPEEDS
from trimoe.output.record import Record
from trimoe.report import charts
from trimoe.report.measured import AFTER, BEFORE, SIDES
from trimoe.report.section import Code, Figure, Section, Tile
from trimoe.show.form import form_of
from trimoe.show.format import COUNTS, PARTS, human, short, three
from trimoe.show.table import Table

OUTSIDE = "outside the layers"
SIZES = {
    "safetensors on disk": "file_bytes",
    "parameters": "parameters",
    "parameters active per token": "active",
    "routed-expert parameters": "experts",
}
HELD = {"load_s": "loading, s", "resident_bytes": "memory at the end", "peak_bytes": "peak memory", "disk_bytes": "on disk"}


def tiles(record: Record) -> list[Tile]:
    """The numbers that matter most."""
    before, after = record.before, record.after
    made = [
        Tile(label="Size on disk", value=human(after["file_bytes"]), detail=f"{record.share:.1%} of {human(before['file_bytes'])}"),
        *(
            Tile(label=label, value=short(after[key], COUNTS), detail=f"{after[key] / before[key]:.1%} of {short(before[key], COUNTS)}")
            for label, key in (("Parameters", "parameters"), ("Active per token", "active"))
        ),
    ]
    if before["experts"]:
        made.append(Tile(label="Routed experts", value=f"{after['experts'] / before['experts']:.1%}", detail="of their parameters stay"))
    texts = [row for row in record.texts if row.get("against")]
    if record.kl is not None:
        made.append(Tile(label="KL to the original", value=f"{record.kl:.4f}", detail=f"nats/token, mean over {len(texts)} texts"))
    if texts:
        worst = max(texts, key=lambda row: row["perplexity"] / row["against"]["perplexity"])
        agreement = sum(row["agreement"] for row in texts) / len(texts)
        made.append(Tile(label="Top-1 agreement", value=f"{agreement:.1%}", detail=f"mean over {len(texts)} texts"))
        made.append(
            Tile(label="Perplexity, worst text", value=f"{worst['perplexity'] / worst['against']['perplexity'] - 1:+z.1%}",
                 detail=f"{worst['name']}: {worst['against']['perplexity']:.2f} to {worst['perplexity']:.2f}")
        )  # fmt: skip
    decode = (record.bench.get("ratio") or {}).get("decode_tokens_s")
    if decode:
        made.append(Tile(label="Decoding", value=f"{decode['median']:.2f}x", detail="tokens/s of the original's"))
    return made


def size(record: Record) -> Section:
    """Bytes by part, by layer, and which engines load them."""
    before, after = record.before, record.after
    blocks: list[Figure | Table] = [
        Table(
            caption="Before and after", head=("quantity", "before", "after", "share"),
            rows=[(name, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.1%}" if before[key] else "-") for name, key in SIZES.items()],
        )
    ]  # fmt: skip
    if record.parts:
        blocks += [_by_part(record.parts), _by_layer(record.parts)]
    loads = record.plan.get("loads_in") or {}
    blocks.append(
        Table(
            caption="What loads it",
            head=("engine", "loads it"),
            rows=[(str(name), str(answer)) for name, answer in loads.items()],
            words=range(2),
        )
    )
    return Section(
        name="size", title="Size", blocks=blocks,
        text=f"Written as a {form_of(record.plan)} checkpoint, which trimoe's plan foretells to the byte.",
    )  # fmt: skip


def _by_part(parts: dict[str, Any]) -> Figure:
    everywhere = [parts[OUTSIDE], *parts["layers"].values()]
    names = sorted({part for sizes in everywhere for part in sizes}, key=PARTS.index)
    totals = {part: [sum(sizes[part][at] for sizes in everywhere if part in sizes) for at in (0, 1)] for part in names}
    rows = [
        {"model": model, "bytes": values[at] / 2**20, "part": part}
        for at, model in ((1, AFTER), (0, BEFORE)) for part, values in totals.items()
    ]  # fmt: skip
    return Figure(
        name="size-parts", title="Bytes by part",
        chart=charts.bars(rows, x="model", y="bytes", y_title="MiB", series="part", stacked=True, form=".2f", order=names),
        table=Table(
            caption="Bytes by part", head=("part", "before", "after", "share"),
            rows=[(part, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "-") for part, (old, new) in totals.items()],
        ),
    )  # fmt: skip


def _by_layer(parts: dict[str, Any]) -> Figure:
    sums = {index: [sum(values[at] for values in sizes.values()) for at in (0, 1)] for index, sizes in parts["layers"].items()}
    rows = [
        {"layer": int(index), "bytes": values[at] / 2**20, "model": model}
        for index, values in sums.items() for at, model in ((0, BEFORE), (1, AFTER))
    ]  # fmt: skip
    return Figure(
        name="size-layers", title="Bytes by layer", wide=60 + 24 * len(sums) if len(sums) > 14 else 0,
        chart=charts.bars(rows, x="layer", y="bytes", x_title="layer of the original", y_title="MiB", series="model", form=".2f", order=SIDES),
        table=Table(
            caption="Bytes by layer", head=("layer", "before", "after", "share"),
            rows=[(index, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "-") for index, (old, new) in sums.items()],
        ),
    )  # fmt: skip


def speed(record: Record) -> Section | None:
    """What trimoe bench measured, if it did."""
    bench = record.bench
    if not bench:
        return None
    models, ratio = bench["models"], bench.get("ratio")
    blocks: list[Figure | Table] = []
    if ratio:
        rows = [
            {"what": label, "value": ratio[key]["median"], "low": ratio[key]["low"], "high": ratio[key]["high"]}
            for key, label in SPEEDS.items()
        ]
        rows += [{"what": label, "value": ratio[key]} for key, label in HELD.items() if key in ratio]
        blocks.append(
            Figure(
                name="speed-ratio", title="Compressed over original",
                chart=charts.dots(rows, y="what", x="value", x_title="ratio (1: the same)", rule=1.0, form=".2f"),
                note="Medians and quartiles over rounds that both models took in turns. More tokens/s is better; less of everything else is.",
                table=Table(caption="Ratios", head=("quantity", "ratio (quartiles)"), rows=[
                    (row["what"], f"{row['value']:.2f}" + (f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else "")) for row in rows]),
            )
        )  # fmt: skip
    table = [(label, *(f"{three(model[key]['median'])} ({three(model[key]['low'])} to {three(model[key]['high'])})" for model in models))
             for key, label in SPEEDS.items()]  # fmt: skip
    table += [(label, *(f"{model[key]:.1f}" if key == "load_s" else human(model[key]) for model in models)) for key, label in HELD.items()]
    names = [AFTER, BEFORE] if len(models) > 1 else [AFTER]
    blocks.append(Table(caption="Medians (quartiles)", head=("quantity", *names), rows=table))
    return Section(
        name="speed", title="Speed and memory", blocks=blocks,
        text=f"{bench['batch']} x {bench['prompt']} tokens in, {bench['generate']} new, {bench['rounds']} rounds; {bench['machine']}, "
        f"{bench['device']}, {bench['threads']} threads, {models[0]['dtype']}, torch {bench['torch']}.",
    )  # fmt: skip


def origin(record: Record) -> Section:
    """The exact command, the recipe, versions, seeds, fingerprints."""
    given, inputs = record.calibration, record.inputs
    facts = [
        ("model", record.model), ("seed", str(record.seed)), ("trimoe", record.version),
        *((str(name), str(version)) for name, version in record.versions.items()),
        (
            "calibration",
            f"{given['samples']} samples of {given['length']} tokens: {', '.join(map(str, given['domains']))}" if given["samples"] else "none",
        ),
        *((f"fingerprint, {name}", str(value)) for name, value in inputs.items() if name in ("model", "calibration")),
        *((f"{name} of the run", str(value)) for name, value in inputs.items() if name == "dtype"),
    ]  # fmt: skip
    blocks: list[Code | Table] = [
        Code(title="Command", text=record.command),
        *(Code(title=f"Then, to recover ({entry['method']})", text=str(entry["command"])) for entry in record.recovered),
        *(Code(title=f"To measure {' and '.join(names)}", text=command) for command, names in _measured(record).items()),
        Code(title="Recipe", text=yaml.safe_dump(_said(record.recipe), sort_keys=False, allow_unicode=True).strip()),
        Table(caption="Seeds, versions, inputs", head=("what", "value"), rows=facts, words=range(2)),
    ]
    return Section(name="origin", title="How it was made", text="With these the same bytes come out again.", blocks=blocks)


def _measured(record: Record) -> dict[str, list[str]]:
    """Command lines of evaluations and benchmarks, and what each measured; a demo's own made the folder too and is said already."""
    found: dict[str, list[str]] = {}
    given = dict(record.evaluation.get("commands") or {}) | ({"speed": record.bench["command"]} if "command" in record.bench else {})
    for name, command in given.items():
        if command != record.command:
            found.setdefault(str(command), []).append(str(name))
    return found


def _said(value: Any) -> Any:
    """A recipe without fields that are not set."""
    if isinstance(value, dict):
        return {key: _said(entry) for key, entry in value.items() if entry is not None}
    return [_said(entry) for entry in value] if isinstance(value, list) else value
