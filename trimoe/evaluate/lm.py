"""Models as lm-eval calls them. Both give the same numbers; imported only where lm-eval is installed.

    InMemory   lm-eval's own HFLM around `trimoe.load`: everything lm-eval can do, for models that fit in memory
    Streamed   over the layer walk: all requests of all tasks are gathered and run through one layer after the other, so that a model larger
               than memory is evaluated by reading it once (or a few times, where there are very many requests)

Letters: B rows of a batch, L its length, P positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from trimoe.errors import UserError
from trimoe.model import transformers5
from trimoe.model.skeleton import LOGITS, Skeleton
from trimoe.progress import Reporter
from trimoe.run.load import load
from trimoe.walk.finite import Range
from trimoe.walk.hidden_states import wider
from trimoe.walk.walk import LayerWalk

BATCH_TOKENS = 4096  # of a batch of the walk
WALK_BYTES = 16 << 30  # of hidden states in one walk; those beyond spill.BUDGET lie in files

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context tokens, continuation tokens


class Counting(TemplateLM):
    """Counts by task the requests that are longer than the context and lose their beginning. `bars`: whether lm-eval may draw its own."""

    cut: Counter[str]
    bars: bool
    max_length: int
    tokenizer: Any

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the beginning token, else the end token, as in HFLM."""
        first = self.marker
        if first is None:
            raise UserError(
                "The model's tokenizer has neither a beginning nor an end token, and the tasks score text that has nothing before it, "
                "which needs one of them; leave those tasks out, or set bos_token in tokenizer_config.json."
            )
        return first

    @property
    def marker(self) -> int | None:
        """The beginning token, else the end token, else None."""
        found: int | None = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return found

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=not self.bars)

    def note(self, requests: Sequence[Request]) -> None:
        for name, (_, context, continuation) in zip(self.asked, requests, strict=False):
            self.cut[name] += len(context) + len(continuation) > self.max_length + 1


class InMemory(Counting, HFLM):
    """HFLM, with trimoe's loader."""

    def __init__(self, skeleton: Skeleton, tokenizer: Any, *, device: str, batch: int, bars: bool):
        packed: dict[str, Any] = {"backend": "dequantize"} if skeleton.checkpoint.scheme is not None else {}  # exactly the stored weights
        model = load(skeleton.checkpoint.folder, device=device, dtype=skeleton.dtype, **packed)
        transformers5.plain_outputs(model.config)
        Range(skeleton.name, skeleton.dtype).guard(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=skeleton.context, softmax_dtype="float32")
        self.cut, self.bars = Counter(), bars

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """HFLM looks whether a string begins with the beginning token already; where there is none, it cannot."""
        asked = True if add_special_tokens is None and self.marker is None else add_special_tokens
        found: list[int] = super().tok_encode(string, asked, left_truncate_len, **options)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "The model's tokenizer has no end token, so tasks that let the model write cannot tell where it ends; leave them out, or set "
                "eos_token in tokenizer_config.json."
            )
        written: list[str] = super().generate_until(requests, disable_tqdm)
        return written

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        self.asked = []  # windows fit the context; nothing is cut
        return super().loglikelihood_rolling(requests, disable_tqdm=not self.bars)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[tuple[float, bool]]:
        self.note(requests)
        return super()._loglikelihood_tokens(list(requests), **options | {"disable_tqdm": not self.bars})


