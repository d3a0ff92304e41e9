#!/usr/bin/env bash
# The training of the two small models on a GPU machine without a network, in commands of at most ten minutes.
#   training/vision/session.sh pack [NAME FOLDER]      here: fetches pixels and diffusers, cuts both into
#                                                      .carry/vision/part.*, with the copy of an earlier run of NAME
#   training/vision/session.sh unpack                  there: joins the parts that have arrived
#   training/vision/session.sh train NAME [OPTIONS]    there: video.py or understanding.py; what must come back: $OUT
#   training/vision/session.sh look NUMBER             there: a clip of the video model, dense and sparse
#   training/vision/session.sh evaluate [OPTIONS]      there: the table of the video model; goes on where it was cut
#   training/vision/session.sh ask [OPTIONS]           there: the tables of the model that answers; likewise
# Calls of a session, back to back, each with a limit of 600 s but the first; NAME is video or understanding:
#   1  carry .carry/vision/part.00   true
#   2  carry .carry/vision/part.01   session.sh unpack && session.sh train NAME --seconds 530
#   3  session.sh train NAME --resume training/runs/NAME --seconds 540
#   4  session.sh train NAME --resume training/runs/NAME --seconds 300, of the video model && session.sh look 12
#   5  session.sh look 29 && session.sh evaluate, or session.sh ask       (limit: what is left)
# A later session goes on from the copy that came back: pack NAME FOLDER, with average.safetensors and average.json in
# it, and train NAME --resume training/data/NAME.safetensors --total-seconds 2800 in call 2. The folder `model` that
# came back is what is shipped.
set -euo pipefail
export PYTHONPATH=src:training/data/site PYTHONUNBUFFERED=1
python=${PYTHON:-python3} runs=training/runs
options=(--device cuda --dtype bfloat16)
case $1 in
pack)
  mkdir -p training/data .carry/vision
  "$python" training/vision/media.py
  "$python" -m pip install --quiet --no-deps --target training/data/site diffusers==0.42.1
  files=(media.safetensors photos.safetensors heldout.safetensors site)
  if [ $# -gt 1 ]; then
    for kind in safetensors json; do cp "$3/average.$kind" "training/data/$2.$kind"; done
    files+=("$2.safetensors" "$2.json")
  fi
  rm -f .carry/vision/part.*
  tar --create --xz --exclude __pycache__ --directory training/data "${files[@]}" |
    split --bytes="${PART:-14500000}" --numeric-suffixes - .carry/vision/part.
  ls -l .carry/vision
  ;;
unpack)
  mkdir -p training/data
  cat .carry/vision/part.* | tar --extract --xz --directory training/data
  ;;
train)
  "$python" "training/vision/$2.py" --copy "$OUT" "${@:3}"
  ;;
look)
  "$python" -m baatt demo --video --model $runs/video/model --seed "$2" --steps 24 --output "$OUT/clip$2.png" \
    "${options[@]}"
  ;;
evaluate)
  "$python" -m baatt evaluate video --model $runs/video/model --dense-steps 0,0.1,0.2 --count 4 \
    --json "$OUT/video.json" --store $runs/video.answers "${options[@]}" "${@:2}"
  ;;
ask)
  asked=(--model $runs/understanding/model --count 167 --batch-size 8 --store $runs/vision.answers "${options[@]}")
  asked+=("${@:2}")
  betas=(--preset paper --dial beta=0,0.1,0.5,1,2)
  "$python" -m baatt evaluate vision --sparsity 0.5,0.7,0.9 --json "$OUT/vision_default.json" "${asked[@]}"
  "$python" -m baatt evaluate vision "${betas[@]}" --json "$OUT/vision_paper.json" "${asked[@]}"
  "$python" -m baatt evaluate vision "${betas[@]}" --sort none --keep-first 1 --json "$OUT/vision_unsorted.json" \
    "${asked[@]}"
  ;;
esac
