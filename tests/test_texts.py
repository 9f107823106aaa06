"""Text as people have it: files of every kind, conversations, data sets by name; and how it becomes samples."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers

import trimoe
from trimoe import UserError
from trimoe.checkpoint.folder import Checkpoint
from trimoe.evaluate.texts import windows
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET
from trimoe.recipe.recipe import parse
from trimoe.text.data_set import Named, several
from trimoe.text.documents import START, Conversation, unmarked
from trimoe.text.samples import Text, calibrate, check_here, drawn, encode, is_here, most_tokens, opening, read_text
from trimoe.walk.walk import LayerWalk

Family = Callable[[str], Path]
HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "and you", "reasoning_content": "polite"}]
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}{% endfor %}"
)


def lines(path: Path, rows: list[Any], encoding: str = "utf-8") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding=encoding)
    return path


def read(source: Any) -> list[Any]:
    (text,) = read_text(str(source))
    return list(text.documents)


# ---- files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, tmp_path: Path) -> None:
    assert read(lines(tmp_path / "a.jsonl", [{"text": "fün"}, {"text": "b"}], encoding)) == ["fün", "b"]
    (tmp_path / "a.txt").write_text("fün", encoding=encoding)
    assert read(tmp_path / "a.txt") == ["fün"]


def test_rows_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": "one", "n": 1}, {"text": "two, too", "n": 2}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    lines(tmp_path / "c.json", rows)
    (tmp_path / "d.csv").write_text('text,n\none,1\n"two, too",2\n')
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.json", "b.json", "c.json", "d.csv", "e.jsonl.gz"):
        assert read(tmp_path / name) == ["one", "two, too"], name
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    assert read(tmp_path / "f.parquet") == ["one", "two, too"]
    assert read_text(str(tmp_path / "e.jsonl.gz"))[0].domain == "e"
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    assert read(tmp_path / "one.json") == ["one"]


def test_files_that_cannot_be_read_say_what_they_hold(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [{"content": "x", "id": 1}])
    with pytest.raises(UserError, match=r"line 1 is not a JSON object .*its fields: content, id.*messages.*FILE.jsonl#content"):
        read(tmp_path / "a.jsonl")
    assert read(f"{tmp_path / 'a.jsonl'}#content") == ["x"]
    with pytest.raises(UserError, match=r"has no field 'body'; its fields are: content, id"):
        read(f"{tmp_path / 'a.jsonl'}#body")
    with pytest.raises(UserError, match="'id' holds neither text nor messages"):
        read(f"{tmp_path / 'a.jsonl'}#id")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="is plain text and has no field 'x'"):
        read(f"{tmp_path / 'a.txt'}#x")
    for name, said in (("a.parquet", "does not read as parquet"), ("a.jsonl.gz", "cannot be unpacked"), ("b.json", "nor a JSON array")):
        (tmp_path / name).write_text("{ no")
        with pytest.raises(UserError, match=said):
            read(tmp_path / name)
    with pytest.raises(UserError, match="There is no text file"):
        read(tmp_path / "absent.parquet")


# ---- conversations


ALPACA = {"instruction": "do", "input": "this", "output": "done"}
ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "messages": ({"messages": HELLO}, HELLO),
    "conversations": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "and you"}], "system": "be kind"},
        [{"role": "system", "content": "be kind"}, *({"role": m["role"], "content": m["content"]} for m in HELLO)],
    ),
    "nulls": ({"messages": [{**HELLO[0], "tool_calls": None}, HELLO[1]], "text": None}, HELLO),
    "instruction": (ALPACA, [{"role": "user", "content": "do\n\nthis"}, {"role": "assistant", "content": "done"}]),
    "prompt": ({"prompt": "a", "completion": "b"}, "ab"),
    "chosen": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "ab"),
    "whole": ({"prompt": "hello", "chosen": HELLO, "rejected": []}, HELLO),
    "parts": ({"prompt": HELLO[:1], "completion": HELLO[1:]}, HELLO),
    "text": ({"text": "t", "messages": HELLO}, "t"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows_become_conversations(kind: str, tmp_path: Path) -> None:
    row, wanted = ROWS[kind]
    (found,) = read(lines(tmp_path / "a.jsonl", [row]))
    assert (found if isinstance(found, str) else [dict(message) for message in found.messages]) == wanted


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    """With tools and reasoning, exactly as transformers renders them; without a template their words alone."""
    tools = [{"name": "look"}]
    path = lines(tmp_path / "a.jsonl", [{"messages": HELLO, "tools": tools}, {"messages": HELLO, "tools": json.dumps(tools)}])
    (text,) = read_text(str(path))
    tokenizer = families.tokenizer()
    plain, _ = encode(tokenizer, text, 96)
    assert tokenizer.decode(plain).replace(" ", "") == "hello<pad><pad>andyou"  # this one knows no line break
    tokenizer.chat_template = TEMPLATE
    rendered = tokenizer.apply_chat_template(HELLO, tools=tools, tokenize=False)
    assert rendered == "[look]<user>hello<assistant>(polite)and you"
    for row in encode(tokenizer, text, 96):
        assert row.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"does not take a conversation of user, assistant \(roles must alternate\)"):
        encode(tokenizer, text, 96)


def test_conversations_without_a_template_are_said(source: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", [{"messages": HELLO}] * 20)
    options: dict[str, Any] = dict(samples=2, length=8, context=64, vocabulary=96, seed=0)
    made = calibrate(Checkpoint.open(source), [str(path)], **options)
    assert made.notes == ("The tokenizer has no chat template: conversations (chat) are read as plain text, without who says what.",)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    other = calibrate(Checkpoint.open(source), [str(path)], **options)
    assert other.notes == () and other.fingerprint != made.fingerprint


# ---- data sets by name


def test_names_taken_apart() -> None:
    assert Named.of("allenai/c4:en/train#text") == Named("allenai/c4", "en", "train", "text")
    assert Named.of("a/b[code](train):64") == Named("a/b", "code", "train", None, 64)
    assert Named.of("a/b:test") == Named("a/b", None, "test") and Named.of("a/b:64") == Named("a/b", samples=64)
    assert Named.of("a/b#content:7") == Named("a/b", None, None, "content", 7)
    for wrong in ("a/b[", "a/b[x](y", "a/b(x):y", "a/b[x]:y/z", "a/b:0", "a/b:x/"):
        assert Named.of(wrong) is None, wrong
    assert several("a/b[x]:4,c/d:8") == ["a/b[x]:4", "c/d:8"] and several("no,such.txt") == ["no,such.txt"]
    assert drawn(["a/b[x]:4,c/d:8"], 128) == 12 and drawn(["a/b:4", "c/d"], 128) == 128 and drawn(["builtin:mixed"], 1) == 3
    with pytest.raises(UserError, match=r"a data set is written NAME:CONFIG/SPLIT#COLUMN or NAME\[CONFIG\]\(SPLIT\):SAMPLES"):
        read_text("a/b[x](y")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two configurations, as the hub has them; `en` has 4 files of 2,000 rows."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("sets") / "web"
    for name, part, count in [("en", "train", 4), ("en", "test", 1), ("de", "train", 1)]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rows = [{"text": f"{name} {part} {number} {row}", "url": "u"} for row in range(2000)]
            lines(folder / name / f"{part}-{number}.jsonl", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: en\n  data_files: [{split: train, path: en/train-*}, {split: test, path: en/test-*}]\n"
        "- config_name: de\n  data_files: [{split: train, path: de/train-*}]\n---\n"
    )
    return folder


def test_a_data_set_is_read_in_an_order_that_the_seed_draws(named: Path) -> None:
    (text,) = read_text(f"{named}:en/train", tokens=1000, seed=0)
    assert text.domain == "web-en" and 16_000 <= sum(map(len, text.documents)) < 16_100
    files = [str(document).split()[2] for document in text.documents]
    assert set(files) == set("0123"), "rows of every file"
    assert text == read_text(f"{named}[en](train)#text", tokens=1000, seed=0)[0]
    assert text != read_text(f"{named}:en/train", tokens=1000, seed=1)[0]
    assert all(str(one).startswith("en test") for one in read_text(f"{named}[en]", "eval", tokens=10)[0].documents)
    assert read_text(f"my={named}[de]#url:5", tokens=1)[0] == Text("my", ("u",) * 16, 5)


def test_a_data_set_that_is_named_wrongly(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for written, said in {
        str(named): "needs a configuration; write .*:CONFIG/SPLIT with one of: (de, en|en, de)",
        f"{named}:en": "no split 'en', which is one of its configurations; write .*:en/SPLIT",
        f"{named}[fr]": "has no configuration 'fr'; it has: (de, en|en, de)",
        f"{named}:en/validation": "has no split 'validation'; it has: train, test",
        f"{named}:en/train#body": "has no column 'body'; it has: text, url",
    }.items():
        with pytest.raises(UserError, match=said):
            read_text(written)
        with pytest.raises(UserError, match=said):
            check_here(written)
    assert is_here(f"{named}:en/train") and not is_here("allenai/c4:en/train") and is_here("no/such.jsonl")
    assert most_tokens([f"{named}:en/train"], 4, 32) == 128
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="There is no file 'no-such-owner/no-such-set'"):
        read_text("no-such-owner/no-such-set:en/train")


def test_compress_draws_what_names_ask_for(named: Path, source: Path, tmp_path: Path) -> None:
    recipe = {"steps": [{"expert_drop": {"ratio": 0.25, "score": "gate", "counts": "uniform"}}]}
    both = f"{named}[en](train):3,de={named}:de/train:2"
    trimoe.compress(source, recipe, tmp_path / "out", calibration=both, length=16)
    said = json.loads((tmp_path / "out" / "trimoe.json").read_text())["calibration"]
    assert said == {"samples": 5, "length": 16, "domains": ["de", "web-en"], "domain_samples": {"de": 2, "web-en": 3}}


# ---- samples


def opens(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """The tests' tokenizer, which now begins every text with <s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = families.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_samples_begin_as_the_tokenizer_begins_a_text(source: Path, tmp_path: Path) -> None:
    """Against a slow loop: every document opened and ended, cut into windows that begin with the opening, which no text token is lost to."""
    tokenizer, length, documents = opens(source), 8, ["abcdef", "ghi", "jklmnopqrstuvwxyz"]
    path = lines(tmp_path / "a.jsonl", [{"text": one} for one in documents])
    assert opening(tokenizer) == (1,) and opening(families.tokenizer()) == ()
    made = calibrate(Checkpoint.open(source), [str(path)], samples=9, length=length, context=64, vocabulary=96, seed=0)
    stream = [token for one in documents for token in (*tokenizer(one)["input_ids"], 2)]
    wanted, place = [], 0
    while True:
        row = stream[place : place + length] if stream[place : place + 1] == [1] else [1, *stream[place : place + length - 1]]
        if len(row) < length:
            break
        wanted.append(tuple(row))
        place += length if stream[place] == 1 else length - 1
    assert set(map(tuple, made.samples_NL.tolist())) == set(wanted) and len(wanted) == len(made.samples_NL)


