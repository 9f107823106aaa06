"""The methods, registered by listing: one file each, one line here."""

from trimoe.methods.expert_drop import ExpertDrop
from trimoe.methods.low_rank import LowRank

Step = ExpertDrop | LowRank
METHODS: dict[str, type[Step]] = {method.name: method for method in (ExpertDrop, LowRank)}
