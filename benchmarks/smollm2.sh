#!/usr/bin/env bash
# What sparse attention costs the diffusion model grown from SmolLM2, whose folder MODEL is, and what its attention is.
#   benchmarks/smollm2.sh model PARTS ADAPTER MODEL
#     where there is no network: writes MODEL from the parts that fetch_smollm2.sh left and the shipped change.
#   benchmarks/smollm2.sh grids MODEL WORK RESULTS SECONDS [OPTIONS of ruler_grid.py]
#     on GPUs (GPUS, 2): RULER with several ways to choose blocks at 4096 tokens, with other orders and weights of BA-Att
#     there, then at 8192, in this order for so many seconds. The same command goes on, on another machine too if RESULTS
#     holds the answers.tar.gz of an earlier one. COUNT samples of every task (20), LONG_COUNT at 8192 (10): 1060 seconds of
#     an H200, on one or shared by several.
#     On a machine without a network, after the parts have travelled, for example:
#       bash benchmarks/smollm2.sh model .carry/smollm2 src/baatt/assets/smollm2-diffusion/adapter.safetensors /tmp/smollm2
#       bash benchmarks/smollm2.sh grids /tmp/smollm2 /tmp/grids RESULTS 560     # again until nothing is open
#   benchmarks/smollm2.sh studies MODEL WORK RESULTS
#     on a processor: bound (Fig. 2), maps (Fig. 5), norms and sinks, attention kept, by layer.
set -euo pipefail
export PYTHONPATH=src PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if [ "$1" = model ]; then
  mkdir -p "$4/base"
  cat "$2"/weights.* >"$4/base/smollm2-135m-instruct.gguf"
  exec "$python" -m baatt fetch smollm2 --cache "$4/base" --adapter "$3" --out "$4"
fi
model=$2 work=$3 results=$4 unfinished=0
mkdir -p "$work" "$results"
ln -sfn "$(realpath "$model")" "$work/smollm2-diffusion" # the name in the tables

grid() { # NAME COUNT, then what ruler_grid.py is told
  local left=$((limit - SECONDS)) name=$1
  if ((left < 30)); then
    echo "$name: no time left"
    unfinished=1
    return
  fi
  rm -f "$work/grid.json"
  "$python" benchmarks/ruler_grid.py "$work" --model "$work/smollm2-diffusion" --gpus "${GPUS:-2}" \
    --count "$2" --seconds "$left" "${@:3}" "${options[@]}" || unfinished=1
  if [ -e "$work/grid.json" ]; then cp "$work/grid.json" "$results/ruler_smollm2_$name.json"; fi
}

case $1 in
grids)
  limit=$5 options=(--sampler uncached "${@:6}")
  if [ ! -d "$work/answers" ] && [ -e "$results/answers.tar.gz" ]; then
    tar --extract --file "$results/answers.tar.gz" --directory "$work"
  fi
  settings=clusters,keep-first-0,oracle,paper,unsorted,unsorted-first,antidiagonal-first
  grid 4096 "${COUNT:-20}" --lengths 4096 --sparsity 0.5,0.7,0.9 --settings "$settings"
  grid orders "${COUNT:-20}" --lengths 4096 --sparsity 0.5,0.7,0.9 --settings orders
  grid betas "${COUNT:-20}" --lengths 4096 --sparsity 0.5 --settings betas
  grid 8192 "${LONG_COUNT:-10}" --lengths 8192 --sparsity 0.5,0.7,0.9 --settings "$settings"
  tar --create --gzip --file "$results/answers.tar.gz" --directory "$work" answers
  exit $unfinished
  ;;
studies)
  study() { # ACTION NAME, then its options
    "$python" -m baatt analyze "$1" "$work/smollm2.safetensors" --json "$results/$2_smollm2.json" "${@:3}"
  }
  paper=(--preset paper --sparsity 0.5,0.7,0.9 --no-outputs)
  "$python" -m baatt analyze capture --model "$work/smollm2-diffusion" --output "$work/smollm2.safetensors"
  study keys keys --plot "$results/keys_smollm2.png"
  study bound bound --preset paper --sort none,q,k,qk
  study layers layers --sort none,k,qk --segment 256,1024
  study recall recall "${paper[@]}" --sort none,k,qk --segment 256,1024 \
    --scores clusters,covariance,antidiagonal-8,oracle
  study recall recall_first "${paper[@]}" --keep-first 1 --sort none,k --segment 256 \
    --scores clusters,covariance,antidiagonal-8,oracle
  study recall recall_beta "${paper[@]}" --sort none,qk --beta 0,0.1,0.5,1,2 --scores covariance
  "$python" -m baatt analyze bound "$work/smollm2.safetensors" --preset paper --sort none,q,k,qk \
    --layers "${LAYERS:-0,10,20,29}" --plot "$results/bound_smollm2.png"
  "$python" -m baatt analyze maps "$work/smollm2.safetensors" --preset paper --sort none,qk \
    --layers "${LAYER:-4}" --plot "$results/maps_smollm2.png"
  ;;
esac