def test_evaluated_windows_begin_so_too_and_score_the_same_tokens(source: Path, tmp_path: Path) -> None:
    """Perplexity against transformers' own logits: the opening is seen by every window and never scored."""
    tokenizer = opens(source)
    path = lines(tmp_path / "a.jsonl", [{"text": "the quick brown fox"}, {"text": "jumps over"}])
    rows = encode(tokenizer, read_text(str(path))[0], 96)
    bare, opened = windows("a", rows, 8, 4, 100), windows("a", rows, 8, 4, 100, (1,))
    scored = [[part.ids_NL.roll(-1, 1)[part.scored_NL].tolist() for part in (bare, opened)]]
    assert scored[0][0] == scored[0][1] and bool((opened.ids_NL[:, 0] == 1).all()) and not bool(opened.scored_NL[:, 0].any())
    report = trimoe.evaluate(source, text=[str(path)], length=64)
    assert report["length"] == 63, "the opening takes a place of the context"
    model, nll = trimoe.load(source, dtype=torch.float32), []
    for row in rows:
        ids = torch.cat([torch.tensor([1]), row])
        log = model(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        nll += [-float(log[place, ids[place + 1]].detach()) for place in range(1, len(ids) - 1)]
    assert report["texts"][0]["tokens"] == len(nll)
    assert report["texts"][0]["perplexity"] == pytest.approx(float(torch.tensor(nll).mean().exp()), rel=1e-4)


def test_every_domain_has_a_sample(source: Path, text_file: Path, tmp_path: Path) -> None:
    texts = [f"{name}={text_file}" for name in "abc"]
    options: dict[str, Any] = dict(length=16, context=64, vocabulary=96, seed=0)
    assert calibrate(Checkpoint.open(source), texts, samples=1, **options).counts == {"a": 1, "b": 1, "c": 1}
    assert calibrate(Checkpoint.open(source), texts, samples=7, **options).counts == {"a": 3, "b": 2, "c": 2}
    mixed = [f"a={text_file}:5", *texts[1:]]
    assert calibrate(Checkpoint.open(source), mixed, samples=9, **options).counts == {"a": 5, "b": 2, "c": 2}
    assert calibrate(Checkpoint.open(source), mixed, samples=2, **options).counts == {"a": 5, "b": 1, "c": 1}


# ---- documents kept apart


def test_marks_say_where_documents_begin() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 2]])
    marked = ids.clone()
    marked[0, 2] += START
    plain, positions = unmarked(marked)
    assert torch.equal(plain, ids) and positions is not None and positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert unmarked(ids)[1] is None


