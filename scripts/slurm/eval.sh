#!/bin/bash
# Evaluates a checkpoint on one GPU: with OpenCLIP's own zero-shot ImageNet and retrieval, or on a suite of data sets.
#
#   sbatch scripts/slurm/eval.sh logs/my-run/checkpoints/epoch_37.pt
#   sbatch scripts/slurm/eval.sh weights.pt --model RN50 --imagenet-val /data/imagenet/val
#   SUITE=imagenet-variants sbatch scripts/slurm/eval.sh logs/my-run/checkpoints/epoch_37.pt
#
# The model is the one named in the run's params.txt, unless --model says it. IMAGENET_VAL (a folder of class folders)
# and RETRIEVAL_DATA (a csv of images and captions, or shards with --val-num-samples) come from cluster.env; at least
# one of them, or of their flags --imagenet-val and --val-data, is needed. Further arguments go to the training command.
# The results are printed, and kept in LOGS/eval-RUN-EPOCH-JOB/checkpoints/results.jsonl.
#
# SUITE is imagenet-variants, retrieval or datacomp; its data sets are in EVAL_DATA, see docs/data.md. Further arguments
# go to benchmarks.evaluate, and the results are in LOGS/eval-RUN-EPOCH-JOB/evaluate.jsonl.
#
#SBATCH --job-name=fastclip-eval
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=6
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

script=eval.sh
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "$script: error: start it with sbatch" >&2 && exit 2; }
# SLURM runs a copy of this file, and remembers where it came from.
here=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\(.*\)/$script.*|\1|p")
# shellcheck source=scripts/slurm/common.sh
. "$here/common.sh" || { echo "$script: error: keep $script in its folder, with common.sh" >&2 && exit 2; }
load_site

[[ $# -gt 0 && $1 != -* ]] || die "name a checkpoint: sbatch scripts/slurm/$script logs/RUN/checkpoints/epoch_N.pt"
checkpoint=$(realpath "$1")
shift
[[ -f $checkpoint ]] || die "$checkpoint: there is no such file"
run=$(dirname "$(dirname "$checkpoint")")
model=$(value_of --model "$(sed -n 's/^model: //p' "$run/params.txt" 2>/dev/null)" "$@")
[[ -n $model ]] || die "$run/params.txt does not say which model this is: add --model"
name=eval-$(basename "$run")-$(basename "$checkpoint" .pt)-$SLURM_JOB_ID
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

if [[ -n ${SUITE:-} ]]; then
    [[ -n ${EVAL_DATA:-} ]] || die "SUITE=$SUITE needs EVAL_DATA, the folder of its data sets: set it in cluster.env"
    export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
    srun --kill-on-bad-exit=1 "${LAUNCH[@]}" python -m benchmarks.evaluate "$checkpoint" --suite "$SUITE" \
        --data "$EVAL_DATA" --workers "${SLURM_CPUS_PER_TASK:-1}" --results "$LOGS/$name" --model "$model" "$@" ||
        die "the evaluation ended with exit code $?: see above"
    exit
fi

flags=(--resume "$checkpoint" --model "$model" --logs "$LOGS" --workers "${SLURM_CPUS_PER_TASK:-1}" --batch-size 512
    --name "$name")
# what else changes the model; numbers stand in brackets
while IFS=: read -r setting value; do
    value=${value# }
    case $setting in
        siglip | force_quick_gelu | force_custom_text) [[ $value != True ]] || flags+=("--${setting//_/-}") ;;
        force_image_size | force_context_length | image_mean | image_std)
            read -ra numbers <<<"${value//[^0-9.]/ }"
            ((${#numbers[@]} == 0)) || flags+=("--${setting//_/-}" "${numbers[@]}")
            ;;
        image_interpolation | image_resize_mode) [[ $value == None ]] || flags+=("--${setting//_/-}" "$value") ;;
    esac
done < <(cat "$run/params.txt" 2>/dev/null)
[[ -z ${IMAGENET_VAL:-} ]] || flags+=(--imagenet-val "$IMAGENET_VAL" --zeroshot-frequency 1)
[[ -z ${RETRIEVAL_DATA:-} ]] || flags+=(--val-data "$RETRIEVAL_DATA")
if [[ ${REHEARSE:-} == 1 ]]; then
    data=$(rehearsal_data)
    flags+=(--device cpu --precision fp32 --workers 1 --val-data "$data/val/00000.tar" --val-num-samples 128)
fi
flags+=("$@")
[[ -n $(value_of --imagenet-val "" "${flags[@]}")$(value_of --val-data "" "${flags[@]}") ]] ||
    die "no data to evaluate on: set IMAGENET_VAL or RETRIEVAL_DATA in cluster.env, or give --imagenet-val, --val-data"
preflight -- "${flags[@]}"

srun --kill-on-bad-exit=1 "${LAUNCH[@]}" python -m open_clip_train_fastclip.main "${flags[@]}" ||
    die "the evaluation ended with exit code $?: see above"
results=$(value_of --logs "" "${flags[@]}")/$(value_of --name "" "${flags[@]}")/checkpoints/results.jsonl
[[ -s $results ]] || die "the evaluation left no $results: see above"
cat "$results"
