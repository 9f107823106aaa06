"""Calibrate on your own text: plain text, and JSON lines with a `text` field. `python own_calibration_text.py [OUT]`

Decisions are only as good as this text is like what the model will read. A label before the path names the domain in tables and cards.
"""

import json
import sys
import tempfile
from pathlib import Path

import trimoe

out = sys.argv[1] if len(sys.argv) > 1 else "small"
folder = Path(tempfile.mkdtemp())

notes = folder / "notes.txt"  # one file, one document
notes.write_text("\n".join(f"On day {day} the ship sailed {day * 17 % 90} miles to the west." for day in range(400)))
letters = folder / "letters.jsonl"  # one line, one document
with letters.open("w") as lines:
    for number in range(200):
        lines.write(
            json.dumps({"text": f"Dear reader, this is letter number {number}. The weather has been fair and we are well. "}) + "\n"
        )

result = trimoe.compress(
    "builtin:mini-mixtral",
    "naee",
    out,
    calibration=[f"logbook={notes}", f"letters={letters}", "builtin:english"],
    samples=12,
    length=64,
)
print(result.plan)
