#!/usr/bin/env bash
# From a model to a smaller one, by the command line. `command_line.sh [OUT]`
set -euo pipefail
OUT=${1:-small}
MODEL=builtin:mini-mixtral # a folder of safetensors or a hub id

trimoe inspect $MODEL               # what it is, and what can be done
trimoe plan $MODEL --recipe naee    # how large it will be, and what will load it
trimoe compress $MODEL --recipe naee --out "$OUT" --samples 16 --length 128
trimoe eval "$OUT" --tokens 256 --no-generate # what was lost; in $OUT/README.md too
trimoe report "$OUT"                # a page that shows it; charts need: pip install 'trimoe[report]'
