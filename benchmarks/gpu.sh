#!/usr/bin/env bash
# All that needs a GPU, in parts of under nine minutes each: tests, then benchmarks.
#
#   benchmarks/gpu.sh OUT [PART ...]     without parts: all that OUT does not have yet, in order
#
# Needs torch, triton, transformers and pytest, and no network. OUT gets the results, the log of each part, and
# summary.txt. A part that was stopped or went wrong is run again by the next call. REHEARSE=1 runs small versions on a CPU.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT [PART ...]}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
limit=${LIMIT:-530} # seconds for a part
mkdir -p "$out"
out=$(cd "$out" && pwd)

# What is installed, and beside it what is not part of the package. The checkout's own `fxopt` lacks its passes.
mkdir -p "$out/site"
ln -sfn "$root/benchmarks" "$out/site/benchmarks"
cd "$out/site" || exit 1

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$out/site"
export FXOPT_CACHE_DIR="$out/kernels" TORCHINDUCTOR_CACHE_DIR="$out/inductor"
if [[ ${REHEARSE:-0} == 1 ]]; then
    export FXOPT_REHEARSE_GPU=1 TRITON_INTERPRET=1
fi

part() { # its command, by name
    case $1 in
        install) "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target "$out/site" "$root" ;;
        doctor) "$python" -m fxopt doctor ;;
        kernel-tests) "$python" -m pytest -q -p no:cacheprovider "$root"/tests/gpu/test_kernels.py ${REHEARSE:+-k "norm or softmax or columns"} ;;
        generation-tests) "$python" -m pytest -q -p no:cacheprovider "$root"/tests/gpu/test_generation.py ${REHEARSE:+-k llama} ;;
        kernels) "$python" -m benchmarks.kernels --out "$out/kernels.json" \
            ${REHEARSE:+--shapes 8x256 --dtypes bfloat16 --seconds 0.1} ;;
        decode-tests) "$python" -m pytest -q -p no:cacheprovider "$root"/tests/gpu/test_decode_kernels.py ${REHEARSE:+-k "length and 4"} ;;
        decode) "$python" -m benchmarks.decode_kernels --out "$out/decode.json" ${REHEARSE:+--tiny --seconds 0.1} ;;
        *) echo "unknown part $1" >&2; return 2 ;;
    esac
}

parts=("$@")
[[ ${#parts[@]} == 0 ]] && parts=(install doctor kernels kernel-tests generation-tests decode decode-tests)
for name in "${parts[@]}"; do
    [[ $# == 0 && -f $out/$name.done ]] && continue
    echo "== $name"
    start=$SECONDS
    export -f part
    export out python root
    timeout "$limit" bash -c 'part "$1"' part "$name" 2>&1 | tee "$out/$name.log" | tail -n "${LINES_SHOWN:-15}"
    code=${PIPESTATUS[0]}
    echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
    # Tests that fail are an answer, too.
    [[ $code == 0 || ($code == 1 && $name == *-tests) ]] && touch "$out/$name.done"
done
grep -hE "^(FAILED|ERROR)" "$out"/*.log > "$out/failures.txt" 2>/dev/null
echo "results in $out; $(wc -l < "$out/failures.txt") failures"
