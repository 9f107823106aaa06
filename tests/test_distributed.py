"""Several processes: what they write is what one process writes; a process that dies; refusals."""

from __future__ import annotations

import json
import random
import shutil
import string
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from refusals import snapshot
from safetensors.torch import load_file

import trimoe
from trimoe.calibration.statistics import Stats
from trimoe.methods.low_rank.low_rank import LowRank
from trimoe.model.decision import LayerDecision
from trimoe.model.skeleton import Skeleton
from trimoe.team import ALONE, Team
from trimoe.text.samples import in_batches
from trimoe.walk.expert_inputs import LayerInputs
from trimoe.walk.expert_shards import narrowed, share

Family = Callable[[str], Path]
LENGTH, SAMPLES = 64, 150  # 5 batches of 2,048 tokens, the last a short one: no even share for 2 or 4 processes
RECIPES: dict[str, list[dict[str, Any]]] = {
    "drop": [{"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "genetic", "receptive_field": {"k": 2, "t": 2}}}],
    "low_rank": [{"expert_drop": {"ratio": 0.25, "search": "greedy"}}, {"low_rank": {"ratio": 0.3, "rank": "optimal"}}],
    "merged": [{"low_rank": {"ratio": 0.3, "form": "dense"}}, {"quantize": {"bits": 8, "group": 8, "method": "awq"}}],
    "gptq": [{"quantize": {"bits": 4, "group": 8}}],
    "prune": [{"weight_prune": {"ratio": 0.5, "score": "sparsegpt", "scope": "all-linear"}}],
    "prune_rows": [{"weight_prune": {"ratio": 0.5}}],
    "prune_layer": [{"weight_prune": {"ratio": 0.5, "compare": "layer"}}],
    "depth": [{"layer_drop": {"count": 1, "rerank": "kl"}}],
    "weights": [  # reads no text: in no number of processes
        {"expert_drop": {"ratio": 0.25, "score": "weights", "counts": "global", "protect_super_experts": False}},
        {"quantize": {"bits": 8, "method": "round", "group": 8}},
    ],
    "plain": [{"low_rank": {"ratio": 0.3, "rank": "uniform", "whiten": "none"}}],
    "magnitude": [{"weight_prune": {"score": "magnitude", "ratio": 0.5, "scope": "all-linear"}}],
}
# Moments of matrices outside the experts are added up in float32, by process: the order is not that of one process.
CLOSE = {"prune": 1e-4}

JOB = """
import json, os, sys
import trimoe
source, text, out, recipes, options = json.loads(sys.argv[1])
import trimoe.output.layout
if os.environ.get("SHARDS"):
    trimoe.output.layout.MAX_SHARD = 1
if os.environ.get("DIES"):
    from trimoe.output import last_walk
    whole = last_walk._fitted
    def dies(run, writer, index, *rest):
        if index == 2 and run.team.rank == 1:
            os._exit(17)
        return whole(run, writer, index, *rest)
    last_walk._fitted = dies
for name, steps in recipes.items():
    made = trimoe.compress(source, {"steps": steps}, f"{out}/{name}", calibration=[text], command="test", **options)
if not os.environ.get("SHARDS"):
    trimoe.gather_statistics(source, f"{out}/stats", calibration=[text], **options)
"""


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("letters") / "letters.txt"
    path.write_text("".join(generator.choice(string.ascii_lowercase + "    ,.") for _ in range(12_000)), encoding="utf-8")
    return path


def well(ran: list[subprocess.CompletedProcess[str]]) -> None:
    """All ended well."""
    assert not any(process.returncode for process in ran), [process.stderr[-3000:] for process in ran]


def sentences(ran: list[subprocess.CompletedProcess[str]]) -> list[str]:
    return [line for process in ran for line in process.stderr.splitlines() if line.startswith("trimoe: ")]


def job(folder: Path, *arguments: Any) -> list[str | Path]:
    path = folder / "job.py"
    path.write_text(JOB, encoding="utf-8")
    return [path, json.dumps(arguments, default=str)]


def alone(source: Path, text: Path, out: Path, recipes: dict[str, Any]) -> None:
    for name, steps in recipes.items():
        trimoe.compress(source, {"steps": steps}, out / name, calibration=[str(text)], samples=SAMPLES, length=LENGTH, command="test")


def test_the_batches_of_these_tests_are_uneven() -> None:
    sizes = [len(batch) for batch in in_batches(torch.zeros(SAMPLES, LENGTH, dtype=torch.int64), "cpu")]
    assert len(sizes) == 5 and sizes[-1] < sizes[0]


def test_a_team_of_one_hands_back_what_it_is_given() -> None:
    assert (ALONE.main, ALONE.place("cuda"), ALONE.span(7)) == (True, "cuda", slice(0, 7))
    assert ALONE.from_main(lambda: 3) == ALONE.after_main(lambda: 3) == 3
    assert ALONE.everyone(4) == [4] and ALONE.shared([1, 2, 3], lambda n: n * n) == [1, 4, 9]
    assert ALONE.fold([1, 2, 3], lambda a, b: 2 * a + b) == 11


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_spans_cover_everything_once(count: int) -> None:
    team = Team()
    team.count = count
    for length in (0, 1, 5, 8, 128):
        taken = [list(range(length))[team.span(length, rank)] for rank in range(count)]
        assert [item for part in taken for item in part] == list(range(length))
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_changes_of_a_share_are_changes_of_the_layer(family_folder: Family) -> None:
    skeleton = Skeleton.of(str(family_folder("gpt_oss")))
    site = skeleton.sites[0]
    experts = site.experts_of(skeleton.layers[0]).to_empty(device="cpu")
    part = narrowed(experts, slice(2, 5), site.num_experts)
    assert part.num_experts == 3 and len(part.down_proj) == len(part.down_proj_bias) == 3 and experts.num_experts == 8
    with torch.no_grad():
        experts.down_proj.zero_()
        part.down_proj.fill_(1)
    assert experts.down_proj.flatten(1).mean(1).tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_a_share_of_a_team_of_one_is_the_layer_itself(family_folder: Family) -> None:
    skeleton = Skeleton.of(str(family_folder("mixtral")))
    site = skeleton.sites[0]
    experts = site.experts_of(skeleton.layers[0])
    seen = LayerInputs(torch.zeros(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
    part = share(ALONE, experts, site, seen, 0, 3)
    assert part.experts is experts and part.seen is seen and part.site is site and not part.empty
    decision = LayerDecision(keep=tuple(range(8)), in_ranks=tuple(range(8)), out_ranks=(8,) * 8)
    assert part.decision(decision) == decision
    assert LowRank(ratio=0.5).average(site) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "count", "names"), [("mixtral", 2, list(RECIPES)), ("qwen2_moe", 4, ["drop", "low_rank", "gptq", "prune_rows", "depth"])]
)
def test_the_result_is_that_of_one_process(
    family: str, count: int, names: list[str], family_folder: Family, letters: Path, with_trimoe: Forks, tmp_path: Path
) -> None:
    source, options, recipes = family_folder(family), {"samples": SAMPLES, "length": LENGTH}, {name: RECIPES[name] for name in names}
    before = snapshot(source)
    well(with_trimoe.team(count, *job(tmp_path, source, letters, tmp_path / "many", recipes, options)))
    alone(source, letters, tmp_path / "one", recipes)
    for name in recipes:
        one, many = tmp_path / "one" / name, tmp_path / "many" / name
        assert sorted(path.name for path in many.iterdir()) == sorted(path.name for path in one.iterdir()), name
        records = [json.loads((folder / "trimoe.json").read_text()) for folder in (one, many)]
        assert records[0]["decisions"] == records[1]["decisions"] and records[0]["inputs"] == records[1]["inputs"], name
        if name not in CLOSE:
            assert snapshot(many) == snapshot(one), name  # metrics too
            continue
        for path in one.glob("*.safetensors"):
            other = load_file(many / path.name)
            for key, tensor in load_file(path).items():
                torch.testing.assert_close(other[key], tensor, rtol=0, atol=CLOSE[name], msg=f"{name} {key}")
    trimoe.gather_statistics(source, tmp_path / "one" / "stats", calibration=[str(letters)], **options)
    stats = [Stats.load(tmp_path / folder / "stats") for folder in ("one", "many")]
    for index, layer in stats[0].layers.items():
        assert torch.equal(stats[0].blocks[index], stats[1].blocks[index])
        for name, tensor in {**layer.sums, **layer.search}.items():
            other = stats[1].layers[index]
            assert torch.equal(tensor, {**other.sums, **other.search}[name]), name
    assert snapshot(source) == before


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_any_number_of_processes_resumes(
    family_folder: Family, letters: Path, with_trimoe: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, recipes = family_folder("mixtral"), tmp_path / "many", {"gptq": RECIPES["gptq"]}
    command = job(tmp_path, source, letters, out, recipes, {"samples": SAMPLES, "length": LENGTH})
    ran = with_trimoe.team(2, *command, DIES="1", SHARDS="1")
    assert [process.returncode for process in ran] == [1, 17], ran
    died = snapshot(out / "gptq")
    assert ".trimoe/changed-1.json" in died and ".trimoe/changed-2.json" not in died and "config.json" not in died
    assert any(name.endswith(".safetensors") for name in died), "two layers were written"
    shutil.copytree(out, tmp_path / "again")
    monkeypatch.setattr("trimoe.output.layout.MAX_SHARD", 1)
    alone(source, letters, tmp_path / "one", recipes)
    alone(source, letters, out, recipes)
    assert snapshot(out / "gptq") == snapshot(tmp_path / "one" / "gptq")
    command = job(tmp_path, source, letters, tmp_path / "again", recipes, {"samples": SAMPLES, "length": LENGTH})
    well(with_trimoe.team(3, *command, SHARDS="1"))
    assert snapshot(tmp_path / "again" / "gptq") == snapshot(tmp_path / "one" / "gptq")


TRAINED = """
import json, sys
import trimoe
folder, text, out = sys.argv[1:]
spec = dict(method="experts", stream=False, data=text, samples=24, length=32, batch=4, holdout=0.2, rate=1e-3, steps=1)
made = trimoe.recover(folder, out, spec)
print(json.dumps(made.metrics["factor"]), file=open(out + "." + __import__("os").environ.get("RANK", "alone"), "w"))
"""


@pytest.mark.slow
def test_lambda_of_a_recovery_is_the_same_in_any_number_of_processes(
    family_folder: Family, letters: Path, with_trimoe: Forks, tmp_path: Path
) -> None:
    trimoe.compress(
        family_folder("mixtral"), {"steps": RECIPES["low_rank"]}, tmp_path / "small", calibration=[str(letters)], samples=4, length=32
    )
    script = tmp_path / "train.py"
    script.write_text(TRAINED, encoding="utf-8")
    arguments = [script, tmp_path / "small", letters]
    well(with_trimoe.team(2, *arguments, tmp_path / "two", ACCELERATE_USE_CPU="true"))
    well([with_trimoe.run(*arguments, tmp_path / "one")])
    first, second, alone = (float((tmp_path / name).read_text()) for name in ("two.0", "two.1", "one.alone"))
    assert first == second == pytest.approx(alone, rel=1e-6)


LEFT = """
import os, sys
sys.argv.append("compress")
from trimoe import cli, team as teams
def left(*_, **__):
    with teams.team() as team:
        team.everyone(1)
        if team.rank == 1:
            os._exit(17)
        team.everyone(2)
cli.app = left
cli.main()
"""


@pytest.mark.slow
def test_who_is_left_behind_says_so(with_trimoe: Forks) -> None:
    """Without torchrun, which ends the others itself where it can: between machines it takes a while to hear of it."""
    both = with_trimoe.team(2, "-c", LEFT, "compress")
    assert [process.returncode for process in both] == [1, 17], both
    (said,) = sentences(both)
    assert "process 0 of 2 lost the others" in said and "resumes" in said
    assert "Traceback" not in both[0].stderr


MISTAKEN = """
import os, sys
from trimoe import cli, team as teams
from trimoe.walk import walk as stream
from trimoe.walk.finite import NotFinite
for number, who in enumerate((1, 0, 2)):  # a second and a third group of the same processes
    try:
        with teams.team() as team:
            if team.rank == who:
                raise NotFinite(f"mistake {number}")
            team.fold([team.rank], lambda a, b: a + b)  # each waits for the one before it, then all for the last
    except ValueError as mistake:
        kind = "NotFinite" if team.main else "Elsewhere"
        assert (type(mistake).__name__, str(mistake)) == (kind, f"mistake {number}"), mistake
        assert not isinstance(mistake, ConnectionError)
    else:
        sys.exit(f"{team.rank} went on")
real = stream.LayerWalk.check
def check(walk, index):
    if index == 1 and os.environ["RANK"] == "1":
        raise NotFinite("layer 1 is too much for rank 1.")
    real(walk, index)
stream.LayerWalk.check = check
cli.main()
"""


@pytest.mark.slow
def test_a_mistake_of_any_process_ends_all_in_one_sentence(
    family_folder: Family, letters: Path, with_trimoe: Forks, tmp_path: Path
) -> None:
    """Nobody waits for the one that has ended, the main process says what it met, and the folder is cleared as in one process."""
    script, recipe, out = tmp_path / "script.py", tmp_path / "recipe.yaml", tmp_path / "deep" / "out"
    script.write_text(MISTAKEN, encoding="utf-8")
    recipe.write_text(json.dumps({"steps": RECIPES["drop"]}), encoding="utf-8")
    words = ["compress", family_folder("mixtral"), "-r", recipe, "-o", out, "-c", letters, "--length", LENGTH, "--samples", SAMPLES, "-q"]
    ran = with_trimoe.team(3, script, *words)
    assert [process.returncode for process in ran] == [2, 2, 2], ran
    assert sentences(ran) == ["trimoe: layer 1 is too much for rank 1."]
    assert not any('script.py", line' in process.stderr for process in ran), ran
    assert not out.parent.exists()


@pytest.mark.slow
def test_the_command_line_says_a_mistake_once(family_folder: Family, letters: Path, with_trimoe: Forks, tmp_path: Path) -> None:
    source, out = family_folder("mixtral"), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"steps": RECIPES["drop"]}), encoding="utf-8")
    command = ["-m", "trimoe.cli", "compress", source, "-r", recipe, "-o", out, "-c", letters, "--length", str(LENGTH)]
    ran = with_trimoe.team(2, *command, "--samples", "4")
    assert [process.returncode for process in ran] == [2, 2], ran
    (said,) = sentences(ran)
    assert "1 batch" in said and "2 processes" in said
    assert not out.exists()
    ran = with_trimoe.team(2, *command, "--samples", str(SAMPLES))
    well(ran)
    printed = "".join(process.stdout for process in ran)
    assert printed.count("native checkpoint") + printed.count("stock checkpoint") == 1, printed
    assert "".join(process.stderr for process in ran).count("Statistics: done") == 1, ran
    assert (out / "config.json").is_file()
