#!/usr/bin/env bash
# What was lost, and a page that shows it. Charts need: pip install 'trimoe[report]'. `evaluate_and_report.sh [OUT]`
set -euo pipefail
OUT=${1:-small}

trimoe compress builtin:mini-mixtral --recipe expert-drop --out "$OUT" --samples 8
trimoe eval "$OUT" --text builtin:english --tokens 256 --no-generate # kept in $OUT/trimoe.json
trimoe report "$OUT" # $OUT/report.html: one file, no network
