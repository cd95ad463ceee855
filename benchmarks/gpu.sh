#!/usr/bin/env bash
# Everything worth measuring on a GPU machine, by one command:
#
#     benchmarks/gpu.sh                            # into build/gpu: one JSON a benchmark, gpu.json with all, table.txt
#     SIZES="vit_b" benchmarks/gpu.sh OUT          # one model size, into OUT
#
# Strategies, step, loader and checkpoint benchmarks for ViT-B, L and H. Where deepspeed is missing, its strategies are
# left out, and the table says so. A benchmark that fails stops no other: its log lies beside it, the exit status is 1.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-build/gpu}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
read -r -a SIZES <<<"${SIZES:-vit_b vit_l vit_h}"
QUICK=${QUICK:+--quick} # QUICK=1: does it run?
PRECISION=${PRECISION:-bf16}
BATCH_vit_b=${BATCH_vit_b:-256} BATCH_vit_l=${BATCH_vit_l:-128} BATCH_vit_h=${BATCH_vit_h:-64}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"

status=0
run() { # NAME SCRIPT ARGUMENTS…: its figures in OUT/NAME.json, what it said in OUT/NAME.log
  local name=$1
  shift
  echo "== $name"
  if ! "$PYTHON" "benchmarks/$1.py" "${@:2}" ${QUICK:+"$QUICK"} --json "$OUT/$name.json" 2>&1 | tee "$OUT/$name.log"; then
    echo "== $name failed: $OUT/$name.log" >&2
    status=1
  fi
}

set -o pipefail
strategies=(ddp fsdp)
if "$PYTHON" -c "import deepspeed" 2>/dev/null; then
  strategies+=(zero1 zero2 zero3)
else
  echo "deepspeed is not installed: zero1, zero2 and zero3 are left out" | tee "$OUT/left_out.txt"
fi
for size in "${SIZES[@]}"; do
  batch=BATCH_$size
  run "step-$size" step --size "$size" --precision "$PRECISION" --batch "${!batch:-8}"
  run "strategies-$size" strategies --size "$size" --precision "$PRECISION" --batch "${!batch:-8}" --strategies "${strategies[@]}"
done
run checkpoint checkpoint
run overhead overhead
run loader loader # beside the peers that are installed (make peers)

"$PYTHON" - "$OUT" <<'PY'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
figures = {p.stem: json.loads(p.read_text()) for p in sorted(out.glob("*.json")) if p.name != "gpu.json"}
(out / "gpu.json").write_text(json.dumps(figures, indent=2) + "\n")
logs = [f"## {p.stem}\n{p.read_text().strip()}\n" for p in sorted(out.glob("*.log"))]
left = out / "left_out.txt"
(out / "table.txt").write_text("\n".join([*logs, left.read_text() if left.exists() else ""]))
print(f"{out / 'gpu.json'}: {', '.join(figures) or 'nothing'}; {out / 'table.txt'}")
PY
exit $status
