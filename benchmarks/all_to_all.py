"""The all-to-all traffic of expert parallelism: counted before and after dropping experts, MoE sub-layers and decoder layers, and really sent.

    python benchmarks/all_to_all.py count --model builtin:mini-mixtral --text A.jsonl B.jsonl
    python benchmarks/all_to_all.py send --model builtin:mini-mixtral --text A.jsonl --processes 4

`count` compresses by each recipe of the holistic study (arXiv 2406.02500), a quarter each, and prints what `trimoe eval` counts (walk/expert_parallel.py).
`send` routes tokens through one layer, spreads them over processes and sends their hidden states there and back by
torch.distributed.all_to_all_single over gloo. A token's home is any process in turn, so that over all turns the bytes sent are what is counted.

Letters: T tokens, k experts a token, W processes, H hidden size.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import trimoe
from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton
from trimoe.walk.expert_parallel import ITEMSIZE, LayerTraffic, rank_of_expert

STEPS: dict[str, dict[str, Any]] = {
    "expert drop": {"expert_drop": {"ratio": 0.25, "score": "gate", "counts": "uniform"}},
    "layer drop": {"layer_drop": {"ratio": 0.25}},
    "block drop": {"block_drop": {"ratio": 0.25}},
}
ROUNDS = 20  # of each home, timed


def count(model: str, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, step in {"original": None, **STEPS}.items():
            out = model
            if step is not None:
                trimoe.compress(model, {"steps": [step]}, Path(folder) / name, samples=48, length=256)
                out = str(Path(folder) / name)
            ways = trimoe.evaluate(out, text=texts, length=256, tokens=tokens)["traffic"]["ways"]
            for number, of_models in ways.items():
                found = of_models["model"]
                row = {"what": name, "ways": int(number)}
                if found is not None:
                    row |= {"bytes_per_token": found["bytes_per_token"], **found["imbalance"]}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


@torch.no_grad()
def routed(model: str, texts: list[str], tokens: int) -> tuple[torch.Tensor, int, int]:
    """(experts chosen [T, k], number of experts, hidden size) of the middle MoE layer."""
    from trimoe.text.samples import calibrate

    skeleton = Skeleton.of(model)
    site = list(skeleton.sites.values())[len(skeleton.sites) // 2]
    found = trimoe.load(model)
    text = calibrate(
        skeleton.checkpoint, texts, samples=tokens // 256, length=256, context=skeleton.context,
        vocabulary=skeleton.config.get_text_config().vocab_size, seed=0,
    )  # fmt: skip
    seen: list[torch.Tensor] = []
    layer = transformers5.decoder_layers(found)[1][site.layer]
    site.router_of(layer).register_forward_hook(lambda module, args, output: seen.append(output[2].reshape(-1, output[2].shape[-1])))
    for row in text.samples_NL:
        found(row[None])
    return torch.cat(seen), site.num_experts, site.hidden


def exchange(rank: int, ways: int, port: int, index_TK: torch.Tensor, experts: int, hidden: int, answers: Any) -> None:
    """One process: for every home, dispatch and combine its tokens, and put down (bytes sent to others, seconds)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ways)
    rank_E = rank_of_expert(experts, ways)
    needs_TW = torch.zeros(len(index_TK), ways, dtype=torch.bool).scatter_(1, rank_E[index_TK], True)
    x_TH = torch.randn(len(index_TK), hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    sent, seconds = 0, []
    for turn in range(ways):
        home_T = (torch.arange(len(index_TK)) + turn) % ways
        split = [(home_T == one).nonzero()[:, 0] for one in range(ways)]
        goes = [split[rank][needs_TW[split[rank], other]] for other in range(ways)]  # a token goes once, and not to its own process
        goes[rank] = goes[rank][:0]
        comes = [split[other][needs_TW[split[other], rank]] if other != rank else split[0][:0] for other in range(ways)]
        give, take = [len(part) for part in goes], [len(part) for part in comes]
        out_SH, in_SH = x_TH[torch.cat(goes)], torch.empty(sum(take), hidden, dtype=torch.bfloat16)
        back_SH = torch.empty_like(out_SH)
        for _ in range(ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_to_all_single(in_SH, out_SH, take, give)
            dist.all_to_all_single(back_SH, in_SH, give, take)
            seconds.append(time.perf_counter() - start)
        assert torch.equal(in_SH, x_TH[torch.cat(comes)]) and torch.equal(back_SH, out_SH), "what came is not what was sent"
        sent += (out_SH.numel() + in_SH.numel()) * ITEMSIZE  # there, and what this process answers
    answers.put((rank, sent, sorted(seconds)[len(seconds) // 2]))
    dist.barrier()
    dist.destroy_process_group()


def send(model: str, texts: list[str], tokens: int, ways: int) -> dict[str, Any]:
    index_TK, experts, hidden = routed(model, texts, tokens)
    counted = LayerTraffic.empty(experts, hidden, index_TK.shape[1], torch.device("cpu"))
    counted.add(index_TK, torch.ones(len(index_TK), dtype=torch.bool))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=exchange, args=(rank, ways, port, index_TK, experts, hidden, answers)) for rank in range(ways)
    ]  # fmt: skip
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    sent = sum(entry[1] for entry in found)
    exact = 2 * (ways - 1) * int(counted.distinct[ways]) * hidden * ITEMSIZE
    said = ways * len(index_TK) * counted.report(ways)["bytes_per_token"]
    assert sent == exact and abs(said / exact - 1) < 1e-12, (sent, exact, said)
    seconds = max(entry[2] for entry in found)
    return {
        "processes": ways, "tokens": len(index_TK), "bytes_sent": sent // ways, "bytes_per_token": counted.report(ways)["bytes_per_token"],
        "imbalance": counted.report(ways)["imbalance"], "milliseconds": 1e3 * seconds, "gigabytes_per_second": sent / ways / seconds / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "send"))
    parser.add_argument("--model", default="builtin:mini-mixtral")
    parser.add_argument("--text", nargs="+", default=["builtin:mixed"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.what == "count":
        count(given.model, given.text, given.tokens)
    else:
        print(json.dumps(send(given.model, given.text, given.tokens, given.processes), indent=1))


if __name__ == "__main__":
    main()
