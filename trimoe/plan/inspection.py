"""What a checkpoint is, from its configuration and headers alone: structure, bytes by part, what can be done with it and why not."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError
from trimoe.methods import METHODS
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.plan.engines import loading
from trimoe.plan.plan import check, sizes
from trimoe.plan.token_cost import context_of, of_layers


def inspect(model: str) -> dict[str, Any]:
    """The JSON of `trimoe inspect --json`. Architectures that are not supported are described as far as their headers tell, with
    `supported` false and the `reason`; folders that are no model at all raise UserError."""
    checkpoint = Checkpoint.open(model, weights=False)
    about: dict[str, Any] = {
        "model": checkpoint.name, "model_type": checkpoint.config.get("model_type"), "files": len(checkpoint.files()),
        "tensors": len(checkpoint.tensors), "tensor_bytes": checkpoint.nbytes,
        "dtypes": sorted({info.dtype for info in checkpoint.tensors.values()}),
    }  # fmt: skip
    try:
        skeleton = Skeleton(checkpoint)
    except UserError as reason:
        return {**about, "supported": False, "reason": str(reason), "methods": dict.fromkeys(METHODS, f"no: {reason}")}
    return {**about, "supported": True, **_structure(skeleton)}


def _structure(skeleton: Skeleton) -> dict[str, Any]:
    weigh = skeleton.checkpoint.stored_bytes  # what lies in the files: integers of packed matrices, values of those without zeros
    parts = {"routed experts": 0, "routers": 0}
    for index, site in skeleton.sites.items():
        for path in site.expert_axes:
            keys = skeleton.source_keys(f"{skeleton.layer_name(index)}.{site.block}.{path}")
            part = "routed experts" if path in site.expert_paths() else "routers"
            parts[part] += sum(weigh(key) for key in keys)
        prefix = f"{skeleton.layer_name(index)}.{site.block}.{site.experts}."
        factors = (
            [k for name, keys in skeleton.conversion.source_of.items() if name.startswith(prefix) for k in keys] if site.factored else []
        )
        parts["routed experts"] += sum(weigh(key) for key in factors)
    inside = sum(weigh(key) for keys in skeleton.keys_by_layer for key in keys)
    parts["rest of the layers"] = inside - sum(parts.values())
    parts["embeddings, norm, head"] = sum(weigh(key) for key in skeleton.outer_keys)
    ignored = sum(weigh(key) for key in skeleton.ignored_keys)
    if ignored:
        parts["not used by transformers"] = ignored
    first = next(iter(skeleton.sites.values()))
    rule = first.rule
    return {
        "layers": len(skeleton.layers), "moe_layers": list(skeleton.sites), "context": skeleton.context,
        "experts": {str(i): site.num_experts for i, site in skeleton.sites.items()},
        "top_k": rule.top_k, "hidden": first.hidden, "expert_width": first.width,
        "router": {
            "score": rule.score, "renormalise": rule.renormalise, "correction_bias": rule.biased_choice, "groups": rule.groups,
            "topk_group": rule.topk_group, "scale": rule.scale, "fewest_experts": rule.min_experts,
        },
        "bytes": parts, "left_out": skeleton.left_out(), "native": skeleton.spec is not None, **_costs(skeleton), "methods": _methods(skeleton),
    }  # fmt: skip


def _costs(skeleton: Skeleton) -> dict[str, Any]:
    """What a token costs, and what loads the checkpoint as it is."""
    layout = Layout(skeleton, unchanged(skeleton.sites))
    layers, loads_in = of_layers(skeleton, layout), loading(skeleton, layout, native=skeleton.spec is not None)
    kinds = Counter(
        (layer.cache.kind, layer.cache.token_bytes, layer.cache.state_bytes, layer.cache.window) for layer in layers if layer.cache
    )
    cached = [
        {"layers": count, "keeps": kind, "token_bytes": token, "state_bytes": state, "window": window}
        for (kind, token, state, window), count in kinds.items()
    ]
    return {
        "size": sizes(skeleton, layout, layers).__dict__, "flops_context": context_of(skeleton), "cache": cached or None,
        "costs": {str(index): layer.to_json() for index, layer in enumerate(layers)},
        "loads_in": {engine: answer.words for engine, answer in loads_in.items()},
    }  # fmt: skip


def _methods(skeleton: Skeleton) -> dict[str, str]:
    """Which methods apply, and why not, as plan would say it."""
    answers = {}
    for name, method in METHODS.items():
        try:
            check(skeleton, {"steps": [{name: dict(method.mildest)}]})
            answers[name] = "yes"
        except UserError as reason:
            answers[name] = f"no: {reason}"
    return answers


def table(about: dict[str, Any]) -> str:
    """The same for people, without colours."""
    from trimoe.show.plan import of_model
    from trimoe.show.table import rendered

    return rendered(of_model(about))
