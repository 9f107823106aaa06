"""The methods, registered by listing: one file each, one line here."""

from trimoe.methods.depth.block_drop import BlockDrop
from trimoe.methods.depth.layer_drop import LayerDrop
from trimoe.methods.expert_drop.expert_drop import ExpertDrop
from trimoe.methods.low_rank.low_rank import LowRank
from trimoe.methods.quantize.quantize import Quantize
from trimoe.methods.weight_prune.weight_prune import WeightPrune

Step = ExpertDrop | LayerDrop | BlockDrop | LowRank | WeightPrune | Quantize
METHODS: dict[str, type[Step]] = {method.name: method for method in (ExpertDrop, LayerDrop, BlockDrop, LowRank, WeightPrune, Quantize)}