APART = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "phimoe", "hunyuan_v1_moe", "sliding"]


@pytest.mark.parametrize("family", APART)
def test_a_document_apart_is_as_if_alone(family: str, family_folder: Family, tmp_path: Path) -> None:
    folder = tmp_path if family == "sliding" else family_folder(family)
    if family == "sliding":
        families.save("mixtral", folder, sliding_window=5)
    skeleton = Skeleton.of(str(folder))
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    marked, cuts = ids.clone(), [[0, 7, 15], [0, 11]]
    for row, places in enumerate(cuts):
        marked[row, places] += START
    walk = LayerWalk(skeleton, [marked])
    walk.run("Together", QUIET)
    for row, places in enumerate(cuts):
        for start, end in zip(places, [*places[1:], 24], strict=True):
            alone = LayerWalk(skeleton, [ids[row : row + 1, start:end]])
            alone.run("Alone", QUIET)
            torch.testing.assert_close(walk.hidden[0][row, start:end], alone.hidden[0][0], rtol=1e-4, atol=1e-4)


def test_packing_is_a_choice(family_folder: Family, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "abcdefghij"[: 3 + n % 7]} for n in range(60)])
    steps = {"steps": [{"expert_drop": {"ratio": 0.25, "score": "gate", "counts": "uniform"}}]}
    options: dict[str, Any] = dict(calibration=str(path), samples=6, length=16, changes="calibration.packing=separate")
    trimoe.compress(family_folder("mixtral"), steps, tmp_path / "out", **options)
    for family in ("qwen3_next", "minimax", "jamba"):
        with pytest.raises(UserError, match=r"packing: separate is not possible with .*: layer 0 takes no mask that keeps documents apart"):
            trimoe.compress(family_folder(family), steps, tmp_path / family, **options)
        assert not (tmp_path / family).exists()


