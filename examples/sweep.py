"""Several ratios from one statistics pass, and which of them are worth having. `python sweep.py [OUT]`"""

import sys

import trimoe

out = sys.argv[1] if len(sys.argv) > 1 else "sweep"
found = trimoe.sweep(
    "builtin:mini-mixtral",
    "expert-drop",
    out,
    changes=["steps.0.ratio=[0.25, 0.5]"],
    samples=8,
    length=128,
    text=["builtin:english"],
    tokens=256,
)
for row in found.rows:
    print(row)
