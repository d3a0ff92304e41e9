#!/usr/bin/env bash
# memcheck, racecheck, initcheck and synccheck of compute-sanitizer over every kernel, on small shapes:
#   bash benchmarks/sanitize.sh FOLDER [SECONDS_FOR_EACH_TOOL [TOOLS]]
# The tools run side by side. Leaves sanitizer_TOOL.txt in FOLDER, with the calls that ran below what the tool said. Ends
# with 1 if one found something, ran out of time or could not run.
set -uo pipefail
folder=${1:?a folder for the logs}
seconds=${2:-120}
tools=${3:-memcheck racecheck initcheck synccheck}
python=${PYTHON:-python3}
here=$(dirname "$0")
export PYTHONUNBUFFERED=1

if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer is not installed" >&2
  exit 1
fi
# Compiled once, without a tool in the way, in three processes; then a kernel that no call launches is told.
for part in "hopper bfloat16" "triton bfloat16" "triton float32"; do
  "$python" "$here/kernel_calls.py" --impls "${part% *}" --dtypes "${part#* }" >/dev/null 2>&1 &
done
wait
"$python" "$here/kernel_calls.py" >"$folder/sanitizer_calls.txt" || { tail -n 3 "$folder/sanitizer_calls.txt"; exit 1; }
tail -n 1 "$folder/sanitizer_calls.txt"

# Each tensor is an allocation of its own, so that going beyond one is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Our kernels alone: PyTorch's are many and slow to look into.
filter=--filter
help=$(compute-sanitizer --help) # whole: grep ends at the first hit, and what writes on into it would fail
if [[ $help == *--kernel-name* ]]; then filter=--kernel-name; fi
look() { # with one tool
  local tool=$1 log="$folder/sanitizer_$1.txt" calls="$folder/$1.part" started=$SECONDS
  timeout "$seconds" compute-sanitizer --tool "$tool" "$filter" kns=_kernel --error-exitcode 9 --print-limit 20 \
    --log-file "$log" "$python" "$here/kernel_calls.py" >"$calls" 2>&1
  local code=$?
  local summary
  summary=$(grep -a "SUMMARY" "$log" | tail -n 1)
  { echo; tail -n 40 "$calls"; } >>"$log"
  echo "$tool: exit $code after $((SECONDS - started)) s, $(grep -c ': ran' "$calls") calls, ${summary:-no summary}" |
    tee -a "$log"
  rm -f "$calls"
  return "$code"
}
waiting=()
for tool in $tools; do
  look "$tool" &
  waiting+=($!)
done
status=0
for one in "${waiting[@]}"; do wait "$one" || status=1; done
exit "$status"
