#!/usr/bin/env bash
#SBATCH --job-name=eig-comparative
#SBATCH --nodes=1
#SBATCH --gpus=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#
# Expected information gain against its rivals, and one table at the end.
#
#   bash eval_eig_comparative.sh                     offline: a small model and a task made on this machine
#   MODEL=simplescaling/s1.1-1.5B TASK=openai_math bash eval_eig_comparative.sh
#   bash eval_eig_comparative.sh MODEL TASK --limit 100
#   sbatch eval_eig_comparative.sh MODEL TASK        on a cluster; submit from here, or from the repository's root
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
budget=${FIXED_BUDGET:-2048}
step=sample_length=${SAMPLE_LENGTH:-128}
evaluate baseline
evaluate fixed-budget "scale_func_name=fixed_budget_reasoning,fixed_budget=$budget,$step"
evaluate entropy-threshold \
    "scale_func_name=entropy_threshold_reasoning,entropy_threshold=0.5,beam_size=12,$step"
evaluate eig \
    "scale_func_name=expected_information_gain_reasoning,lambda_cost=0.03,beam_size=12,mc_samples=8,$step"
python "$here/compare.py" "$OUTPUT" baseline fixed-budget entropy-threshold eig
