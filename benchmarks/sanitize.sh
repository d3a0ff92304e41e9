#!/usr/bin/env bash
# memcheck, racecheck, initcheck and synccheck of compute-sanitizer over every kernel, on small shapes:
#   bash benchmarks/sanitize.sh FOLDER [SECONDS [TOOLS]]
# Each tool runs over three parts of the calls, all side by side, for so many seconds at most. Leaves sanitizer_TOOL.txt
# in FOLDER, with the calls that ran below what the tool said. Ends with 1 if one found something, ran out of time or could
# not run; of racecheck `hazards.py` says what counts.
set -uo pipefail
folder=${1:?a folder for the logs}
seconds=${2:-240}
tools=${3:-memcheck racecheck initcheck synccheck}
python=${PYTHON:-python3}
here=$(dirname "$0")
parts=("hopper bfloat16" "triton bfloat16" "triton float32")
export PYTHONUNBUFFERED=1

if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer is not installed" >&2
  exit 1
fi
# Compiled once, without a tool in the way; then a kernel that no call launches is told.
for part in "${parts[@]}"; do
  "$python" "$here/kernel_calls.py" --part --impls "${part% *}" --dtypes "${part#* }" >/dev/null 2>&1 &
done
wait
"$python" "$here/kernel_calls.py" >"$folder/sanitizer_calls.txt" || { tail -n 3 "$folder/sanitizer_calls.txt"; exit 1; }
tail -n 1 "$folder/sanitizer_calls.txt"

# Each tensor is an allocation of its own, so that going beyond one is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Our kernels alone: PyTorch's are many and slow to look into. initcheck has to see all that writes.
filter=--filter
help=$(compute-sanitizer --help) # whole: grep ends at the first hit, and what writes on into it would fail
if [[ $help == *--kernel-name* ]]; then filter=--kernel-name; fi
look() { # with a tool, what to run, and the log
  local options=(--tool "$1" --print-limit 1000 --error-exitcode 9 --log-file "$3.log")
  [ "$1" = initcheck ] || options+=("$filter" kns=_kernel)
  timeout "$seconds" compute-sanitizer "${options[@]}" "$python" $2 >"$3.out" 2>&1
  echo "$?" >"$3.code"
}
for tool in $tools; do
  for number in "${!parts[@]}"; do
    part=${parts[$number]}
    look "$tool" "$here/kernel_calls.py --part --impls ${part% *} --dtypes ${part#* }" "$folder/$tool.$number" &
  done
done
[[ $tools != *racecheck* ]] || look racecheck "$here/hazards.py control" "$folder/control" &
wait

status=0
for tool in $tools; do
  log="$folder/sanitizer_$tool.txt"
  : >"$log"
  for number in "${!parts[@]}"; do
    piece="$folder/$tool.$number"
    code=$(cat "$piece.code")
    { cat "$piece.log"; echo; grep ': ran' "$piece.out"; } >>"$log"
    summary=$(grep -a "SUMMARY" "$piece.log" | tail -n 1)
    line="$tool, ${parts[$number]}: exit $code, $(grep -c ': ran' "$piece.out") calls, ${summary:-no summary}"
    echo "$line" | tee -a "$log"
    [ "$code" -eq 0 ] || { [ "$tool" = racecheck ] && [ "$code" -eq 9 ]; } || status=1
  done
  if [ "$tool" = racecheck ]; then
    { echo; echo "A kernel of parts that do nothing:"; cat "$folder/control.log"; } >>"$log"
    "$python" "$here/hazards.py" "$log" | tee -a "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
  fi
done
rm -f "$folder"/*.log "$folder"/*.out "$folder"/*.code
exit "$status"
