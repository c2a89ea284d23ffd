#!/usr/bin/env bash
# All that needs a GPU, in parts of under nine minutes each, 25 minutes together: tests, suites, the report.
#
#   benchmarks/gpu.sh OUT [PART ...]     without parts: all that OUT does not have yet, in order
#
# Needs torch, triton, transformers and pytest, and no network. OUT gets the results, the log of each part,
# report/ and summary.txt. A part that was stopped or went wrong is run again by the next call, and a suite goes
# on where it was stopped. REHEARSE=1 runs small versions on a CPU.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT [PART ...]}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Seconds that each part may take; together 25 minutes. LIMIT replaces them all.
declare -A limits=(
    [install]=40 [doctor]=20 [fusion]=100 [kernel-tests]=110 [attention-tests]=110 [attention]=120 [decode]=110
    [decode-tests]=110 [hf]=210 [generate]=130 [generate-growing]=90 [quant]=90 [train]=120
    [generation-tests]=110 [report]=30
)
order=(install doctor fusion kernel-tests attention-tests attention decode decode-tests hf generate generate-growing quant train generation-tests report)

# What is installed, and beside it what is not part of the package. The checkout's own `fxopt` lacks its passes.
mkdir -p "$out/site"
ln -sfn "$root/benchmarks" "$out/site/benchmarks"
cd "$out/site" || exit 1

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$out/site"
export FXOPT_CACHE_DIR="$out/kernels" TORCHINDUCTOR_CACHE_DIR="$out/inductor"
if [[ ${REHEARSE:-0} == 1 ]]; then
    export FXOPT_REHEARSE_GPU=1
else
    unset REHEARSE
fi

suite() { # name or name-kind, then arguments for a rehearsal, --, arguments for a GPU
    local label=$1 name=${1%%-*} small=() full=()
    shift
    while [[ $1 != -- ]]; do small+=("$1"); shift; done
    shift
    full=("$@")
    if [[ ${REHEARSE:-0} == 1 ]]; then
        "$python" -m fxopt bench "$name" --size tiny --seconds 0.1 \
            --out "$out/$label-tiny-cpu.jsonl" --resume "${small[@]}"
    else
        "$python" -m fxopt bench "$name" --size full --device cuda --dtype bfloat16 \
            --out "$out/$label-full-gpu.jsonl" --resume "${full[@]}"
    fi
}

install() {
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade --target "$out/site" "$root" || return
    # The results are to say of which commit they are, and what is installed has no history.
    { git -C "$root" rev-parse --short=12 HEAD > "$out/site/fxopt/COMMIT"; } 2> /dev/null || rm -f "$out/site/fxopt/COMMIT"
}

interpreted() { # kernels of a rehearsal run in Triton's interpreter; suites need Inductor, which it cannot serve
    [[ ${REHEARSE:-0} == 1 ]] && export TRITON_INTERPRET=1
    "$@"
}

part() { # its command, by name
    case $1 in
        install) install ;;
        doctor) "$python" -m fxopt doctor ;;
        kernel-tests) interpreted "$python" -m pytest -q -p no:cacheprovider \
            "$root"/tests/gpu/test_kernels.py ${REHEARSE:+-k "norm or softmax or columns"} ;;
        attention-tests) interpreted "$python" -m pytest -q -p no:cacheprovider \
            "$root"/tests/gpu/test_attention_kernels.py -k "$([[ ${REHEARSE:-0} == 1 ]] && echo causal || echo bfloat16 or widths or descriptors or bits)" ;;
        generation-tests) interpreted "$python" -m pytest -q -p no:cacheprovider \
            "$root"/tests/gpu/test_generation.py ${REHEARSE:+-k llama} ;;
        fusion) interpreted suite fusion --models gate -- --seconds 1 ;;
        attention) suite attention --lengths 64 -- --seconds 1 ;;
        # What compiles soonest comes first: a later call goes on with what did not fit.
        hf) suite hf --models bert --infer -- --seconds 2 --infer --models \
            llama-3.2-1b,bert-large,vit-large,llama-3.1-8b,gemma-2-9b,qwen2.5-7b,t5-large,whisper-large ;;
        # As transformers runs a static cache; over one that grows, CUDA graphs are recorded for every length.
        generate) suite generate --models llama --batch 1 --lengths 8 --caches static --quantize dense,int4 --tokens 2 \
            -- --seconds 2 \
            --caches static --mode reduce-overhead --kv auto,int8 --models llama-3.2-1b,llama-3.1-8b \
            --quantize dense --batch 1 --lengths 2048 ;;
        generate-growing) suite generate-growing --models llama --batch 1 --lengths 8 --caches dynamic --quantize dense --tokens 2 -- \
            --seconds 2 --caches dynamic --models llama-3.2-1b,qwen2.5-7b --quantize dense --batch 1,8 --lengths 2048 ;;
        quant) suite quant --models 256x128 --lengths 1 --quantize int8,nf4 -- --seconds 1 \
            --models 4096x4096,14336x4096,llama-3.2-1b --lengths 1,128 --quantize int8,int4,nf4 ;;
        train) suite train --models bert -- --seconds 2 --models bert-large,llama-3.2-1b ;;
        report) "$python" -m benchmarks.report --results "$out" --out "$out/report" ;;
        decode) interpreted "$python" -m benchmarks.decode_kernels --out "$out/decode.json" ${REHEARSE:+--tiny --seconds 0.1} ;;
        decode-tests) interpreted "$python" -m pytest -q -p no:cacheprovider \
            "$root"/tests/gpu/test_decode_kernels.py ${REHEARSE:+-k "length and 4"} ;;
        *) echo "unknown part $1" >&2; return 2 ;;
    esac
}

finished() { # part, exit code: whether it need not be run again. What fails a test or a row is an answer, too.
    case $1 in
        *-tests | report) [[ $2 == 0 || $2 == 1 ]] ;;
        fusion | attention | hf | generate | generate-growing | quant | train)
            [[ $2 == 0 || $2 == 1 ]] && grep -qs '"kind": "summary"' "$out/$1"-{tiny-cpu,full-gpu}.jsonl ;;
        *) [[ $2 == 0 ]] ;;
    esac
}

parts=("$@")
[[ ${#parts[@]} == 0 ]] && parts=("${order[@]}")
for name in "${parts[@]}"; do
    [[ $# == 0 && -f $out/$name.done ]] && continue
    echo "== $name"
    start=$SECONDS
    export -f part suite install interpreted
    export out python root
    # As from the keyboard: a suite that is stopped writes what it has.
    timeout -s INT -k 20 "${LIMIT:-${limits[$name]:-500}}" bash -c 'part "$1"' part "$name" 2>&1 \
        | tee "$out/$name.log" | tail -n "${LINES_SHOWN:-15}"
    code=${PIPESTATUS[0]}
    echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
    finished "$name" "$code" && touch "$out/$name.done"
done
grep -hE "^(FAILED|ERROR)|: error:|Error: " "$out"/*.log > "$out/failures.txt" 2>/dev/null
echo "results in $out; $(wc -l < "$out/failures.txt") failures"
