#!/usr/bin/env bash
# The training of the small video model on a GPU machine without a network, in commands of at most ten minutes.
#   training/vision/session.sh pack              here: fetches clips and diffusers, cuts both into .carry/video/part.*
#   training/vision/session.sh unpack            there: joins the parts that have arrived
#   training/vision/session.sh train [OPTIONS]   there: video.py; what must come back lies in $OUT
#   training/vision/session.sh look NUMBER       there: a clip, dense and sparse, to be looked at
#   training/vision/session.sh evaluate          there: the table of docs; goes on where it was cut within a session
# Calls of a session, back to back, each with a limit of 600 s but the first:
#   1  carry .carry/video/part.00   true
#   2  carry .carry/video/part.01   training/vision/session.sh unpack && training/vision/session.sh train --seconds 530
#   3  training/vision/session.sh train --resume training/runs/video --seconds 540
#   4  training/vision/session.sh train --resume training/runs/video --seconds 300 && training/vision/session.sh look 12
#   5  training/vision/session.sh look 29 && training/vision/session.sh evaluate       (limit: what is left)
# A later session goes on from the copy that came back: pack FOLDER, with average.safetensors and average.json in it, and
# train --resume training/data/average.safetensors --total-seconds 2800 in call 2.
set -euo pipefail
export PYTHONPATH=src:training/data/site PYTHONUNBUFFERED=1
python=${PYTHON:-python3} work=training/runs/video
options=(--model "$work/model" --device cuda --dtype bfloat16)
case $1 in
pack)
  mkdir -p training/data .carry/video
  "$python" training/vision/media.py
  "$python" -m pip install --quiet --no-deps --target training/data/site diffusers==0.42.1
  files=(media.safetensors site)
  if [ $# -gt 1 ]; then
    cp "$2"/average.safetensors "$2"/average.json training/data
    files+=(average.safetensors average.json)
  fi
  rm -f .carry/video/part.*
  tar --create --xz --exclude __pycache__ --directory training/data "${files[@]}" |
    split --bytes="${PART:-15000000}" --numeric-suffixes - .carry/video/part.
  ls -l .carry/video
  ;;
unpack)
  mkdir -p training/data
  cat .carry/video/part.* | tar --extract --xz --directory training/data
  ;;
train)
  "$python" training/vision/video.py --out "$work" --copy "$OUT" "${@:2}"
  ;;
look)
  "$python" -m baatt demo --video --seed "$2" --steps 24 --output "$OUT/clip$2.png" "${options[@]}"
  ;;
evaluate)
  "$python" -m baatt evaluate video --dense-steps 0,0.1,0.2 --count "${COUNT:-4}" --json "$OUT/video.json" \
    --store training/runs/video.answers "${options[@]}"
  ;;
esac
