# Shared by the scripts beside it; they say how to use them.
#
# Environment, all optional:
#   MODEL, TASK       what is evaluated; without them a small model and a task made on this machine
#   MAX_GEN_TOKS      tokens of a text at most (32768; what does not fit into the model is clipped)
#   MODEL_ARGS        further --model_args, as tensor_parallel_size=2,think_end_token=</think>
#   GEN_KWARGS        further --gen_kwargs of runs with a scaler, as max_tokens_thinking=4096
#   SAMPLE_LENGTH     tokens of a step of reasoning
#   FIXED_BUDGET      tokens of reasoning of the rule that has a fixed budget (2048)
#   INCLUDE_PATH      folder with tasks of your own
#   OUTPUT            where results and texts are written
#   PROBLEMS          questions of the task made on this machine (32)

# Positional arguments: MODEL TASK [options of lm_eval ...].
choose_task() {
    MODEL=${1:-${MODEL:-}}
    TASK=${2:-${TASK:-}}
    shift $(($# < 2 ? $# : 2))
    lm_eval_options=("$@")
    model_args=${MODEL_ARGS:+,$MODEL_ARGS}
    if [[ -z $MODEL && -z $TASK ]]; then
        use_local_task
    elif [[ -z $MODEL || -z $TASK ]]; then
        echo "give MODEL and TASK, or neither: MODEL=$MODEL TASK=$TASK" >&2
        return 1
    else
        max_gen_toks=${MAX_GEN_TOKS:-32768}
        local_kwargs=
    fi
    if [[ -n ${INCLUDE_PATH:-} ]]; then
        lm_eval_options+=(--include_path "$INCLUDE_PATH")
    fi
    OUTPUT=${OUTPUT:-eig-results}
}

# Offline: additions. A step is two sums, and the model knows no words to be overruled by.
use_local_task() {
    local folder
    folder=$(mktemp -d)
    trap "rm -rf '$folder'" EXIT
    export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache"
    MODEL=$(python "$here/local_task.py" "$folder/tasks" --problems "${PROBLEMS:-32}")
    TASK=additions
    INCLUDE_PATH=$folder/tasks
    model_args=,dtype=float32,max_model_len=256$model_args
    max_gen_toks=${MAX_GEN_TOKS:-96}
    SAMPLE_LENGTH=${SAMPLE_LENGTH:-2}
    FIXED_BUDGET=${FIXED_BUDGET:-4}
    local_kwargs=,thinking_n_ignore=0
}

# evaluate NAME [settings of a scaler]: one run of lm_eval. Later settings replace earlier ones.
evaluate() {
    local name=$1 kwargs=max_gen_toks=$max_gen_toks
    if [[ -n ${2:-} ]]; then
        kwargs+=,$2$local_kwargs${GEN_KWARGS:+,$GEN_KWARGS}
    fi
    echo "$name: $MODEL on $TASK with $kwargs" >&2
    lm_eval --model vllm-score --model_args "pretrained=$MODEL$model_args" --tasks "$TASK" \
        --gen_kwargs "$kwargs" --output_path "$OUTPUT/$name" --log_samples \
        ${lm_eval_options[@]+"${lm_eval_options[@]}"}
}
