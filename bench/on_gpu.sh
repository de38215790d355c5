#!/usr/bin/env bash
# Test and measure on a machine with a GPU and without a network, beside the PyTorch that is there:
#
#     bash bench/on_gpu.sh [STAGE ...] [-- ARGUMENTS]     # default: tests kernels models
#
# tests: those marked gpu. kernels: each op. models: the large networks, ours and eager PyTorch. compile: AGLN beside
# torch.compile in its modes, which takes minutes. ARGUMENTS are those of `agln-fast bench` for these two, in place
# of fp16 at 512x512. profile: kernel by kernel, what a replay of the fused AGLN takes. sanitize: the kernels' tests in
# fp16 under compute-sanitizer's memcheck, each tensor an allocation of its own. tensorrt: engines of TensorRT and
# TensorRT-RTX with and without our kernels are built, compared with the reference and timed, as far as these libraries
# are there; what is not is said.
#
# OUT     folder for gpu-tests.xml, sanitize.log and a JSON file of each other stage, default bench/results/; JSON is
#         written after each case
# BUDGET  seconds for everything, default 500; the stages share them, and what finds no time is noted as left out
# WHEELS  folder of wheels with what the machine lacks: jsonschema with what it needs for bundles, lightning-fabric for
#         training; kernels and models need neither
# PYTHON  interpreter, default python3
#
# Short tables come last. Ends with a status other than 0 if anything failed. Without a GPU it does the same in little on
# the CPU, which shows that the script works, and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
python=${PYTHON:-python3}
stages=()
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    stages+=("$1")
    shift
done
[ "$#" -eq 0 ] || shift
arguments=("$@")
[ "${#stages[@]}" -gt 0 ] || stages=(tests kernels models)
for stage in "${stages[@]}"; do
    case $stage in
        tests | kernels | models | compile | profile | sanitize | tensorrt) ;;
        *) echo "unknown stage $stage: tests, kernels, models, compile, profile, sanitize or tensorrt" >&2 && exit 2 ;;
    esac
done
deadline=$((SECONDS + ${BUDGET:-500}))
unset TRITON_INTERPRET # kernels are compiled
mkdir -p "$out"

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
"$python" -m pip install --quiet --no-deps --no-build-isolation --editable .

# Run a command until the moment $until; 30 seconds later it is killed.
limited() {
    local left=$((until - SECONDS))
    timeout --signal=INT --kill-after=30 "$((left > 10 ? left : 10))" "$@"
}

# Run a benchmark that goes on behind what its file holds: again, if the device was lost (75) or it died of a signal.
persistent() {
    local code
    while true; do
        code=0
        # It starts no case after its budget; the last one may take a little longer.
        limited "$@" --budget "$(((until - SECONDS) * 9 / 10))" || code=$?
        case $code in
            75 | 134 | 139) [ "$SECONDS" -lt "$until" ] || return "$code" ;;
            *) return "$code" ;;
        esac
    done
}

status=0
tables=()
left=${#stages[@]}
for stage in "${stages[@]}"; do
    echo "== $stage"
    until=$((SECONDS + (deadline - SECONDS) / left--))
    case $stage in
        tests)
            # Only files with such tests are collected: the others may need packages that are not there.
            mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests)
            # Most of the time goes into compiling kernels, which is the CPU's work.
            workers=()
            "$python" -c "import xdist" 2>/dev/null && workers=(--numprocesses "$(($(nproc) < 12 ? $(nproc) : 12))")
            limited "$python" -m pytest -m gpu "${files[@]}" "${workers[@]}" --continue-on-collection-errors --quiet \
                --tb=short --durations=5 --junitxml "$out/gpu-tests.xml" || status=1
            ;;
        kernels)
            rm -f "$out/kernels.json"
            tables+=("$out/kernels.json")
            persistent "$python" -m pytest bench/suite/bench_kernels.py --benchmark-only --benchmark-quiet --quiet --tb=line \
                --continue-on-collection-errors --rows "$out/kernels.json" || status=1
            ;;
        models | compile)
            rm -f "$out/$stage.json"
            run=(agln_nano --size 64x64)
            if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
                run=(--size 512x512 --precision fp16 --iters 30)
                [ "$stage" = models ] || run+=(agln_release_resnet50)
                [ "${#arguments[@]}" -eq 0 ] || run=("${arguments[@]}")
                run+=(--target cuda)
                [ "$stage" = models ] || run+=(--full)
            fi
            persistent "$python" -m agln_fast.cli bench "${run[@]}" --save "$out/$stage.json" --resume || status=1
            ;;
        profile)
            run=(--network agln_nano)
            if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
                run=()
            fi
            limited "$python" -m agln_fast.bench.kernels.profile "${run[@]}" --save "$out/profile.json" || status=1
            ;;
        sanitize)
            if ! command -v compute-sanitizer > /dev/null; then
                echo "left out: sanitize: compute-sanitizer is not on the PATH; it is part of the CUDA toolkit"
            else
                # PyTorch's allocator would put tensors side by side into one allocation, where nothing is out of bounds.
                PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited compute-sanitizer --tool memcheck --error-exitcode 9 \
                    --log-file "$out/sanitize.log" "$python" -m pytest -m gpu tests/kernels -k "float16 and channels_last" \
                    --quiet --tb=short || status=1
                [ ! -f "$out/sanitize.log" ] || tail -n 3 "$out/sanitize.log"
            fi
            ;;
        tensorrt)
            for target in tensorrt tensorrt-rtx; do
                bundle=$out/$target.agln
                if ! reason=$("$python" -c "import ${target//-/_}" 2>&1); then
                    echo "left out: $target: $(tail -n 1 <<< "$reason"); pip install \"agln-fast[$target]\""
                elif limited "$python" -m agln_fast.cli build agln_nano -o "$bundle" --target "$target" --size 128x128 \
                    --precision fp16 --force; then
                    limited "$python" -m agln_fast.cli verify "$bundle" --json | tee "$out/$target.json" || status=1
                else
                    status=1
                fi
            done
            "$python" -m agln_fast.cli doctor
            ;;
    esac
done
if [ "${#tables[@]}" -gt 0 ]; then
    "$python" -m agln_fast.bench.kernels.table "${tables[@]}" || status=1
fi
exit "$status"
