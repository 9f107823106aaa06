#!/usr/bin/env bash
# Two processes share one job; the files are those of one process. `torchrun_two_processes.sh [OUT]`
set -euo pipefail
OUT=${1:-small}
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m trimoe.cli compress builtin:mini-mixtral --recipe expert-drop \
  --out "$OUT" --samples 16 --length 256
