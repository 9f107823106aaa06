"""One statistics pass, then every score of every expert from the file. `python scores_of_experts.py [FILE]`"""

import sys
from pathlib import Path

import trimoe
from trimoe.calibration.statistics import Stats
from trimoe.methods.expert_drop.scores import SCORES

file = Path(sys.argv[1] if len(sys.argv) > 1 else "mini.stats")
trimoe.gather_statistics("builtin:mini-mixtral", file, samples=16)  # what `trimoe stats` does

stats = Stats.load(file)
for name, score in SCORES.items():
    print(f"{name}, layer by layer, the expert that matters least:")
    print("  ", [int(score(layer).argmin()) for _, layer in sorted(stats.layers.items())])
