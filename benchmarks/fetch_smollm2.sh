#!/usr/bin/env bash
# Gets SmolLM2-135M-Instruct (GGUF, Apache-2.0; `baatt fetch smollm2`) and the package with which transformers reads GGUF,
# both pinned and checked, into a folder that git ignores. The weights are cut into parts of PART bytes, which travel to
# another machine beside a checkout; there or here, `cat FOLDER/weights.* > smollm2.gguf` joins them.
#   benchmarks/fetch_smollm2.sh [FOLDER]
set -euo pipefail
folder=${1:-.carry/smollm2}
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd" >"$work/requirements.txt"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --require-hashes -r "$work/requirements.txt" -d "$work"
"$python" -m baatt fetch smollm2 --cache "$work"
rm -rf "$folder"
mkdir -p "$folder"
split --bytes="${PART:-14000000}" --numeric-suffixes "$work"/*.gguf "$folder/weights."
"$python" -m zipfile -e "$work"/gguf-*.whl "$folder/gguf"
du -ah --max-depth=1 "$folder"
