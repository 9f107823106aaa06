"""On how many search tokens sets of experts are chosen: planned for large shapes, counted at 256 experts, and what fewer of them cost.

    python benchmarks/search_tokens.py planned qwen3_30b deepseek_v3       # from headers alone
    python benchmarks/search_tokens.py counted                            # tiny random models of 256 experts
    python benchmarks/search_tokens.py quality --model builtin:mini-qwen2-moe --calibration english=calib-english.jsonl ... --text dev-english.jsonl ...

"One budget" is what all layers' search tokens had to share before: so many as fit into `search_memory` in all layers together.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huge_shapes import SHAPES, write
from quality_expert_drop import PeakMemory
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig

import trimoe
from trimoe.calibration.gather import statistics
from trimoe.calibration.search_tokens import ENOUGH, USUAL, gram_bytes
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop import stability
from trimoe.methods.expert_drop.options import Greedy
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.plan.disk import search_spilled
from trimoe.recipe.recipe import load
from trimoe.show.format import human
from trimoe.text.samples import calibrate
from trimoe.walk.decided import masked

MEMORY = 2.0  # GiB, search_memory's default


def one_budget(sites: Mapping[int, MoeBlock], reach: int) -> int:
    """Search tokens where all layers share the memory."""
    return min(USUAL, int(MEMORY * 2**30 / gram_bytes(list(sites.values()), reach)))


def planned(names: list[str]) -> None:
    print(
        "| model | experts, layers | one budget: tokens, an expert | search tokens, an expert | Grams of all layers | in TMPDIR | sensitivity | memory |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names or list(SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            write(SHAPES[name](), Path(folder) / name)
            recipe = load({"steps": [{"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy"}}]})
            skeleton = Skeleton.of(str(Path(folder) / name))
            made, sites = trimoe.plan(skeleton, recipe), skeleton.sites
        rows = {row["name"]: row for row in made.measured_on}
        site, reach = next(iter(sites.values())), recipe.steps[0].reach(sites)
        before, found = one_budget(sites, reach), rows["Search"]
        share, tokens = site.rule.top_k / site.num_experts, rows["Statistics"]["tokens"]
        print(
            f"| {name} | {site.num_experts}, {len(sites)} | {before:,}, {before * share:.1f} | {found['tokens']:,}, {found['tokens'] * share:.0f} "
            f"| {human(found['tokens'] * gram_bytes(list(sites.values()), reach))} | {human(search_spilled(skeleton, recipe, tokens))} "
            f"| {rows['Sensitivity']['samples']} x {rows['Sensitivity']['tokens'] // rows['Sensitivity']['samples']:,} "
            f"| {human(made.peak_memory)} |", flush=True,
        )  # fmt: skip


def counted() -> None:
    """A layer of 256 experts is wide and shallow here: its Grams are those of the large models, its weights are not."""
    small: dict[str, Any] = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, vocab_size=96, moe_intermediate_size=8, num_hidden_layers=2,
                                 num_experts_per_tok=8, intermediate_size=16)  # fmt: skip
    configs = {
        "qwen3_moe": Qwen3MoeConfig(**small, head_dim=8, num_experts=256, norm_topk_prob=True),
        "deepseek_v3": DeepseekV3Config(**small, n_routed_experts=256, n_group=8, topk_group=4, first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=8,
                                        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1),
    }  # fmt: skip
    step = ExpertDrop(ratio=0.25, counts="uniform", search=Greedy())
    for name, config in configs.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            skeleton = Skeleton.of(folder)
            reach = step.reach(skeleton.sites)
            batches = [torch.randint(3, 96, (8, 256), generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
            layers = statistics(skeleton, batches, reach=reach, search_memory=MEMORY, needs=frozenset()).layers.values()
            counts = [(own, int(every)) for one in layers for own, every in zip(one.routed, one["count_E"].tolist(), strict=True)]
            tokens, taken = sum(batch.numel() for batch in batches), len(next(iter(layers)).search["weight_T"])
            middle = sorted(own for own, _ in counts)[len(counts) // 2]
            print(
                f"{name}: {taken:,} of {tokens:,} tokens, reach {reach}; an expert: {middle} (median); of {len(counts)} experts "
                f"{sum(every < ENOUGH for _, every in counts)} have fewer than {ENOUGH} in the text, {sum(own < min(ENOUGH, every) for own, every in counts)} "
                f"have fewer than they could among the search tokens, {sum(every * taken / tokens < min(ENOUGH, every) for _, every in counts)} would in a "
                f"plain sample", flush=True,
            )  # fmt: skip


def quality(given: argparse.Namespace) -> None:
    """KL of greedy at so many routed search tokens an expert, as found and cross-checked, and of the lowest `gate` over all of the text; and in how
    many layers greedy's loss by the other half of the search tokens was the larger one."""
    skeleton = Skeleton.of(given.model)
    text = calibrate(skeleton.checkpoint, given.calibration, samples=given.samples, length=256, context=skeleton.context,
                     vocabulary=skeleton.config.vocab_size, seed=0)  # fmt: skip
    site, sites = next(iter(skeleton.sites.values())), dict(skeleton.sites)
    model = trimoe.load(given.model, dtype=torch.float32)
    held, layers = PeakMemory(model, skeleton, given.text, given.tokens), model.get_submodule(skeleton.prefix)
    steps = {ratio: ExpertDrop(ratio=ratio, counts="uniform", search=Greedy()) for ratio in given.ratios}
    reach = max(step.reach(sites) for step in steps.values())
    known: dict[tuple[tuple[int, ...], ...], float] = {}

    def kl(drops: Mapping[int, tuple[int, ...]]) -> float:
        key = tuple(drops[index] for index in sites)
        if key not in known:
            with contextlib.ExitStack() as stack:
                for index, one in sites.items():
                    stack.enter_context(masked(layers[index], one, drops[index]))
                known[key] = sum(found := held.kl()) / len(found)
        return known[key]

    for number in given.routed:
        tokens = round(number * site.num_experts / site.rule.top_k)
        for seed in range(given.seeds):
            stats = statistics(
                skeleton, text.batches(), reach=reach, search_tokens=tokens, search_memory=64, seed=seed, needs=frozenset()
            ).layers
            least = min(count for layer in stats.values() for count in layer.routed)
            for ratio, step in steps.items():
                count = step.uniform(sites)
                halves = {index: stability.halves(step, one, stats[index], count[index]) for index, one in sites.items()}
                found = {index: step.drop_sets(one, stats[index], count[index], (), seed).drops[0] for index, one in sites.items()}
                lowest = {index: half.lowest for index, half in halves.items() if half is not None}
                checked = {
                    index: half.lowest if half.loss > half.lowest_loss else found[index]
                    for index, half in halves.items()
                    if half is not None
                }
                print(
                    f"{given.model} {ratio:.1%}  {number:g} an expert, {least} at least, seed {seed}: gate {kl(lowest):.4f}  greedy {kl(found):.4f}  "
                    f"checked {kl(checked):.4f} (gate in {sum(checked[index] != found[index] for index in sites)} of {len(sites)})", flush=True,
                )  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("what", choices=["planned", "counted", "quality"])
    arguments.add_argument("shapes", nargs="*", choices=[[], *SHAPES], default=[])
    arguments.add_argument("--model", default="builtin:mini-qwen2-moe")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--samples", type=int, default=24)
    arguments.add_argument("--tokens", type=int, default=1536)
    arguments.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5])
    arguments.add_argument("--routed", nargs="+", type=float, default=[256, 1024])
    arguments.add_argument("--seeds", type=int, default=3)
    given = arguments.parse_args()
    if given.what == "planned":
        planned(given.shapes)
    elif given.what == "counted":
        counted()
    else:
        quality(given)


if __name__ == "__main__":
    main()
