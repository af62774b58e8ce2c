#!/bin/bash
# Trains on 8 nodes with 4 GPUs each, or on what sbatch is asked for. It continues after a time limit, a preemption, a
# lost node, or when it is submitted again.
#
#   sbatch scripts/slurm/fastclip_32gpu.sh
#   RECIPE=large_cc12m LOSS=v1 sbatch --nodes=2 scripts/slurm/fastclip_32gpu.sh --batch-size 128 --name my-run
#   sbatch scripts/slurm/fastclip_32gpu.sh --loss clip        # the OpenCLIP baseline, with the same flags
#
# RECIPE   a file of flags in scripts/slurm/recipes (default medium_cc3m)
# LOSS     v0, v1, v2, v3 (default), sogclr, isogclr, clip, siglip; --loss says the same
# REHEARSE=1   a tiny model on CPUs with generated data, to try all of this without GPUs (see local_cluster.sh)
# Everything after the script's name goes to the training command and wins over the recipe.
# Account, partition, environment and paths of your site belong into cluster.env.
#
#SBATCH --job-name=fastclip
#SBATCH --nodes=8
#SBATCH --gres=gpu:4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=6
#SBATCH --wait-all-nodes=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail

script=fastclip_32gpu.sh
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "$script: error: start it with sbatch" >&2 && exit 2; }
# SLURM runs a copy of this file, and remembers where it came from.
here=$(scontrol show job "$SLURM_JOB_ID" | sed -n "s|^ *Command=\(.*\)/$script.*|\1|p")
# shellcheck source=scripts/slurm/common.sh
. "$here/common.sh" || { echo "$script: error: keep $script in its folder, with common.sh" >&2 && exit 2; }
load_site

recipe=${RECIPE:-medium_cc3m}
file=$here/recipes/$recipe.args
[[ -f $file ]] || die "RECIPE=$recipe: there is no $file"
loss=$(loss_name "$(value_of --loss "${LOSS:-v3}" "$@")")
[[ -z ${LOSS:-} || $loss == "$(loss_name "$LOSS")" ]] || die "LOSS=$LOSS contradicts --loss $loss: leave one out"
grep -qxF "[$loss]" "$file" || die "the loss $loss has no section in $file, only" \
    "$(sed -n 's/^\[\(.*\)\]$/\1/p' "$file" | paste -sd ' ')"
name=$(value_of --name "$recipe-$loss" "$@")
logs=$(value_of --logs "$LOGS" "$@")
run=$logs/$name
check_gpus

[[ ${REHEARSE:-} != 1 ]] || DATA=$(rehearsal_data)
flags=(--name "$name" --logs "$logs")
read_flags "$file" "$loss"
[[ ${REHEARSE:-} != 1 ]] || read_flags "$here/recipes/rehearsal.args" "$loss"
given=()
continues=
for complete in "$run"/checkpoints/{epoch_*[0-9].pt,epoch_latest.pt,epoch_*_step_*[0-9]/index.json}; do
    [[ ! -e $complete ]] || continues=1
done
# --resume FILE is where a run starts. Once it has checkpoints of its own the same command, or a restart of the job,
# continues those; another FILE is passed on, and the training command refuses a name that is taken.
file_of_start=$(value_of --resume "" "$@")
[[ $file_of_start != latest ]] || file_of_start=
if [[ -n $continues && -n $file_of_start ]] && { ((${SLURM_RESTART_COUNT:-0} > 0)) ||
    [[ $file_of_start == "$(cat "$run/resumed_from" 2>/dev/null || echo "$file_of_start")" ]]; }; then
    say "$name started from $file_of_start and goes on from its own checkpoints"
    file_of_start=
fi
for argument in "$@"; do
    # a fresh state is for the start alone: what follows continues the run's own checkpoints
    [[ -n $continues && -z $file_of_start && $argument == --fastclip-fresh-state ]] || given+=("$argument")
