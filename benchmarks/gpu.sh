#!/usr/bin/env bash
# Everything worth measuring on one GPU, in ten minutes, without a network (docs/gpu.md):
#
#     benchmarks/gpu.sh OUT              # gpu.jsonl, table.md, metrics.jsonl and log.txt in OUT, by default build/gpu
#     QUICK=1 benchmarks/gpu.sh OUT      # in miniature, also on a CPU: does it run?
#
# The most wanted parts come first. Each has a bound, and none runs longer than DEADLINE_S seconds after the start. A part
# that fails or is stopped keeps the results that it had by then, and stops no other; the exit status is then 1.
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${1:-build/gpu}
DEADLINE_S=${DEADLINE_S:-$([ -n "${QUICK:-}" ] && echo 1800 || echo 560)}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$OUT"
: >"$OUT/gpu.jsonl"
: >"$OUT/log.txt"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What the machine lacks, from the wheels of `make gpu-bundle`.
has='import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))'
if ! "$PYTHON" -c "$has" pydantic simplejpeg webdataset deepspeed; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-cache-dir --target "$work/site" .whl/*.whl || exit 1
  PYTHONPATH=$work/site
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TMPDIR="$work"

status=0
failed() { # PART WHY
  printf '{"part": "%s", "name": "all", "failed": "%s"}\n' "$1" "$2" | tee -a "$OUT/gpu.jsonl"
  status=1
}
part() { # PART SECONDS
  local bound=$((DEADLINE_S - SECONDS)) code=0
  if [ "$bound" -gt "$2" ] && [ -z "${QUICK:-}" ]; then bound=$2; fi
  if [ "$bound" -lt 5 ]; then
    failed "$1" "no time was left"
    return
  fi
  echo "== $1, at $SECONDS s" | tee -a "$OUT/log.txt"
  timeout --kill-after=5 "$bound" "$PYTHON" benchmarks/gpu.py "$1" --out "$OUT" ${QUICK:+--quick} >>"$OUT/log.txt" 2>&1 || code=$?
  case $code in
    0) ;;
    124 | 137) failed "$1" "stopped after $bound s" ;;
    *) failed "$1" "exit code $code: see log.txt" ;;
  esac
}

[ -z "${QUICK:-}" ] || part imports 120 # of every benchmark
part ceilings 60
part right 120
part mfu 300
part train 200
part zero 90
"$PYTHON" benchmarks/gpu_table.py "$OUT/gpu.jsonl" >"$OUT/table.md" || status=1
cat "$OUT/table.md"
grep -q '"failed"' "$OUT/gpu.jsonl" && status=1
exit $status
