"""The methods, registered by listing: one folder each, one line here."""

from trimoe.methods.depth.block_drop import BlockDrop
from trimoe.methods.depth.layer_drop import LayerDrop
from trimoe.methods.expert_drop.expert_drop import ExpertDrop
from trimoe.methods.low_rank.low_rank import LowRank
from trimoe.methods.method import Method
from trimoe.methods.quantize.quantize import Quantize
from trimoe.methods.weight_prune.weight_prune import WeightPrune

LISTED: tuple[type[Method], ...] = (ExpertDrop, LayerDrop, BlockDrop, LowRank, WeightPrune, Quantize)
METHODS: dict[str, type[Method]] = {method.name: method for method in LISTED}
FARTHEST: Method = ExpertDrop(ratio=0.25, layer_limit=None)  # of all steps the one that reaches for the most experts of a token
