#!/usr/bin/env bash
# Makes the needle model from nothing: text, words, tokenizer, 20 minutes of training on one GPU, accuracy.
# Needs Debian's apt-get (as any user; run `apt-get update` once before) and baatt installed (`make test` does that).
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
data=training/data
out=training/runs/latest
cores=$(nproc)
workers=$((cores > 3 ? cores - 2 : 1))

"$python" -c 'import baatt, torch, sys; torch.cuda.is_available() or sys.exit("no CUDA device: training needs one")'
"$python" -c 'import wonderwords' 2>/dev/null || "$python" -m pip install --quiet wonderwords==3.0.1

"$python" training/corpus.py --out "$data" --assets src/baatt/assets
"$python" training/words.py --out src/baatt/assets/words.json
"$python" training/tokenizer.py --data "$data" --assets src/baatt/assets
"$python" training/train.py --data "$data" --out "$out" --seconds 1200 --workers "$workers"
"$python" training/evaluate.py --model "$out" --workers "$workers" --json "$out/accuracy.json"
