"""Which tensors the finished checkpoint holds, known to the byte before anything is written.

Experts that stay are copied as they lie on disk, whatever the key format: which disk tensor (or which rows of it) belongs to which
expert is found by sending tensors filled with expert numbers through transformers' own reverse conversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from trimoe import hf, modeling_trimoe
from trimoe.checkpoint import DTYPES, header_bytes
from trimoe.errors import UserError
from trimoe.methods.method import Decisions
from trimoe.skeleton import Site, Skeleton, tensor_at

MAX_SHARD = 4 << 30  # bytes of tensors in one file, unless a single layer is larger


@dataclass(frozen=True)
class Entry:
    """One tensor of the output. `source`: the checkpoint key it is copied from, with rows `keep` along `axis` if those are set;
    without a source it is made by a transformation."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None = None
    axis: int | None = None
    keep: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class DiskExpert:
    """Where the experts of one parameter lie on disk: `whole[e]` are expert e's own keys; else one key with an expert `axis`."""

    whole: tuple[tuple[str, ...], ...] = ()
    key: str = ""
    axis: int = 0


class Layout:
    """The output of `decisions` on a checkpoint: entries by group (group 0: outside the layers; then one a layer)."""

    def __init__(self, skeleton: Skeleton, decisions: Decisions):
        self.skeleton, self.decisions = skeleton, decisions
        self.groups = [self._copies(skeleton.outer_keys), *(self._layer(index) for index in range(len(skeleton.layers)))]

    # ---- what is in a layer

    def _copies(self, keys: Sequence[str]) -> list[Entry]:
        tensors = self.skeleton.checkpoint.tensors
        return [Entry(key, tensors[key].dtype, tensors[key].shape, source=key) for key in keys]

    def _layer(self, index: int) -> list[Entry]:
        keys, site = self.skeleton.keys_by_layer[index], self.skeleton.sites.get(index)
        decision = self.decisions.get(index)
        if site is None or decision is None or (len(decision.keep) == site.num_experts and decision.in_ranks is None):
            return self._copies(keys)
        replaced: set[str] = set()
        entries: list[Entry] = []
        for path in site.expert_axes:
            found, old = self._disk_expert(index, site, path)
            replaced |= old
            if path.startswith(site.experts + ".") and decision.in_ranks is not None and not path.endswith("_bias"):
                continue
            entries += self._kept(found, decision.keep)
        if decision.in_ranks is not None:
            dtype = self.expert_dtype(index, site)
            entries += [Entry(key, dtype, tuple(tensor.shape)) for key, tensor in self.disk_form(index, self.made(index)).items()]
        return self._copies([key for key in keys if key not in replaced]) + entries

    def parameter(self, index: int, site: Site, path: str) -> str:
        return f"{self.skeleton.layer_name(index)}.{site.block}.{path}"

    def _disk_expert(self, index: int, site: Site, path: str) -> tuple[DiskExpert, set[str]]:
        """Send expert numbers through the reverse conversion and see where they come out."""
        name, axis = self.parameter(index, site, path), site.expert_axes[path]
        whole = tensor_at(site.block_of(self.skeleton.layers[index]), path)
        shape = [site.num_experts if a == axis else min(4, length) for a, length in enumerate(whole.shape)]
        numbers = torch.arange(site.num_experts, dtype=torch.float32).view([-1 if a == axis else 1 for a in range(len(shape))])
        disk = hf.to_disk_format(self.skeleton.model, {name: numbers.expand(shape).contiguous()}, self.skeleton.conversion)
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
            Entry(name, tensors[source].dtype, tensors[source].shape, source=source)
            for place, expert in enumerate(keep)
            for name, source in zip(found.whole[place], found.whole[expert], strict=True)
        ]

    # ---- what a transformation makes

    def made(self, index: int) -> dict[str, torch.Tensor]:
        """Meta tensors of a layer's new expert weights by their name in the experts module: factors and guard, or merged matrices."""
        site, decision = self.skeleton.sites[index], self.decisions[index]
        experts = site.experts_of(self.skeleton.layers[index])
        if decision.merged:
            weights = [path.removeprefix(site.experts + ".") for path in site.expert_paths() if not path.endswith("_bias")]
            return {name: tensor_at(experts, name)[: len(decision.keep)].to("meta") for name in weights}
        factored = modeling_trimoe.FactoredExperts(experts, list(decision.in_ranks or ()), list(decision.out_ranks or ()))
        return {name: tensor.to("meta") for name, tensor in factored.state_dict().items() if not name.endswith("_bias")}

    def disk_form(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors named as in the experts module, under the checkpoint's keys."""
        site = self.skeleton.sites[index]
        named = {self.parameter(index, site, f"{site.experts}.{name}"): tensor for name, tensor in tensors.items()}
        return hf.to_disk_format(self.skeleton.model, named, self.skeleton.conversion)

    def expert_dtype(self, index: int, site: Site) -> str:
        """The dtype that the source keeps this layer's expert weights in."""
        path = next(p for p in site.expert_paths() if p.endswith("down_proj"))
        return self.skeleton.checkpoint.tensors[self.skeleton.source_keys(self.parameter(index, site, path))[0]].dtype

    # ---- files

    @cached_property
    def shards(self) -> list[Shard]:
        """Whole groups packed in order; a file is closed before it would exceed MAX_SHARD."""
        packs: list[list[int]] = [[]]
        size = 0
        for number, group in enumerate(self.groups):
            nbytes = sum(entry.nbytes for entry in group)
            if packs[-1] and size + nbytes > MAX_SHARD:
                packs.append([])
                size = 0
            packs[-1].append(number)
            size += nbytes
        return [Shard(f"model-{n:05d}-of-{len(packs):05d}.safetensors", pack, self) for n, pack in enumerate(packs, 1)]

    @property
    def tensor_bytes(self) -> int:
        return sum(entry.nbytes for group in self.groups for entry in group)

    @property
    def nbytes(self) -> int:
        """Bytes of all safetensors files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def config(self) -> dict[str, object]:
        """config.json of the result: expert counts under every spelling, `moe_compression` where stock code cannot express the shapes."""
        return config_of(self.skeleton, self.decisions)

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
        return len(self.header) + sum(entry.nbytes for entry in self.entries)

    def offsets(self) -> dict[str, int]:
        """Absolute byte offset of each tensor."""
        offsets, at = {}, len(self.header)
        for entry in self.entries:
            offsets[entry.key] = at
            at += entry.nbytes
        return offsets


def config_of(skeleton: Skeleton, decisions: Decisions) -> dict[str, object]:
    """The source's config.json with the new expert counts."""
    config = {key: value for key, value in skeleton.checkpoint.config.items() if key != modeling_trimoe.KEY}
    config.pop("auto_map", None)  # the source's own code is not carried over; transformers has the family
    before = {index: site.num_experts for index, site in skeleton.sites.items()}
    after = {index: len(decisions[index].keep) if index in decisions else count for index, count in before.items()}
    field, text = skeleton.count_field, skeleton.config.get_text_config()
    counts = set(after.values())
    uniform = len(counts) == 1
    total = counts.pop() if uniform else skeleton.num_experts
    inner = next((key for key, value in config.items() if isinstance(value, dict) and field in value), None)
    holder: dict[str, object] = dict(config[inner]) if inner else config  # type: ignore[call-overload]
    for name in (*hf.spellings(text, field), *(other for other in hf.COUNT_NAMES if other in holder)):
        holder[name] = total
    if skeleton.ignored_keys and "num_nextn_predict_layers" in holder:
        holder["num_nextn_predict_layers"] = 0  # the multi-token prediction layers are among what is left out
    if inner:
        config[inner] = holder
    layers: dict[str, dict[str, object]] = {}
    for index in skeleton.sites:
        decision = decisions.get(index)
        entry: dict[str, object] = {}
        if after[index] != total:
            entry["num_experts"] = after[index]
        if decision is not None and decision.factored:
            entry |= {"in_ranks": list(decision.in_ranks or ()), "out_ranks": list(decision.out_ranks or ())}
        if entry:
            layers[str(index)] = entry
    if layers:
        site = next(iter(skeleton.sites.values()))
        config[modeling_trimoe.KEY] = {
            "version": 1, "block": site.block, "experts": site.experts, "count_field": field, "layers": layers,
        }  # fmt: skip
        architecture = modeling_trimoe.stock_class(skeleton.config).__name__
        config["auto_map"] = {"AutoModelForCausalLM": f"modeling_trimoe.{architecture}"}
    return config