done
flags+=("${given[@]}" --loss "$loss")
if [[ -z $file_of_start ]]; then
    flags+=(--resume latest)
elif [[ -z $continues && -f $run/job && -f $run/out.log ]]; then
    # --resume FILE is no restart for the training command, which refuses a name that has a log
    mv "$run/out.log" "$run/out-before-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.log"
fi

preflight --processes "$SLURM_NTASKS" --processes-per-node "$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))" -- "${flags[@]}"

mkdir -p "$run"
other=$(cat "$run/job" 2>/dev/null) || true
if [[ -n $other && $other != "$SLURM_JOB_ID" && $(squeue -h -j "$other" -o %T 2>/dev/null) == RUNNING ]]; then
    die "job $other is training $name now: wait for it, scancel it, or give another --name"
fi
echo "$SLURM_JOB_ID" >"$run/job"
[[ -n $continues ]] || echo "$file_of_start" >"$run/resumed_from"

# How many starts in a row found no checkpoint that is newer than the start before; kept in a file of that start's time.
idle_file=$run/idle_starts
idle_starts() {
    if [[ -n $(find "$run/checkpoints" -name '*.tmp' -prune -o \( -name '*.pt' -o -name index.json \) \
        -newer "$idle_file" -print -quit 2>/dev/null) ]]; then
        echo 0
    else
        echo $(($(cat "$idle_file") + 1))
    fi
}
most_idle=${MAX_IDLE_RESTARTS:-3}
stop_idle() {
    die "$most_idle restarts in a row brought no new checkpoint, so this job is not requeued again: give it more" \
        "--time or shorter epochs (--train-num-samples), then submit it again"
}
idle=0
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -f $idle_file ]]; then
    idle=$(idle_starts)
    ((idle <= most_idle)) || stop_idle
fi
echo "$idle" >"$idle_file"

step=
saved=75 # exit code of a training that has saved and asks to be started again

# Leaves if SLURM ends the job: a job that is cancelled shall not be requeued.
leave_if_ended() {
    local state
    state=$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null) || state=unknown
    [[ $state != RUNNING && $state != SIGNALING ]] || return 0
    say "ended by SLURM ($state): if it is not requeued, submit it again and it continues"
    wait
    exit 143
}

requeue() {
    (($(idle_starts) <= most_idle)) || stop_idle
    scontrol requeue "$SLURM_JOB_ID" || say "this site does not requeue: submit the job again, and it continues"
    exit "$saved"
}

on_signal() {
    local signal=$1 code=0 i
    trap '' USR1 TERM
    leave_if_ended
    say "got SIG$signal: the run saves and ends here, and the job is requeued"
    if [[ -n $step ]]; then
        kill -USR1 "$step" 2>/dev/null || true
        for ((i = 0; i < ${SAVE_SECONDS:-90}; i++)); do
            kill -0 "$step" 2>/dev/null || break
            sleep 1
        done
        kill -KILL "$step" 2>/dev/null || true
        wait "$step" || code=$?
        ((code != 0)) || { say "the training was complete before it could be stopped" && exit 0; }
    fi
    requeue
}
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)${MASTER_SUFFIX:-}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
# Since SLURM 22.05 srun does not take --cpus-per-task from sbatch: the data workers would share one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

say "$name: $SLURM_NTASKS processes on $SLURM_JOB_NUM_NODES nodes, ${SLURM_CPUS_PER_TASK:-1} CPUs each, start" \
    "${SLURM_RESTART_COUNT:-0}, $MASTER_ADDR:$MASTER_PORT"
srun --kill-on-bad-exit=1 "${LAUNCH[@]}" python -m open_clip_train_fastclip.main "${flags[@]}" &
step=$!
code=0
wait "$step" || code=$?
if ((code == saved)); then
    leave_if_ended
    say "the training got a signal of its own and saved: the job is requeued"
    requeue
fi
((code == 0)) || die "the training ended with exit code $code: $(why_ended "$code")"
say "done: $run"
