#!/usr/bin/env bash
# The growing of a diffusion model from SmolLM2 on a GPU machine without a network, in commands of at most ten minutes.
#   training/session.sh pack [ADAPTER]   here: fetches base and corpus, cuts both (and an earlier ADAPTER, with its .json if
#                                        that is beside it) into .carry/adapt/part.*, which git ignores and which travel
#   training/session.sh unpack           there: joins the parts that have arrived; GPUS of them write the base's texts
#   training/session.sh train [OPTIONS]  there: adapt.py, on GPUS of them (1); what must come back lies in $OUT
#   training/session.sh bars [ADAPTER]   there: text, questions, continuations; leaves the model folder for
#   training/session.sh ruler 4096 25    there: RULER's tasks at that length, so many samples of each, dense
set -euo pipefail
export PYTHONPATH=src PYTHONUNBUFFERED=1
python=${PYTHON:-python3} work=training/runs/adapt base=training/data/smollm2.gguf
adapter=$work/adapter.safetensors
case $1 in
pack)
  mkdir -p training/data .carry/adapt
  "$python" -m baatt fetch smollm2 --cache .carry
  ln -f .carry/smollm2-135m-instruct.gguf "$base"
  [ -e training/data/train.txt ] || "$python" training/corpus.py
  xz --keep --force training/data/train.txt
  files=(smollm2.gguf train.txt.xz)
  if [ $# -gt 1 ]; then
    cp "$2" training/data/earlier.safetensors
    files+=(earlier.safetensors)
    if [ -e "${2%.*}.json" ]; then
      cp "${2%.*}.json" training/data/earlier.json
      files+=(earlier.json)
    fi
  fi
  rm -f .carry/adapt/part.*
  tar --create --directory training/data "${files[@]}" | split --bytes="${PART:-14000000}" --numeric-suffixes - .carry/adapt/part.
  ls -l .carry/adapt
  ;;
unpack)
  mkdir -p training/data
  cat .carry/adapt/part.* | tar --extract --directory training/data
  for number in $(seq 0 $((${GPUS:-1} - 1))); do
    CUDA_VISIBLE_DEVICES=$number "$python" training/base_text.py --base "$base" --seconds "${SECONDS_TO_WRITE:-90}" \
      --seed $((number + 1)) &
  done
  wait
  ;;
train)
  mkdir -p "$work"
  status=0
  "$python" -m torch.distributed.run --nproc-per-node "${GPUS:-1}" training/adapt.py --base "$base" --out "$work" --copy "$OUT/adapter.safetensors" "${@:2}" || status=$?
  cp "$OUT"/adapter.* "$work"
  cp "$work/training.json" "$OUT" || true
  exit $status
  ;;
bars)
  "$python" training/bars.py --base "$base" --adapter "${2:-$adapter}" --folder "$work/model" --json "$OUT/bars.json"
  ;;
ruler)
  "$python" training/evaluate.py --model "$work/model" --tasks all --lengths "$2" --count "$3" \
    --batch-tokens 131072 --workers 12 --json "$OUT/ruler_dense.json"
  ;;
esac
