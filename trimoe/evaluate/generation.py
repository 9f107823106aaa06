"""A smoke test of what a model writes: perplexity and multiple choice look at one token at a time, and hide models that fall into loops.

Prompts are cut from the evaluated texts and continued greedily and by sampling, with the same seed for every model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil
import torch

from trimoe.evaluate.quiet import quiet
from trimoe.evaluate.texts import Windows
from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton
from trimoe.progress import Reporter
from trimoe.run.load import load
from trimoe.walk.finite import Range
from trimoe.walk.walk import give_back

PROMPTS = 9
PROMPT_TOKENS, NEW_TOKENS = 32, 64  # at most; both are cut to what the context holds
SEED, TEMPERATURE, TOP_P = 0, 0.8, 0.95
SMALL = 2 << 30  # bytes of both models together up to which this is done unasked
LOOP_TOKENS, LOOP_TIMES = 12, 3  # a tail this long that repeats itself this often is a loop
SHOWN = 3


def fits(skeleton: Skeleton, device: str) -> bool:
    """Whether the whole model, dense, takes less than 60 % of the memory that is free."""
    needed = sum(parameter.numel() for parameter in skeleton.model.parameters()) * skeleton.dtype.itemsize
    place = torch.device(device)
    free = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available
    return needed < 0.6 * free


def small(models: Iterable[Skeleton], device: str) -> bool:
    given = list(models)
    return sum(model.checkpoint.nbytes for model in given) <= SMALL and all(fits(model, device) for model in given)


def loops(tokens: Sequence[int]) -> bool:
    """Whether a continuation ends in a cycle: its last LOOP_TOKENS tokens or more are one n-gram, LOOP_TIMES or more in a row."""
    for period in range(1, len(tokens) // LOOP_TIMES + 1):
        tail = tokens[-max(LOOP_TIMES * period, LOOP_TOKENS) :]
        if len(tail) >= LOOP_TOKENS and all(tail[place] == tail[place - period] for place in range(period, len(tail))):
            return True
    return False


def distinct(tokens: Sequence[int]) -> float | None:
    """Share of 3-grams that are different from all others; None for fewer than 3 tokens."""
    grams = [tuple(tokens[place : place + 3]) for place in range(len(tokens) - 2)]
    return len(set(grams)) / len(grams) if grams else None


def prompts(sets: Sequence[Windows], context: int) -> torch.Tensor:
    """Starts of windows [N, tokens], spread over the texts and evenly over each; fewer than PROMPTS where texts are short."""
    tokens = min(PROMPT_TOKENS, context // 2)
    chosen = []
    for entry in sets:
        last_N = entry.scored_NL.shape[1] - entry.scored_NL.flip(1).int().argmax(1)  # one past the last scored position, itself a token
        whole = entry.ids_NL[last_N + 1 >= tokens][:, :tokens]
        each = min(len(whole), -(-PROMPTS // len(sets)))
        chosen += [whole[place * len(whole) // each] for place in range(each)]
    return torch.stack(chosen) if chosen else torch.empty(0, tokens, dtype=torch.int64)


@torch.no_grad()
def smoke(
    models: Mapping[str, Skeleton], sets: Sequence[Windows], tokenizer: Any, *, device: str, reporter: Reporter
) -> dict[str, Any] | None:
    """Shares of continuations that loop or are empty, and of distinct 3-grams, for each model; None where no text is long enough."""
    context = min(model.context for model in models.values())
    ids = prompts(sets, context)
    new = min(NEW_TOKENS, context - ids.shape[1])
    if not len(ids) or new < LOOP_TOKENS:
        return None
    made: dict[str, Any] = {"prompts": len(ids), "prompt_tokens": ids.shape[1], "new_tokens": new, "seed": SEED}
    for name, skeleton in reporter.track(models.items(), "Generate", len(models)):
        with quiet(bars=False):
            model = load(skeleton.checkpoint.folder, device=device, dtype=skeleton.dtype)
        transformers5.plain_outputs(model.config)
        Range(skeleton.name, skeleton.dtype).guard(model)
        written = {how: _continue(model, ids.to(device), new, tokenizer, how) for how in ("greedy", "sampled")}
        del model
        give_back()
        made[name] = _summary([row for rows in written.values() for row in rows], tokenizer)
        made[name] |= {how: _summary(rows, tokenizer) for how, rows in written.items()}
        made[name]["samples"] = [
            {"prompt": tokenizer.decode(ids[place]), **{how: tokenizer.decode(rows[place]) for how, rows in written.items()},
             "loops": loops(written["greedy"][place])}
            for place in _spread(len(ids))
        ]  # fmt: skip
    return made


def _spread(count: int) -> list[int]:
    shown = min(SHOWN, count)
    return [place * count // shown for place in range(shown)]


def _continue(model: Any, ids: torch.Tensor, new: int, tokenizer: Any, how: str) -> list[list[int]]:
    """The new tokens of each prompt, up to where the model ended the text."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends]) - {None} or {tokenizer.eos_token_id} - {None}
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0} if how == "sampled" else {"do_sample": False}
    )
    settings = GenerationConfig(max_new_tokens=new, eos_token_id=sorted(stop) or None, pad_token_id=min(stop, default=0), **sampling)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: next((place for place, token in enumerate(row) if token in stop), len(row))] for row in rows]


def _summary(rows: Sequence[Sequence[int]], tokenizer: Any) -> dict[str, Any]:
    shares = [share for row in rows if (share := distinct(row)) is not None]
    return {
        "loops": sum(map(loops, rows)) / len(rows),
        "empty": sum(not tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows) / len(rows),
        "distinct": sum(shares) / len(shares) if shares else None,
    }  # fmt: skip
