"""The model on paper: decoder layers, MoE blocks, routers and experts, found by structure. No weight is read.

Which tensors have an expert axis is found by building the architecture twice, with E and with 2E experts, and comparing shapes. What
the router computes is found by running it on random numbers (router.py). Class names and model types are never asked.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trimoe import modeling_trimoe
from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import FOREIGN, UserError, first_line, stop_if_told
from trimoe.model import layer_call, transformers5
from trimoe.model import router as routing
from trimoe.model.moe_block import MoeBlock, keep_experts, tensor_at
from trimoe.model.router import RoutingRule

# Logits that are held at once, several times over, where versions of a model are compared; more where there is memory for them
# (hidden_states.wider).
LOGITS = 1 << 24


class Skeleton:
    """A checkpoint's architecture with its parameters on the meta device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        self.checkpoint, self.dtype = checkpoint, dtype
        self._found: dict[Hashable, Any] = {}
        self.config = transformers5.load_config(checkpoint.folder)
        self.spec = getattr(self.config, modeling_trimoe.KEY, None)
        self._refuse_what_cannot_be_built()
        bare, self.model = self._built()
        self.prefix, self.layers = transformers5.decoder_layers(self.model)
        self.conversion = transformers5.trial_load(bare, checkpoint.tensors, dtype)
        self.ties, self.untied = self._tied()
        self._refuse_what_does_not_fit()
        self.passed_on = self._passed_on()
        self.sites = {site.layer: site for site in self._find_sites()}
        if not self.sites:
            raise UserError(f"{self.name} ({self.config.model_type}) has no MoE layer.")

    @classmethod
    def of(cls, model: str | Checkpoint, dtype: torch.dtype = torch.float32, *, weights: bool = True) -> Skeleton:
        return cls(model if isinstance(model, Checkpoint) else Checkpoint.open(model, weights=weights), dtype)

    # ---- structure

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @cached_property
    def largest_layer(self) -> int:
        """Bytes of the largest decoder layer in the dtype that it is computed in."""
        tensors = self.checkpoint.tensors
        return max(sum(math.prod(tensors[key].shape) for key in keys) for keys in self.keys_by_layer) * self.dtype.itemsize

    @cached_property
    def count_field(self) -> str:
        field = transformers5.canonical(self.config.get_text_config(), transformers5.COUNT_NAMES)
        if field is None:
            raise UserError(f"{self.name} ({self.config.model_type}) is not a Mixture-of-Experts model: its config.json counts no experts.")
        return field

    @property
    def num_experts(self) -> int:
        return getattr(self.config.get_text_config(), self.count_field)

    @property
    def context(self) -> int:
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)

    def layer_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    @cached_property
    def keys_by_layer(self) -> list[list[str]]:
        """Checkpoint keys of each decoder layer that the model uses, in the checkpoint's order."""
        groups: list[list[str]] = [[] for _ in self.layers]
        known = self.model.state_dict().keys()
        for name, keys in self.conversion.source_of.items():
            if name.startswith(self.prefix + ".") and name in known:
                index = name[len(self.prefix) + 1 :].partition(".")[0]
                if index.isdigit() and int(index) < len(groups):
                    groups[int(index)] += keys
        return [sorted(group, key=self._order.__getitem__) for group in groups]

    @cached_property
    def alike(self) -> list[int]:
        """For each decoder layer the first one that is as it is under another number: in its tensors, where they lie, and its MoE block."""
        forms: list[dict[str, Any]] = [{} for _ in self.layers]
        for name, keys in self.conversion.source_of.items():
            place, _, inner = name.removeprefix(self.prefix + ".").partition(".")
            if name.startswith(self.prefix + ".") and place.isdigit() and int(place) < len(forms):
                infos = [self.checkpoint.tensors[key] for key in keys]
                forms[int(place)][inner] = [
                    (numbered(key, place, ""), info.dtype, info.shape) for key, info in zip(keys, infos, strict=True)
                ]
        kinds = [(form, site and replace(site, layer=0)) for form, site in zip(forms, map(self.sites.get, range(len(forms))), strict=True)]
        first: list[int] = []
        found = []
        for index, kind in enumerate(kinds):
            like = next((other for other in first if kinds[other] == kind), index)
            first += [index] if like == index else []
            found.append(like)
        return found

    @cached_property
    def outer_keys(self) -> list[str]:
        """Checkpoint keys outside the decoder layers that the model uses: embeddings, final norm, head."""
        inside = {key for group in self.keys_by_layer for key in group}
        names = set(self.model.state_dict())
        used = {key for name, keys in self.conversion.source_of.items() if name in names for key in keys}
        return [key for key in self.checkpoint.tensors if key in used and key not in inside]

    @cached_property
    def ignored_keys(self) -> list[str]:
        """Tensors that transformers declares it does not use (multi-token prediction layers and the like); they are not carried over."""
        used = {key for group in self.keys_by_layer for key in group} | set(self.outer_keys)
        return [key for key in self.checkpoint.tensors if key not in used]

    @cached_property
    def _order(self) -> dict[str, int]:
        return {key: place for place, key in enumerate(self.checkpoint.tensors)}

    def remembered(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `make()`, made once for this model: what is found by building or running hollow models is not found twice."""
        if what not in self._found:
            self._found[what] = make()
        return self._found[what]

    def source_keys(self, parameter: str) -> list[str]:
        """The checkpoint keys that make one parameter (full name)."""
        return self.conversion.source_of.get(parameter, [])

    def stored_names(self, parameter: str) -> list[str]:
        """The parameters that the checkpoint holds this one's numbers under: itself, those that it is tied with, or both."""
        other = self.ties.get(parameter)
        group = [parameter, *([other] if other else []), *(name for name, source in self.ties.items() if source in (parameter, other))]
        return [name for name in dict.fromkeys(group) if self.source_keys(name)]

    # ---- what is tied

    def _tied(self) -> tuple[dict[str, str], list[str]]:
        """Parameter -> the one that it shares its tensor with, and parameters that the configuration ties though the checkpoint has other
        numbers for them: transformers 5 leaves those apart, and where only the tied one is stored makes the other of it."""
        ties, untied = {}, []
        for target, source in list(self.model.all_tied_weights_keys.items()):
            if not (self.source_keys(target) and self.source_keys(source)):
                swapped = bool(self.source_keys(target))
                ties[source if swapped else target] = target if swapped else source
            elif self._equal(target, source):
                ties[target] = source
            else:
                untied.append(target)
                transformers5.untie(self.model, target)
        return ties, untied

    def _equal(self, a: str, b: str) -> bool:
        """Whether two stored parameters are one tensor in the dtype that is computed in; taken for granted where only headers are here."""
        keys = [*self.source_keys(a), *self.source_keys(b)]
        here = all((self.checkpoint.folder / self.checkpoint.tensors[key].file).is_file() for key in keys)
        if len(keys) != 2 or not here:
            return True
        first, second = (self.checkpoint.read(key).to(self.dtype) for key in keys)
        return torch.equal(first, second)

    def tie(self) -> None:
        """Let tied parameters of the model share their tensors, once those are loaded."""
        for name, source in self.ties.items():
            transformers5.share(self.model, name, source)

    # ---- refusals

    def _built(self) -> tuple[Any, Any]:
        with self._building():
            return transformers5.build_bare(self.config, self.dtype), transformers5.build_meta(self.config, self.dtype)

    def _decoder_layers(self, config: Any) -> nn.ModuleList:
        """The decoder layers that another configuration gives."""
        with self._building():
            return transformers5.decoder_layers(transformers5.build_meta(config, self.dtype))[1]

    @contextmanager
    def _building(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        except Exception as error:  # whatever absurd sizes make the architecture's own code raise
            stop_if_told(error)
            raise UserError(
                f"{self.name}: config.json describes a {self.config.model_type} that cannot be built ({first_line(error)})."
            ) from None

    def _refuse_what_cannot_be_built(self) -> None:
        name, kind = self.name, self.config.model_type
        senses = transformers5.other_senses(self.config)
        if senses:
            raise UserError(
                f"{name} ({kind}) is a multimodal wrapper: beside its language model config.json describes {' and '.join(senses)} (images, "
                "sound or video). Only language models are supported so far; give a checkpoint of the text model alone."
            )
        if transformers5.causal_lm_class(self.config) is None:
            raise UserError(f"{name} ({kind}) is not a decoder-only language model that transformers' AutoModelForCausalLM knows.")
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        if not isinstance(layers, int) or not 1 <= layers <= min(1000, len(self.checkpoint.tensors)):
            raise UserError(f"{name}: config.json says num_hidden_layers = {layers!r}; 1 to 1000 is allowed, no more than tensors.")
        field = transformers5.canonical(self.config.get_text_config(), transformers5.TOP_K_NAMES)
        top_k = getattr(self.config.get_text_config(), field) if field else 1
        if not 1 <= top_k <= self.num_experts:
            raise UserError(
                f"{name}: config.json says {field} = {top_k} of {self.num_experts} experts; 1 to {self.num_experts} is allowed."
            )
        if not 2 <= self.num_experts <= 4096:
            raise UserError(f"{name} is not a Mixture-of-Experts model: {self.count_field} = {self.num_experts} (2 to 4096 is allowed).")

    def _refuse_what_does_not_fit(self) -> None:
        found, kind = self.conversion, self.config.model_type
        if found.mismatched:
            raise UserError(f"{self.name}: a tensor's shape does not fit config.json: {found.mismatched[0]}.")
        number = re.compile(re.escape(self.prefix) + r"\.(\d+)\.")
        missing = found.missing - set(self.ties)
        layers = {name: int(at[1]) for name in (*missing, *found.unexpected) if (at := number.match(name))}
        depth = f"config.json says num_hidden_layers = {len(self.layers)}"
        there = {int(at[1]) for name in found.source_of if (at := number.match(name))}
        empty = sorted({layers[name] for name in missing if name in layers} - there)
        if empty:
            raise UserError(f"{self.name}: {depth}, but there are no tensors of layer {empty[0]} ({len(empty)} such layers).")
        if missing:
            raise UserError(f"{self.name} lacks {sorted(missing)[0]!r} ({len(missing)} such), which a {kind} has.")
        extra = sorted(name for name in found.unexpected if not transformers5.not_needed(name, self.predicting))
        beyond = [name for name in extra if layers.get(name, 0) >= len(self.layers)]
        if beyond:
            raise UserError(f"{self.name}: {depth}, but there are tensors of layer {layers[beyond[0]]} ({beyond[0]!r}).")
        if extra:
            raise UserError(
                f"{self.name} has tensors that the architecture does not use: {extra[0]!r} ({len(extra)} such); config.json describes "
                f"another model, or it is not a {kind}."
            )

    @cached_property
    def predicting(self) -> tuple[str, ...]:
        """Beginnings of the names of multi-token prediction layers that lie behind the decoder layers."""
        number = re.compile(re.escape(self.prefix) + r"\.(\d+)\.")
        marks = {
            int(at[1]) for name in self.conversion.source_of
            if (at := number.match(name)) and re.search(transformers5.PREDICTION, name) and int(at[1]) >= len(self.layers)
        }  # fmt: skip
        counted = transformers5.predicted(self.checkpoint.config) or transformers5.predicted(self.config.get_text_config().to_dict())
        marks |= {len(self.layers) + more for more in range(counted)}
        return tuple(f"{self.prefix}.{index}." for index in sorted(marks))

    def left_out(self) -> list[str]:
        """What of the folder does not go into a result, and why, in sentences."""
        name_of = {key: name for name, keys in self.conversion.source_of.items() for key in keys}
        ahead = [key for key in self.ignored_keys if re.search(transformers5.PREDICTION, key) or name_of[key].startswith(self.predicting)]
        buffers = [key for key in self.ignored_keys if key not in set(ahead) and re.search(transformers5.BUFFERS, key)]
        rest = [key for key in self.ignored_keys if key not in {*ahead, *buffers}]
        kinds = (
            (ahead, "tensors of multi-token prediction, which transformers does not use (speculative decoding with them is lost)"),
            (buffers, "buffers that every model computes anew"),
            (rest, "tensors that transformers does not use"),
        )
        said = [f"left out: {len(keys)} {what}, such as {keys[0]}." for keys, what in kinds if keys]
        files = self.checkpoint.other_weights()
        return said + ([f"left out: other weights beside the model: {', '.join(files[:5])} ({len(files)} in all)."] if files else [])

    def _passed_on(self) -> int:
        """How many results each decoder layer hands to the next beside the hidden states."""
        try:
            return layer_call.passed_on(self.model, self.layers)
        except UserError as reason:
            raise UserError(f"{self.name} ({self.config.model_type}): {reason}; not supported yet.") from None

    # ---- sites

    def _find_sites(self) -> Iterator[MoeBlock]:
        plain = copy.deepcopy(self.config)
        if self.spec:
            delattr(plain, modeling_trimoe.KEY)
        doubled = copy.deepcopy(plain)
        setattr(doubled.get_text_config(), self.count_field, 2 * self.num_experts)
        once = self._decoder_layers(plain) if self.spec else self.layers
        twice = self._decoder_layers(doubled)
        rules: dict[tuple[Any, ...], RoutingRule] = {}
        for index, (layer, bigger) in enumerate(zip(once, twice, strict=True)):
            axes = _grown(layer, bigger)
            if axes and "dropped" not in (self.spec or {}).get("layers", {}).get(str(index), {}):
                yield self._site(index, layer, bigger, axes, rules)

    def _site(
        self, index: int, layer: nn.Module, bigger: nn.Module, axes: dict[str, int], rules: dict[tuple[Any, ...], RoutingRule]
    ) -> MoeBlock:
        where = f"{self.name} ({self.config.model_type}), layer {index}"
        found = [path for path, module in layer.named_modules() if transformers5.is_decorated(module)]
        if len(found) != 1:
            raise UserError(
                f"{where}: its experts are not of the standard form that transformers dispatches (found {len(found)} such modules); "
                "this architecture is not supported yet."
            )
        block_path, _, experts = found[0].rpartition(".")
        block, inside = layer.get_submodule(block_path), block_path + "."
        outside = [path for path in axes if not path.startswith(inside)]
        if not block_path or outside:
            raise UserError(f"{where}: {(outside or [found[0]])[0]} depends on the expert count outside the MoE block; not supported yet.")
        axes = {path.removeprefix(inside): axis for path, axis in axes.items()}
        routers = sorted({p.partition(".")[0] for p in axes if "." in p} - {experts})
        if len(routers) != 1:
            raise UserError(f"{where}: expected one router beside the experts, found {routers or 'none'}; not supported yet.")
        module: Any = block.get_submodule(experts)
        down = module.down_proj
        hidden, width = (down.shape[-1], down.shape[-2]) if module.is_transposed else (down.shape[-2], down.shape[-1])
        first = modeling_trimoe.first_projection(module)
        entry = (self.spec or {}).get("layers", {}).get(str(index), {})
        biases = [p for p in axes if not p.startswith(experts + ".") and tensor_at(block, p).numel() == self.num_experts]
        kind = _router_kind(block.get_submodule(routers[0]))
        counts = tuple(_grown_counts(block, bigger.get_submodule(block_path)))
        parts = dict(
            layer=index, block=block_path, router=routers[0], experts=experts, hidden=hidden, width=width,
            first=first.shape[-1] if module.is_transposed else first.shape[-2], expert_axes=axes, count_attributes=counts,
            bias=biases[0] if biases else None, factored="in_ranks" in entry,
        )  # fmt: skip
        if kind not in rules:
            rules[kind] = self._identify(where, block, MoeBlock(**parts, num_experts=self.num_experts, rule=None))  # type: ignore[arg-type]
        parts["bias"] = parts["bias"] if rules[kind].biased_choice else None
        return MoeBlock(**parts, num_experts=entry.get("num_experts", self.num_experts), rule=rules[kind])  # type: ignore[arg-type]

    @torch.no_grad()
    def _identify(self, where: str, block: nn.Module, site: MoeBlock) -> RoutingRule:
        """Give the real router random weights, run it, and find the formula that does the same (router.identify)."""
        text = self.config.get_text_config()
        hints = {name: float(getattr(text, name, None) or 1) for name in ("n_group", "topk_group")}
        hints["jitter"] = float(getattr(text, "router_jitter_noise", 0.0) or 0.0)
        generator = torch.Generator().manual_seed(0)
        shell = nn.Module()  # the block without its experts: router and block-level correction bias
        router_paths = {path.partition(".")[0] for path in site.router_paths()}
        shell.add_module(site.router, copy.deepcopy(block.get_submodule(site.router)).to_empty(device="cpu").float())
        for path in router_paths - {site.router}:
            shell.register_buffer(path, torch.empty(site.num_experts))
        for tensor in (*shell.parameters(), *shell.buffers()):
            spread = 2.0 / site.hidden**0.5 if tensor.dim() > 1 and min(tensor.shape) > 1 else 0.2
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
        x_TH = torch.randn(96, site.hidden, generator=generator)
        groups, count = max(1, int(hints["n_group"])), site.num_experts
        size, pruned = count // groups, []
        light = MoeBlock(**{**site.__dict__, "expert_axes": {p: site.expert_axes[p] for p in site.router_paths()}, "count_attributes": ()})
        try:
            top_k = _call(shell, light)(x_TH)[2].shape[-1]
            for left in {max(size - 1, 1), max(size * 3 // 4, 2)} - {size}:
                if left * groups < max(top_k, 2 * groups):
                    continue
                chosen = [torch.randperm(size, generator=generator)[:left].sort()[0] + g * size for g in range(groups)]
                keep = tuple(torch.cat(chosen).tolist())
                smaller = copy.deepcopy(shell)
                counts = tuple((p, a) for p, a in site.count_attributes if p.partition(".")[0] == site.router)
                keep_experts(smaller, MoeBlock(**{**light.__dict__, "count_attributes": counts}), keep)
                mask = torch.zeros(count, dtype=torch.bool)
                mask[list(keep)] = True
                pruned.append((mask, _call(smaller, light)))
            bias = tensor_at(shell, site.bias).reshape(-1) if site.bias else None
            rule = routing.identify(_call(shell, light), pruned, x_TH, bias, hints)
        except FOREIGN as error:
            stop_if_told(error)
            raise UserError(f"{where}: its router cannot be run by itself ({first_line(error)}); not supported yet.") from None
        if rule is None:
            raise UserError(f"{where}: none of the known routing rules reproduces what its router computes; not supported yet.")
        return rule


def numbered(key: str, old: str, new: str) -> str | None:
    """`key` with `new` in the place of its first number; None where that number is not `old`."""
    parts = key.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join([*parts[:at], new, *parts[at + 1 :]]) if parts[at : at + 1] == [old] else None


def _router_kind(router: nn.Module) -> tuple[Any, ...]:
    """Routers of one class with the same settings follow the same rule (some families set top-k layer by layer)."""
    settings = {name: value for name, value in vars(router).items() if isinstance(value, (int, float, str)) and "layer" not in name}
    return (type(router), *sorted(settings.items()))


def _call(shell: nn.Module, site: MoeBlock) -> routing.Router:
    """The router as a function of hidden states [T, H]; a correction bias that the block passes in is passed in, and a router that wants
    [batch, T, H] gets a batch of one."""
    router = shell.get_submodule(site.router)
    takes = [p for p in inspect.signature(router.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    needed = sum(p.default is p.empty for p in takes)
    rest: tuple[torch.Tensor, ...] = ()
    if len(takes) > 1 and site.bias and "." not in site.bias:
        rest = (tensor_at(shell, site.bias),)
    if not 1 <= needed <= 1 + len(rest):
        raise TypeError(f"it wants {', '.join(p.name for p in takes)}")
    try:
        router(torch.zeros(2, site.hidden), *rest)
    except (ValueError, IndexError):  # three axes are unpacked
        return lambda x_TH: router(x_TH[None], *rest)
    return lambda x_TH: router(x_TH, *rest)


def _grown(layer: nn.Module, bigger: nn.Module) -> dict[str, int]:
    """Path -> axis of every parameter and persistent buffer that is twice as long in `bigger`."""
    small, large, axes = layer.state_dict(), bigger.state_dict(), {}
    for path, tensor in small.items():
        longer = [axis for axis, (a, b) in enumerate(zip(tensor.shape, large[path].shape, strict=True)) if a != b]
        if longer:
            axes[path] = longer[0]
    return axes


def _grown_counts(block: nn.Module, bigger: nn.Module) -> Iterator[tuple[str, str]]:
    """(module path, attribute) of every plain integer that doubles with the number of experts."""
    others = dict(bigger.named_modules())
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if type(value) is int and value > 0 and vars(others[path]).get(name) == 2 * value:
                yield path, name
