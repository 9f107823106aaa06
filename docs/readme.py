"""Run the commands of README.md and compare what they print with what it shows; `...` stands for anything.

It takes some minutes in a folder of its own. Another processor may choose other ranks and other last digits.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```console\n(.*?)```", readme, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        for part in shown.split("$ trimoe ")[1:]:
            command, _, wanted = part.partition("\n")
            environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}
            call = [sys.executable, "-m", "trimoe", *command.split()]
            printed = subprocess.check_output(call, cwd=folder, env=environment, stderr=subprocess.STDOUT, text=True)
            pieces = re.split(r"(?:^|\n)\.\.\.\n|\.\.\.", wanted.strip("\n") + "\n")
            same = re.search(".*".join(map(re.escape, pieces)), printed, re.DOTALL)
            print(f"{'as shown' if same else 'OTHER'}: trimoe {command}")
            if not same:
                sys.exit(printed)


if __name__ == "__main__":
    main()