# ---- recipes that read no text


WITHOUT: dict[str, Any] = {
    "int8": {"quantize": {"bits": 8, "method": "round", "group": 8}},
    "magnitude": {"weight_prune": {"score": "magnitude", "ratio": 0.5}},
    "plain": {"low_rank": {"ratio": 0.3, "rank": "uniform", "whiten": "none"}},
    "random": {"expert_drop": {"ratio": 0.25, "score": "random", "counts": "uniform", "protect_super_experts": False}},
    "weights": {"expert_drop": {"ratio": 0.25, "score": "weights", "counts": "global", "protect_super_experts": False}},
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_recipe_that_reads_no_text_needs_no_tokenizer(name: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    """And gives what it gives beside one."""
    recipe = {"steps": [WITHOUT[name]]}
    assert not parse(recipe, "the recipe").reads_text
    trimoe.compress(source, recipe, tmp_path / "with", calibration=str(text_file), length=32)
    for path in source.glob("tokenizer*"):
        path.unlink()
    trimoe.plan(str(source), recipe)
    made = trimoe.compress(source, recipe, tmp_path / "out", calibration=str(text_file), length=32)
    assert made.plan.after.file_bytes == made.plan.bytes
    for path in (tmp_path / "with").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert "Calibration: none, no step reads text" in (tmp_path / "out" / "README.md").read_text()


def test_where_a_tokenizer_is_needed_it_is_said(source: Path, tmp_path: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()
    protected = {"steps": [{"expert_drop": {"ratio": 0.25, "score": "random", "counts": "uniform"}}]}
    with pytest.raises(
        UserError, match=r"has no tokenizer: none of a tokenizer's files .* with protect_super_experts: false none is needed"
    ):
        trimoe.compress(source, protected, tmp_path / "out")
    with pytest.raises(UserError, match=r"has no tokenizer: none of a tokenizer's files is in the folder.$"):
        trimoe.compress(source, "naee", tmp_path / "out")
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}))
    with pytest.raises(UserError, match=r"has (no tokenizer that transformers can load|a tokenizer that is Python code of its own)"):
        trimoe.evaluate(source)
    assert not (tmp_path / "out").exists()


def test_a_conversation_has_the_length_of_its_words() -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "image"}, {"type": "text", "text": "c"}]
    said = Conversation(({"role": "user", "content": parts}, {"role": "assistant", "content": ""}))
    assert len(said) == 4 and said.plain() == "ab\nc"
