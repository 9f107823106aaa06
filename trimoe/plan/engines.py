"""Which engines load a result, and why the others do not.

Our tests run transformers only. What is said to be "tried" ran on a CPU, on tiny models, beside transformers (log/engines.md); everything
else is what engines' lists of architectures and loaders say: vLLM 0.32.0 (vllm/model_executor/models), SGLang 0.5.23
(python/sglang/srt/models), llama.cpp of November 2026 (conversion/, src/models).
"""

from __future__ import annotations

from trimoe.errors import UserError
from trimoe.model import depth_config
from trimoe.model.decision import Decisions
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.recipe.recipe import Recipe
from trimoe.show.answer import Answer

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")
COMMON = frozenset({
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "phimoe", "granitemoe",
    "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2",
})  # fmt: skip
BACKEND = frozenset({"dots1", "flex_olmo", "hunyuan_v1_moe"})  # vLLM runs them by transformers' own code
KNOWS = {
    "vllm": COMMON | BACKEND | {"jamba", "lfm2_moe"}, "sglang": COMMON, "llama.cpp": COMMON | {"jamba", "dots1", "lfm2_moe"},
}  # fmt: skip
RELEASE = {"vllm": "0.32.0", "sglang": "0.5.23", "llama.cpp": "November 2026"}  # that all this is said of
TRIED = {  # families whose stock results gave the numbers of transformers there
    "vllm": BACKEND | {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "gpt_oss", "granitemoe"}, "sglang": frozenset(),
    "llama.cpp": frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe"}),
}  # fmt: skip
UNTIED = ("qwen2_moe", "olmoe", "phimoe", "gpt_oss", "dots1")  # llama.cpp's loaders of these want a head of its own
KERNEL_GROUPS, KERNEL_HIDDEN = (
    (32, 64, 128),
    128,
)  # what vLLM's Marlin kernels take: inputs a scale (or one a row), and multiples of the hidden size


def loading(skeleton: Skeleton, layout: Layout, *, native: bool) -> dict[str, Answer]:
    """Return the answer of each engine. `native`: the result has, or will have once all is decided, a form that stock code cannot express."""
    decisions = layout.decisions
    packed = skeleton.checkpoint.scheme is not None or any(decision.bits for decision in decisions.values())
    loads = {engine: answer(engine, skeleton, decisions, native=native) for engine in ENGINES[1:]}
    own = ["import trimoe or trust_remote_code=True"] if native else []
    own += ["compressed-tensors installed"] if packed else []
    return {"transformers": Answer("yes", f", with {' and '.join(own)}" if own else "", tried=True), **loads}


def answer(engine: str, skeleton: Skeleton, decisions: Decisions, *, native: bool) -> Answer:
    """Return whether an engine other than transformers loads a result."""
    kind, release = skeleton.config.model_type, f"{'of ' if engine == 'llama.cpp' else ''}{RELEASE[engine]}"
    tied = bool(getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False))
    if native:
        return Answer("no", why_native(skeleton, decisions))
    if kind not in KNOWS[engine]:
        return Answer("unknown", f"{kind} is not in its list ({release})")
    if engine == "llama.cpp" and tied and kind in UNTIED:
        return Answer("no", f"its loader of {kind} wants a head of its own, and this model's is its embedding")
    if any(decision.gone == "moe" for decision in decisions.values()):
        if engine == "llama.cpp":
            return Answer("no", f"its loader of {kind} wants a router in every layer")
        if engine != "vllm":
            return Answer("unknown", "whether it reads mlp_only_layers")
        tried = kind == "qwen2_moe"
    elif by_number(skeleton, decisions):
        return Answer("unknown", "it may take a layer's kind from its number")
    else:
        tried = kind in TRIED[engine]
    scheme = _scheme(skeleton, decisions)
    if scheme is not None:
        return _packed(engine, skeleton, scheme[1], tried)
    how = ", by transformers' own code" if engine == "vllm" and kind in BACKEND else f", as {kind}"
    return Answer("yes", f"{how} ({release}, {_run(tried)})", tried)


