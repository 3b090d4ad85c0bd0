#!/usr/bin/env bash
# Everything that only a GPU can say about the kernels, in under nine minutes and without a network: the test suite on
# CUDA, the losses' speed, compute-sanitizer's memcheck over one test of each kernel, and a table of the results last.
# Needs python3 with torch, triton, numpy and pytest; PYTHON=... chooses another one. Logs go to ${OUT:-runs/gpu_check}.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu_check}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
table=()

step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    tail -n 25 "$out/$name.log"
    local verdict="ok"
    [ $code -eq 0 ] || verdict="FAILED ($code)"
    [ $code -ne 124 ] || verdict="out of time"
    local summary
    summary=$(grep -E '[0-9]+ (passed|failed|error)|ERROR SUMMARY' "$out/$name.log" | tail -n 1 | tr -d '=')
    table+=("$(printf '%-12s %-14s %4ds  %s' "$name" "$verdict" $((SECONDS - start)) "$summary")")
}

device=$("$python" - <<'PYTHON'
import torch, triton
assert torch.cuda.is_available(), "torch sees no GPU"
print(torch.cuda.get_device_name(), "| torch", torch.__version__, "| triton", triton.__version__)
PYTHON
) || exit 1
echo "$device"

step triton 150 "$python" -m pytest -q -p no:cacheprovider tests/ops tests/test_golden.py -k "triton and not compiles"
step compiles 40 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_triton_compiles.py -k "100 or 56-contiguous"
# the trainer's tests need packages that a bare machine lacks
step others 90 "$python" -m pytest -q -p no:cacheprovider tests/ops tests/test_golden.py tests/test_losses.py tests/test_mlkd.py \
    tests/test_corsd.py tests/test_accumulation.py tests/test_backend.py --ignore tests/ops/test_triton_compiles.py -k "not triton"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
    # PyTorch's caching allocator would hide a read past the end of a tensor
    step memcheck 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 \
        "$python" -m pytest -q -p no:cacheprovider tests/ops/test_triton.py -k "backward_of_another or longer_than_a_chunk or empty_maps or one_launch"
else
    table+=("memcheck     no compute-sanitizer on this machine")
fi
# what is left of the nine minutes; max-autotune and the cases not reached: python -m benchmarks.report
left=$((520 - SECONDS))
step speed "$left" "$python" -m benchmarks.report --output "$out" --seconds 0.5 --minutes "$((left / 60 - 1))" \
    --providers native,triton,reference,eager,compile

echo
echo "$device"
printf '%s\n' "${table[@]}"
case "${table[*]}" in *FAILED* | *"out of time"*) exit 1 ;; esac
