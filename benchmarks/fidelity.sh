#!/usr/bin/env bash
# What sparse attention costs on SmolLM2-135M-Instruct, on one GPU: scores at three lengths, the cost of every layer, and
# the profile made of it beside the uniform sparsity on other numbers. Needs the parts that fetch_smollm2.sh left.
#   benchmarks/fidelity.sh FOLDER [PARTS]
set -euo pipefail
out=$1
parts=${2:-.carry/smollm2}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=$work/SmolLM2-135M-Instruct
mkdir -p "$out" "$model"
cat "$parts"/weights.* >"$model/smollm2.gguf"
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $model/smollm2.gguf" | sha256sum --check --quiet
export PYTHONPATH=$parts/gguf:src
fidelity() {
  python3 -m baatt evaluate fidelity --model "$model" --gguf smollm2.gguf --device cuda --dtype bfloat16 \
    --documents 10 --needles 8 --batch-size 10 "$@"
}
fidelity --lengths 2K,4K,8K --sparsity 0.5,0.7,0.9 --score clusters,covariance,antidiagonal-8,exact \
  --store "$out/answers" --json "$out/fidelity_smollm2.json" --plot "$out/fidelity_smollm2.png"
fidelity --lengths 8K --sparsity 0.9 --by-layer --seed 1 \
  --store "$out/answers" --json "$out/fidelity_layers.json" --save "$out/fidelity_profile.policy.json"
fidelity --lengths 8K --sparsity 0.9 --policy "$out/fidelity_profile.policy.json" \
  --store "$out/answers" --json "$out/fidelity_profile.json"