def _scheme(skeleton: Skeleton, decisions: Decisions) -> tuple[int, int] | None:
    """(bits, group) of a result with packed integers."""
    found = {(decision.bits, decision.group) for decision in decisions.values() if decision.bits and decision.group}
    return next(iter(found), None) or skeleton.checkpoint.scheme  # type: ignore[return-value]


def _run(tried: bool) -> str:
    return "tried" if tried else "not tried"


def _packed(engine: str, skeleton: Skeleton, group: int, tried: bool) -> Answer:
    """Of a result whose experts are compressed-tensors: reading the files is one thing, a kernel for them another."""
    if engine == "llama.cpp":
        return Answer("yes", f", converted: its converter unpacks the integers ({_run(tried)})", tried)
    if engine == "sglang":
        return Answer("files", f", not tried (compressed-tensors, {RELEASE[engine]})")
    site = next(iter(skeleton.sites.values()))
    unknown = kernels_lack(site.hidden, site.width, group)
    if unknown:
        return Answer("files", f", but without a kernel: {unknown}")
    read = f": its loader reads the files ({RELEASE[engine]}, {_run(tried)})"
    return Answer("files", f"{read}, kernels on a GPU not tried; on CPUs 4 bits want AMX, 8 have none", tried)


def kernels_lack(hidden: int, width: int, group: int) -> str | None:
    """Why vLLM's kernels for packed experts do not take such matrices (read in its source, not run); None where they do."""
    if group not in KERNEL_GROUPS and not group == hidden == width:
        return f"its kernels take groups of 32, 64 and 128 inputs, not {group}"
    if hidden % KERNEL_HIDDEN:
        return f"its kernels take hidden sizes that are multiples of {KERNEL_HIDDEN}, not {hidden}"
    return None


def why_native(skeleton: Skeleton, decisions: Decisions) -> str:
    """What of the result stock code cannot express."""
    left = [decisions[index] for index in skeleton.sites if decisions[index].gone is None]
    if any(decision.bitmask for decision in decisions.values()):
        return "zeros are left out of the files"
    if any(decision.factored for decision in left) or any(site.factored for site in skeleton.sites.values()):
        return "experts are factored"
    if any(decision.gone == "moe" for decision in decisions.values()):
        return "MoE sub-layers are dropped, and this family has no dense layers to stand in"
    return "expert counts differ from layer to layer"


def by_number(skeleton: Skeleton, decisions: Decisions) -> bool:
    """Whether the result has layers of several kinds, or dense ones of zeros, in other places than its family has them: transformers
    reads that from config.json, other engines may go by the layer's number."""
    gone = [decision.gone for decision in decisions.values() if decision.gone]
    kinds = set(depth_config.explicit(skeleton, {}).get("layer_types") or ())
    return "moe" in gone or ("block" in gone and len(kinds) > 1)


def check_target(recipe: Recipe, native: bool, skeleton: Skeleton, decisions: Decisions) -> None:
    """Raises UserError if what the recipe says must load the result cannot."""
    if recipe.target == "transformers":
        return
    if native:
        raise UserError(
            f"The recipe's target is {recipe.target}, but different expert counts per layer, factored experts, zeros left out and, in this "
            "family, dropped MoE sub-layers load in transformers only; use counts: uniform with a ratio that removes equally many everywhere, "
            "form: dense and block_drop, or target: transformers."
        )
    kind = skeleton.config.model_type
    asked = [engine for engine in ENGINES[1:] if kind in KNOWS[engine]] if recipe.target == "any" else [recipe.target]
    for engine in asked:
        found = answer(engine, skeleton, decisions, native=False)
        if by_number(skeleton, decisions) and found.loads == "unknown" and kind in KNOWS[engine]:
            raise UserError(
                f"The recipe's target is {recipe.target}, and {engine} may take a layer's kind from its number, which the dropped layers "
                "change; use expert_drop, or target: transformers."
            )
        if found.loads == "no":
            raise UserError(
                f"The recipe's target is {recipe.target}, and {engine} does not load the result: {found.why}; use another target."
            )
