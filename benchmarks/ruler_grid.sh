#!/usr/bin/env bash
# RULER's eleven offline tasks on the shipped model: dense attention, both presets, and three other scores without
# sorting, at 30, 50, 70 and 90 % sparsity. Usage: benchmarks/ruler_grid.sh FOLDER [LENGTHS] [PROCESSES]
# Answers are kept in FOLDER/answers: a run that was cut goes on, and what is done already is only summed up again.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: benchmarks/ruler_grid.sh FOLDER [LENGTHS] [PROCESSES]}
lengths=${2:-4096,8192,16384}
processes=${3:-1}
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH=src OMP_NUM_THREADS=1
mkdir -p "$out"

evaluate() {
  name=$1
  shift
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m baatt evaluate ruler \
    --device cuda --dtype bfloat16 --count 200 --lengths "$lengths" --block-length 8 --remasking left_to_right \
    --cache dual --batch-size 50 --workers 10 --store "$out/answers" --json "$out/ruler_$name.json" "$@"
}

sparsity=0.3,0.5,0.7,0.9
evaluate dense --sparsity 0
evaluate safe --preset safe --sparsity "$sparsity"
evaluate paper --preset paper --sparsity "$sparsity"
evaluate mean --preset paper --sort none --score mean --sparsity "$sparsity"
evaluate antidiagonal --preset paper --sort none --score antidiagonal-8 --sparsity "$sparsity"
evaluate oracle --preset paper --sort none --score oracle --sparsity "$sparsity"
