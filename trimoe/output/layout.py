"""Which tensors the finished checkpoint holds, known to the byte before anything is written.

Experts that stay are copied as they lie on disk, whatever the key format: which disk tensor (or which rows of it) belongs to which
expert is found by sending tensors filled with expert numbers through transformers' own reverse conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from trimoe import modeling_trimoe
from trimoe.checkpoint.headers import DTYPES, header_bytes
from trimoe.checkpoint.packed import PARTS, Packed
from trimoe.errors import UserError
from trimoe.methods.quantize.quantize import QuantizedLayer
from trimoe.model import depth_config, sublayer, transformers5
from trimoe.model.decision import Decisions, LayerDecision, kept_layers
from trimoe.model.moe_block import MoeBlock, tensor_at
from trimoe.model.skeleton import Skeleton, numbered
from trimoe.output import config as configuration
from trimoe.output.tensor_entry import Entry, Group, changed, dense_back, squeezed

MAX_SHARD = 4 << 30  # bytes of tensors in one file, unless a single layer is larger


@dataclass(frozen=True)
class DiskExpert:
    """Where the experts of one parameter lie on disk: `whole[e]` are expert e's own keys; else one key with an expert `axis`."""

    whole: tuple[tuple[str, ...], ...] = ()
    key: str = ""
    axis: int = 0


