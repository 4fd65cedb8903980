#!/bin/sh
# Runs the GPU benchmarks in order of importance and goes on after a failure.
#
#   sh benchmarks/gpu_session.sh FOLDER small      # one GPU, Qwen3-0.6B shape, about 7 minutes
#   sh benchmarks/gpu_session.sh FOLDER large      # one GPU, Llama-3.1-8B shape, about 4 minutes
#   sh benchmarks/gpu_session.sh FOLDER two_gpus   # two GPUs, Llama-3.1-8B shape, about 4 minutes
#
# FOLDER gets a CSV file a benchmark and session.log with everything; the tables are printed.
# `python benchmarks/harness.py FOLDER` adds the rows to benchmarks/results.
# PYTHON names another interpreter, ONLY="gpu_bulk accuracy" some of the benchmarks.
# Each gets a limit in seconds; SECONDS_FACTOR multiplies the limits.

set -u
FOLDER=${1:?a folder for the results}
PART=${2:-small}
PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
export BENCHMARK_RESULTS="$FOLDER" PYTHONUNBUFFERED=1
FAILED=

run() {  # seconds, script, arguments
    limit=$(($1 * ${SECONDS_FACTOR:-1}))
    script=$2
    shift 2
    case " ${ONLY:-$script} " in *" $script "*) ;; *) return ;; esac
    echo "=== $script $*"
    begin=$(date +%s)
    timeout -s KILL "$limit" "$PYTHON" "$HERE/$script.py" "$@" >"$FOLDER/last.log" 2>&1
    status=$?
    echo "=== $script $*" >>"$FOLDER/session.log"
    cat "$FOLDER/last.log" >>"$FOLDER/session.log"
    if [ $status -eq 0 ]; then
        # The table; the long JSON lines and what others say are in the log.
        grep -a -v -e '^\[{' -e '^{"machine"' -e WARNING -e Warning -e '^ *$' -e '^# [a-z0-9]*: ' \
            "$FOLDER/last.log" | tail -n 40 | cut -c 1-400
    else
        FAILED="$FAILED $script"
        grep -a -v -e '^\[{' "$FOLDER/last.log" | tail -n 25 | cut -c 1-600
    fi
    echo "--- $script: exit status $status, $(($(date +%s) - begin)) s"
}

case $PART in
small)
    run 280 gpu_bulk --shape qwen3-0.6b --prompts 64 --length 2048
    run 110 accuracy --shape qwen3-0.6b
    run 120 gpu_memory --shape qwen3-0.6b --eager
    run 120 full_vocabulary --shape qwen3-0.6b --eager --stock-length 8
    ;;
large)
    run 300 gpu_bulk --shape llama-3.1-8b --prompts 32 --length 2048
    run 150 accuracy --shape llama-3.1-8b --prompts 4
    ;;
two_gpus)
    run 500 tensor_parallel --shape llama-3.1-8b
    ;;
# Every script at sizes that a CPU with two cores does in minutes.
try)
    run 200 gpu_bulk --shape llama-60m --layers 2 --prompts 4 --length 64 --rounds 2
    run 200 accuracy --shape llama-60m --layers 2 --prompts 2 --length 64
    run 200 gpu_memory --shape llama-60m --layers 2 --rows 256 --rounds 1
    run 200 full_vocabulary --shape llama-60m --layers 2 --length 64 --stock-length 8
    run 300 tensor_parallel --shape llama-60m --layers 2 --prompts 2 --length 64
    ;;
*)
    echo "no part is called $PART: small, large, two_gpus, try" >&2
    exit 2
    ;;
esac
rm -f "$FOLDER/last.log"
[ -z "$FAILED" ] || echo "failed:$FAILED"
[ -z "$FAILED" ]