class Streamed(Counting):
    """Log-likelihoods by layer walks. What a continuation scores depends on nothing but its own row, so rows that are equal run once."""

    def __init__(self, skeleton: Skeleton, tokenizer: Any, *, device: str, reporter: Reporter):
        super().__init__()
        self.skeleton, self.tokenizer, self._device, self.reporter = skeleton, tokenizer, torch.device(device), reporter
        self.max_length = skeleton.context
        self.cut, self.bars = Counter(), False

    # ---- tokens, as HFLM makes them

    @property
    def eot_token_id(self) -> int | None:
        found: int | None = self.tokenizer.eos_token_id
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and self.marker is not None and string.startswith(self.tokenizer.decode(self.marker)):
            add_special_tokens = False
        return self.tokenizer.encode(string, **({} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}))

    # ---- requests

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise UserError("Tasks that let a model write cannot be streamed: every new token would read the whole model; use --no-stream.")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        self.asked = []
        windows, owner = [], []
        for number, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((("", ""), context, continuation))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether each of its tokens is the likeliest."""
        self.note(requests)
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            whole = [*context, *continuation]
            rows.setdefault(tuple(whole[-(self.max_length + 1) :][:-1]), []).append(number)
        logprob_R, greedy_R = torch.zeros(len(requests), dtype=torch.float64), torch.ones(len(requests), dtype=torch.bool)
        walks = self._walks(sorted(rows, key=len))
        for count, walk in enumerate(walks, 1):
            label = f"Tasks, {self.skeleton.name}" + (f", part {count} of {len(walks)}" if len(walks) > 1 else "")
            self._run(walk, rows, requests, logprob_R, greedy_R, label)
        return list(zip(logprob_R.tolist(), greedy_R.tolist(), strict=True))

    def _walks(self, rows: list[tuple[int, ...]]) -> list[list[list[tuple[int, ...]]]]:
        """Rows, shortest first, in batches of one length (a walk knows no padding), and batches in walks whose hidden states
        and masks (at most two of float32 for each length) can be held."""
        batches: list[list[tuple[int, ...]]] = []
        for row in rows:
            if not batches or len(batches[-1][0]) != len(row) or (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(row)
        size = self.skeleton.config.get_text_config().hidden_size * self.skeleton.dtype.itemsize
        walks: list[list[list[tuple[int, ...]]]] = []
        held, length = WALK_BYTES, 0
        for batch in batches:
            nbytes = len(batch) * len(batch[0]) * size + (8 * len(batch[0]) ** 2 if len(batch[0]) != length else 0)
            if held + nbytes > WALK_BYTES:
                walks.append([])
                held = 0
            walks[-1].append(batch)
            held, length = held + nbytes, len(batch[0])
        return walks

    @torch.no_grad()
    def _run(
        self, batches: list[list[tuple[int, ...]]], rows: dict[tuple[int, ...], list[int]], requests: Sequence[Request], logprob_R: torch.Tensor,
        greedy_R: torch.Tensor, label: str,
    ) -> None:  # fmt: skip
        walk = LayerWalk(self.skeleton, [torch.tensor(batch) for batch in batches], device=self._device)
        walk.run(label, self.reporter)
        with walk.head() as head:
            for number, batch in enumerate(batches):
                scored = [
                    (place, len(row) - len(continuation) + offset, token, request)
                    for place, row in enumerate(batch) for request in rows[row]
                    for continuation in [requests[request][2][-len(row) :]] for offset, token in enumerate(continuation)
                ]  # fmt: skip
                row_S, position_S, token_S, request_S = torch.tensor(scored).T
                wanted = position_S.unique()
                vocabulary = self.skeleton.config.get_text_config().vocab_size
                for positions in wanted.split(max(1, LOGITS * wider(walk.device) // (len(batch) * vocabulary))):
                    log_BPV = head(walk.hidden[number], number, positions.to(walk.device)).float().log_softmax(-1)
                    here = (position_S >= positions[0]) & (position_S <= positions[-1])
                    at = (row_S[here], torch.searchsorted(positions, position_S[here]))
                    of_here = log_BPV[at[0].to(walk.device), at[1].to(walk.device)]
                    logprob_R.index_add_(
                        0, request_S[here], of_here.gather(-1, token_S[here].to(walk.device).unsqueeze(-1))[:, 0].double().cpu()
                    )
                    wrong = of_here.argmax(-1).cpu() != token_S[here]
                    greedy_R[request_S[here][wrong]] = False
