#!/usr/bin/env bash
# Makes the shipped model from nothing: text, words, tokenizer, 83 minutes of training on one GPU, needle accuracy.
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
"$python" training/train.py --data "$data" --out "$out/needles" --seconds 1200 --workers "$workers"
"$python" training/train.py --data "$data" --resume "$out/needles" --stage 9 --last-stage 13 --max-length 16384 \
  --rope-theta 40000 --seconds 900 --learning-rate 1e-3 --decay-share 0.1 --seed 11 --workers "$workers" --out "$out/all"
"$python" training/train.py --data "$data" --resume "$out/all" --stage 13 --last-stage 14 --max-length 16384 \
  --seconds 700 --learning-rate 1e-3 --decay-share 0.8 --seed 12 --workers "$workers" --out "$out/long"
"$python" training/train.py --data "$data" --resume "$out/long" --stage 15 --last-stage 16 --max-length 32768 \
  --seconds 1500 --learning-rate 8e-4 --decay-share 1 --seed 13 --workers "$workers" --out "$out/longer"
"$python" training/train.py --data "$data" --resume "$out/longer" --stage 15 --last-stage 15 --max-length 32768 \
  --seconds 660 --learning-rate 5e-4 --decay-share 1 --seed 14 --workers "$workers" --out "$out"
"$python" training/evaluate.py --model "$out" --workers "$workers" --json "$out/accuracy.json"
