#!/usr/bin/env bash
#SBATCH --job-name=eig-fast
#SBATCH --nodes=1
#SBATCH --gpus=1
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#
# The same with few samples: rough estimates of the gain, soon.
#
#   bash eval_eig_fast.sh                     offline: a small model and a task made on this machine
#   MODEL=simplescaling/s1.1-1.5B TASK=openai_math bash eval_eig_fast.sh
#   bash eval_eig_fast.sh MODEL TASK --limit 100
#   sbatch eval_eig_fast.sh MODEL TASK        on a cluster; submit from here, or from the repository's root
#
# common.sh says what else the environment may hold.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
for folder in "${SLURM_SUBMIT_DIR:-}" "${SLURM_SUBMIT_DIR:-}/examples/eig"; do
    # Slurm runs a copy of this file, elsewhere.
    if [[ -n ${SLURM_SUBMIT_DIR:-} && -f $folder/common.sh ]]; then
        here=$folder
    fi
done
source "$here/common.sh"

choose_task "$@"
evaluate eig-fast "scale_func_name=expected_information_gain_reasoning,lambda_cost=0.05,\
beam_size=4,mc_samples=3,sample_length=${SAMPLE_LENGTH:-64},debug=true"
