#!/usr/bin/env bash
# On a machine with a GPU and without a network: install beside the PyTorch that is there, test, measure.
# JSON goes to the folder that $OUT names (default bench/results/), a short table to the screen. $WHEELS may name a folder
# of wheels with what that machine lacks (jsonschema, torchmetrics, lightning-fabric, pyyaml and their dependencies).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
python=${PYTHON:-python3}

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" jsonschema torchmetrics lightning-fabric pyyaml
fi
"$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
status=0
# Only files with such tests are collected: the others may need packages that are not there.
mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests)
"$python" -m pytest -m gpu "${files[@]}" --junitxml "$out/gpu-tests.xml" || status=$?
"$python" -m pytest bench --benchmark-only --benchmark-json "$out/kernels.json" || status=$?
for batch in 1 8; do
    "$python" -m agln_fast.cli bench --device cuda --batch "$batch" --iters 30 --warmup 5 --json >"$out/networks-b$batch.json"
done
"$python" - "$out"/networks-b*.json <<'P'
import json, sys
for path in sys.argv[1:]:
    report = json.load(open(path))
    print(report["machine"]["gpu"])
    for row in report["rows"]:
        print(f'{row["network"]:24} {row["engine"]:18} batch {row["batch"]}  {row["median_ms"]:9.2f} ms  x{row["ratio"]:.2f}')
P
exit "$status"