class Layout:
    """The output of `decisions` on a checkpoint: entries by group (group 0: outside the layers; then one a layer)."""

    def __init__(self, skeleton: Skeleton, decisions: Decisions, *, only: int | None = None):
        """`only`: nothing but this layer's entries is worked out."""
        self.skeleton, self.decisions = skeleton, decisions
        self.guarded = only is None and configuration.native_spec(skeleton, decisions) is not None
        self.place = {index: new for new, index in enumerate(kept_layers(skeleton, decisions))}  # old number -> new number
        self.only, self._made = only, dict[int, Group]()

    @cached_property
    def groups(self) -> list[Group]:
        every = range(len(self.skeleton.layers))
        return [self._copies(self.skeleton.outer_keys), *(self._group(i) if self.only in (None, i) else Group() for i in every)]

    def examined(self) -> Layout:
        """This layout. Raises the UserError that working out any layer would raise, by one layer of each kind."""
        seen: list[tuple[int, LayerDecision | None, bool]] = []
        for index, like in enumerate(self.skeleton.alike):
            if (kind := (like, self.decisions.get(index), self.place.get(index) == index)) not in seen:
                seen.append(kind)
                self._group(index)
        return self

    def _group(self, index: int) -> Group:
        if index not in self._made:
            self._made[index] = self._layer(index)
        return self._made[index]

    # ---- what is in a layer

    def _copies(self, keys: Sequence[str]) -> Group:
        return Group(self._copy(key, key) for key in keys)

    def _copy(self, key: str, source: str) -> Entry:
        """The whole of a source's tensor; one whose zeros are left out is read as rows, for its bytes do not lie in the file as they are."""
        checkpoint = self.skeleton.checkpoint
        info = checkpoint.tensors[source]
        if source in checkpoint.squeezed:
            return Entry(key, info.dtype, info.shape, source, axis=0, keep=tuple(range(info.shape[0])))
        return Entry(key, info.dtype, info.shape, source)

    def _layer(self, index: int) -> Group:
        """A decoder layer's entries under its new number; none if it is dropped."""
        if index not in self.place:
            return Group()
        if self.place[index] == index:
            return self.entries(index)
        return Group(entry._replace(key=self._renumbered(entry.key, index)) for entry in self.entries(index))

    def entries(self, index: int) -> Group:
        """A layer's entries under its old number, with the guard of the native form if that is the result's."""
        guard = (self.skeleton.spec or {}).get("guard", modeling_trimoe.GUARD)
        old = set(self.skeleton.source_keys(f"{self.skeleton.layer_name(index)}.{guard}"))
        rest = self._with_linears(index)
        if old:
            rest = Group(entry for entry in rest if entry.key not in old)
        if not self.guarded:
            return rest
        tensors = self.skeleton.checkpoint.tensors
        kinds = [tensors[key].dtype for key in self.skeleton.keys_by_layer[index]]
        dtype = next(kind for kind in kinds if DTYPES[kind].is_floating_point)
        disk = self._named(index, {modeling_trimoe.GUARD: torch.empty(1, device="meta")})
        return Group([*rest, *(Entry(key, dtype, (1,), zeros=True, stands_for=0) for key in disk)])

    def _with_linears(self, index: int) -> Group:
        entries, decision = self._with_experts(index), self.decisions.get(index)
        if decision is None or not decision.linears:
            return entries
        names = {self.skeleton.source_keys(f"{self.skeleton.layer_name(index)}.{path}.weight")[0] for path in decision.linears}
        return Group(new for entry in entries for new in (changed(entry, decision, entry.shape[-1]) if entry.source in names else [entry]))

    def _with_experts(self, index: int) -> Group:
        """A layer's entries with its experts as decided."""
        keys, site = self.skeleton.keys_by_layer[index], self.skeleton.sites.get(index)
        decision = self.decisions.get(index)
        if decision is not None and site is not None and decision.gone == "moe":
            return self.skeleton.remembered(("without block", index), lambda: self._without_block(index, site))
        whole = site is None or decision is None or len(decision.keep) == site.num_experts
        if site is None or decision is None or (whole and decision.in_ranks is None and not decision.changed):
            return self.skeleton.remembered(("copies", index), lambda: self._copies(keys))
        replaced: set[str] = set()
        entries: list[Entry] = []
        for path in site.expert_axes:
            found, old = self.disk_expert(index, site, path)
            replaced |= old
            kept = self._kept(found, decision.keep)
            if path in site.weight_paths() and decision.changed:
                self._refuse_stacked(index, found, decision)
                inputs = site.width if path.endswith("down_proj") else site.hidden
                entries += [new for entry in kept for new in changed(entry, decision, inputs)]
            elif path not in site.weight_paths() or decision.in_ranks is None:
                entries += kept
        if decision.in_ranks is not None and not decision.changed:
            dtype = self.expert_dtype(index, site)
            disk = self._named(index, {f"{site.block}.{site.experts}.{name}": tensor for name, tensor in self.made(index).items()})
            entries += [Entry(key, dtype, tuple(tensor.shape)) for key, tensor in disk.items()]
        return Group([*self._copies([key for key in keys if key not in replaced]), *entries])

    def _refuse_stacked(self, index: int, found: DiskExpert, decision: LayerDecision) -> None:
        """compressed-tensors packs matrices; experts may lie stacked in one tensor."""
        if decision.bits is not None and (not found.whole or any(not key.endswith(".weight") for keys in found.whole for key in keys)):
            raise UserError(
                f"quantize: {self.skeleton.name} keeps the experts of layer {index} stacked in one tensor ({found.key or found.whole[0][0]}), "
                "which the compressed-tensors format has no place for; not supported yet."
            )

    def form(self, index: int, layer: nn.Module, made: Any) -> dict[str, torch.Tensor]:
        """The tensors of a layer that the last walk has changed, under the output's keys. `made`: its factored experts, or integers;
        pruned matrices are in the layer."""
        decision = self.decisions[index]
        if decision.bits is not None:
            return self.packed_form(index, made)
        if decision.pruned:
            return self.pruned_form(index, layer)
        site = self.skeleton.sites[index]
        named = {f"{site.block}.{site.experts}.{name}": tensor_at(made, name).detach() for name in self.made(index)}
        return self.disk_form(index, named)

    def packed_form(self, index: int, layer: QuantizedLayer) -> dict[str, torch.Tensor]:
        """The tensors of quantised matrices under the output's keys: integers and scales go the way that the matrices themselves would."""
        site = self.skeleton.sites.get(index)
        out: dict[str, torch.Tensor] = {}
        named: dict[str, list[Packed]] = {f"{path}.weight": [packed] for path, packed in layer.linears.items()}
        for path in site.weight_paths() if site is not None and layer.first else ():
            named[f"{site.block}.{path}"] = layer.last if path.endswith("down_proj") else layer.first  # type: ignore[union-attr]
        for name, stack in named.items():
            whole = torch.stack if name.partition(".weight")[0] not in layer.linears else lambda one: one[0]
            integers = self.disk_form(index, {name: whole([packed.q_OI for packed in stack])})
            scales = self.disk_form(index, {name: whole([packed.scale_OG for packed in stack])})
            for key, q_OI in integers.items():
                packed = Packed(q_OI, scales[key], stack[0].bits, stack[0].group)
                out |= {key.removesuffix("weight") + part: tensor for part, tensor in packed.tensors().items()}
        return out

    def pruned_form(self, index: int, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The tensors of a layer whose experts and linears have been pruned in place, under the output's keys."""
        site, named = self.skeleton.sites.get(index), {}
        for path in site.weight_paths() if site is not None and self.decisions[index].gone is None else ():
            named[f"{site.block}.{path}"] = tensor_at(site.block_of(layer), path)  # type: ignore[union-attr]
        for path in self.decisions[index].linears:
            named[f"{path}.weight"] = tensor_at(layer, f"{path}.weight")
        entries = {entry.key: entry for entry in self.groups[index + 1]}
        out: dict[str, torch.Tensor] = {}
        for key, tensor in self.disk_form(index, named).items():
            out |= squeezed(key, tensor.detach(), entries)
        return out

    def read_back(self, index: int, out: Path) -> dict[str, torch.Tensor]:
        """A written layer's changed matrices, dense, under the names that the source would have for them."""
        shard = next(shard for shard in self.shards if index + 1 in shard.groups)
        pairs = zip(self.groups[index + 1], self.entries(index), strict=True)
        names = {entry.key: old.key for entry, old in pairs if entry.source is None and not entry.zeros}
        with safe_open(out / shard.name, "pt") as file:
            return dense_back({name: file.get_tensor(key) for key, name in names.items()}, self.decisions[index].bits)

    @property
    def quantized_share(self) -> float:
        """Expert weights held as integers, of all expert weights that are left."""
        packed = whole = 0
        for index, site in self.skeleton.sites.items():
            decision = self.decisions[index]
            if decision.gone is None:
                packed += sum(entry.parameters for entry in self._with_experts(index) if entry.key.endswith("." + PARTS[0]))
                whole += len(decision.keep) * (site.first * site.hidden + site.hidden * site.width)
        return packed / whole

    def _without_block(self, index: int, site: MoeBlock) -> Group:
        """All but the MoE block: a dense MLP of zeros in its place where stock code can build one, the guard elsewhere."""
        prefix = f"{self.skeleton.layer_name(index)}.{site.block}."
        inside = {k for name, keys in self.skeleton.conversion.source_of.items() if name.startswith(prefix) for k in keys}
        dtype, shapes = self.expert_dtype(index, site), depth_config.zero_block(self.skeleton, index)
        if shapes is None:
            entry = sublayer.dropped_entry(self.skeleton, index)
            norm = f"{self.skeleton.layer_name(index)}.{entry['norm']}."
            inside |= {k for name, keys in self.skeleton.conversion.source_of.items() if name.startswith(norm) for k in keys}
            shapes = {entry["guard"]: (2, 2)}
        empty = {f"{prefix}{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
        disk = transformers5.to_disk_format(self.skeleton.model, empty, self.skeleton.conversion)
        rest = self._copies([key for key in self.skeleton.keys_by_layer[index] if key not in inside])
        return Group([*rest, *(Entry(key, dtype, tuple(tensor.shape), zeros=True) for key, tensor in disk.items())])

    def _renumbered(self, key: str, index: int) -> str:
        """`key` with the layer's new number: the first number in every known format's keys is the decoder layer's."""
        if self.place[index] == index:
            return key
        new = numbered(key, str(index), str(self.place[index]))
        if new is None:
            raise UserError(f"block_drop: the layer's number could not be found in the checkpoint's key {key!r}; not supported yet.")
        return new

    def parameter(self, index: int, site: MoeBlock, path: str) -> str:
        return f"{self.skeleton.layer_name(index)}.{site.block}.{path}"

    def disk_expert(self, index: int, site: MoeBlock, path: str) -> tuple[DiskExpert, set[str]]:
        """Where a parameter's experts lie on disk, and all keys that it is made of."""
        return self.skeleton.remembered(("disk expert", index, path), lambda: self._like_first(index, site, path))

    def _like_first(self, index: int, site: MoeBlock, path: str) -> tuple[DiskExpert, set[str]]:
        """As in the first MoE layer, under this layer's number, if that gives this layer's keys; no conversion depends on the number."""
        first = next(iter(self.skeleton.sites.values()))
        shapes = {tensor_at(one.block_of(self.skeleton.layers[one.layer]), path).shape for one in (first, site) if path in one.expert_axes}
        if first.layer != index and path in first.expert_axes and first.block == site.block and len(shapes) == 1:
            found, _ = self.disk_expert(first.layer, first, path)
            old, new = str(first.layer), str(index)
            whole = tuple(tuple(numbered(key, old, new) or "" for key in keys) for keys in found.whole)
            other = replace(found, whole=whole, key=numbered(found.key, old, new) or "")
            keys = {key for expert in whole for key in expert} or {other.key}
            if keys == set(self.skeleton.source_keys(self.parameter(index, site, path))):
                return other, keys
        return self._disk_expert(index, site, path)

    def _disk_expert(self, index: int, site: MoeBlock, path: str) -> tuple[DiskExpert, set[str]]:
        """Send expert numbers through the reverse conversion and see where they come out."""
        name, axis = self.parameter(index, site, path), site.expert_axes[path]
        whole = tensor_at(site.block_of(self.skeleton.layers[index]), path)
        shape = [site.num_experts if a == axis else min(4, length) for a, length in enumerate(whole.shape)]
        numbers = torch.arange(site.num_experts, dtype=torch.float32).view([-1 if a == axis else 1 for a in range(len(shape))])
        disk = transformers5.to_disk_format(self.skeleton.model, {name: numbers.expand(shape).contiguous()}, self.skeleton.conversion)
        sources = set(self.skeleton.source_keys(name))
        if set(disk) != sources:
            raise UserError(f"{self.skeleton.name}: {sorted(sources)[:2]} cannot be written back under the names they were read from.")
        per_expert: dict[int, list[str]] = {}
        for key, tensor in disk.items():
            low, high = tensor.amin(), tensor.amax()
            if low == high and len(disk) > 1:
                per_expert.setdefault(int(low), []).append(key)
            else:
                other = [
                    a for a, length in enumerate(tensor.shape) if length == site.num_experts and bool((tensor.select(a, 1) == 1).all())
                ]
                assert len(disk) == 1 and len(other) == 1, f"{name}: no expert axis in {key}"
                return DiskExpert(key=key, axis=other[0]), sources
        return DiskExpert(whole=tuple(tuple(per_expert[e]) for e in range(site.num_experts))), sources

    def _kept(self, found: DiskExpert, keep: tuple[int, ...]) -> list[Entry]:
        tensors = self.skeleton.checkpoint.tensors
        if not found.whole:
            info = tensors[found.key]
            shape = tuple(len(keep) if a == found.axis else length for a, length in enumerate(info.shape))
            return [Entry(found.key, info.dtype, shape, source=found.key, axis=found.axis, keep=keep)]
        return [
            self._copy(name, source)
            for place, expert in enumerate(keep)
            for name, source in zip(found.whole[place], found.whole[expert], strict=True)
        ]

    # ---- what a transformation makes

    def made(self, index: int) -> dict[str, torch.Tensor]:
        """Meta tensors of a layer's new expert weights by their name in the experts module: factors and guard, or merged matrices."""
        site, decision = self.skeleton.sites[index], self.decisions[index]
        experts = site.experts_of(self.skeleton.layers[index])
        if decision.merged:
            weights = [path.removeprefix(site.experts + ".") for path in site.weight_paths()]
            return {name: tensor_at(experts, name)[: len(decision.keep)].to("meta") for name in weights}
        ranks = list(decision.in_ranks or ()), list(decision.out_ranks or ())
        factored = modeling_trimoe.FactoredExperts(experts, *ranks, decision.separate)
        return {name: tensor.to("meta") for name, tensor in factored.state_dict().items() if not name.endswith("_bias")}

    def disk_form(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors named as in the decoder layer, under the output's keys."""
        return {self._renumbered(key, index): tensor for key, tensor in self._named(index, tensors).items()}

    def _named(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        named = {f"{self.skeleton.layer_name(index)}.{name}": tensor for name, tensor in tensors.items()}
        return transformers5.to_disk_format(self.skeleton.model, named, self.skeleton.conversion)

    def expert_dtype(self, index: int, site: MoeBlock) -> str:
        """The dtype that the source keeps this layer's expert weights in."""
        path = next(p for p in site.expert_paths() if p.endswith("down_proj"))
        return self.skeleton.checkpoint.tensors[self.skeleton.source_keys(self.parameter(index, site, path))[0]].dtype

    def linear_dtype(self, index: int, path: str) -> str:
        """The dtype that the source keeps a linear of this layer in."""
        (key,) = self.skeleton.source_keys(f"{self.skeleton.layer_name(index)}.{path}.weight")
        return self.skeleton.checkpoint.tensors[key].dtype

    # ---- files

    @cached_property
    def shards(self) -> list[Shard]:
        """Whole groups packed in order; a file is closed before it would exceed MAX_SHARD."""
        packs: list[list[int]] = [[]]
        size = 0
        for number, group in enumerate(self.groups):
            nbytes = group.nbytes
            if packs[-1] and size + nbytes > MAX_SHARD:
                packs.append([])
                size = 0
            packs[-1].append(number)
            size += nbytes
        return [Shard(f"model-{n:05d}-of-{len(packs):05d}.safetensors", pack, self) for n, pack in enumerate(packs, 1)]

    @property
    def tensor_bytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all safetensors files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def config(self) -> dict[str, object]:
        """config.json of the result: expert counts under every spelling, `moe_compression` where stock code cannot express the shapes."""
        return configuration.config_of(self.skeleton, self.decisions)

    @property
    def native(self) -> bool:
        return modeling_trimoe.KEY in self.config

    def index_json(self) -> dict[str, object]:
        return {
            "metadata": {"total_size": self.tensor_bytes},
            "weight_map": {entry.key: shard.name for shard in self.shards for group in shard.groups for entry in self.groups[group]},
        }


@dataclass(frozen=True)
class Shard:
    """One output file: which groups it holds. Wider dtypes come first, so that every tensor is aligned."""

    name: str
    groups: list[int]
    layout: Layout

    @cached_property
    def entries(self) -> list[Entry]:
        inside = [entry for group in self.groups for entry in self.layout.groups[group]]
        return sorted(inside, key=lambda entry: -DTYPES[entry.dtype].itemsize)

    @cached_property
    def header(self) -> bytes:
        return header_bytes((entry.key, entry.dtype, entry.shape) for entry in self.entries)

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(self.layout.groups[group].nbytes for group in self.groups)

    def offsets(self) -> dict[str, int]:
        """Absolute byte offset of each tensor."""
        offsets, at = {}, len(self.header)
        for entry in self.entries:
            offsets[entry.key] = at
            at += entry.nbytes
        return offsets
