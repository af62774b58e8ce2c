# shellcheck shell=bash
# What the job scripts share. Sourced, not run, by scripts that set `script`, their name, and `here`, their folder.

: "${script:?}" "${here:?}"
repository=$(cd "$here/../.." && pwd)

say() {
    echo "$(basename "$script"): $*"
}

die() {
    echo "$(basename "$script"): error: $*" >&2
    exit 2
}

# Settings of the site: cluster.env, a file that the user copies and edits. A rehearsal does without.
load_site() {
    local env=${CLUSTER_ENV:-$repository/cluster.env}
    LAUNCH=()
    if [[ -f $env ]]; then
        # shellcheck source=/dev/null
        . "$env" || die "$env ends with an error: correct it"
    elif [[ ${REHEARSE:-} == 1 ]]; then
        [[ ! -d $repository/.venv ]] || PATH=$repository/.venv/bin:$PATH
    else
        die "$env is missing: cp scripts/slurm/cluster.env.example cluster.env, and edit it (or try REHEARSE=1)"
    fi
    LOGS=${LOGS:-$repository/logs}
    export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# value_of FLAG DEFAULT ARGUMENT...: what the last FLAG VALUE or FLAG=VALUE among the arguments says.
value_of() {
    local flag=$1 value=$2
    shift 2
    while [[ $# -gt 0 ]]; do
        case $1 in
            "$flag") value=${2-} ;;
            "$flag"=*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# loss_name NAME: v3 is short for fastclip-v3.
loss_name() {
    case $1 in
        v[0-3]) echo "fastclip-$1" ;;
        *) echo "$1" ;;
    esac
}

# read_flags FILE LOSS: appends to the array `flags` those before the first [section] and those of [LOSS].
read_flags() {
    local file=$1 loss=$2 section="" line value
    while IFS= read -r line || [[ -n $line ]]; do
        case $line in
            "" | "#"*) continue ;;
            "["*"]") section=${line:1:-1} && continue ;;
            --*) ;;
            *) die "$file: this line is no flag, comment or [section]: $line" ;;
        esac
        [[ -z $section || $section == "$loss" ]] || continue
        flags+=("${line%% *}")
        [[ $line == *" "* ]] || continue
        value=${line#* }
        if [[ $value == *"\$DATA"* ]]; then
            [[ -n ${DATA:-} ]] || die "$file needs DATA, the folder of the data sets: set it in cluster.env"
            value=${value//"\$DATA"/$DATA}
        fi
        flags+=("$value")
    done <"$file"
}

# why_ended CODE: what an exit code of srun says of the tasks. Of those that ended differently srun gives the highest code
# or signal, so the one that it sent to the others can hide that of the task that ended first.
why_ended() {
    local again="see above which task srun names first and what it says, then submit the job again, and it continues"
    case $1 in
        134) echo "tasks aborted, as NCCL lets them if a rank is lost or does not come within --dist-timeout: $again" ;;
        137 | 143) echo "tasks were killed, by srun when another one had failed, or for want of memory: $again" ;;
        *) echo "see above what the first task says" ;;
    esac
}

# check_gpus: one task a GPU, as many as SLURM gives. A rehearsal needs none.
check_gpus() {
    [[ ${REHEARSE:-} != 1 ]] || return 0
    local gpus=${SLURM_GPUS_ON_NODE:-0} tasks=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    ((gpus == tasks && SLURM_NTASKS == tasks * SLURM_JOB_NUM_NODES)) ||
        die "$SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes with $gpus GPUs each: give sbatch --gres=gpu:G and" \
            "--ntasks-per-node=G with the same G"
}

# Generated shards for a rehearsal: made once, renamed when complete, so that several jobs may ask for them at once.
rehearsal_data() {
    local data=$repository/data/rehearsal made
    if [[ ! -d $data ]]; then
        mkdir -p "$repository/data"
        made=$(mktemp -d "$data.XXXXXX")
        (cd "$repository" && python -m benchmarks.glyph_data --out "$made/glyphs" --characters 32 --train-per-character 16 \
            --val-per-character 4 --train-shards 32 --val-shards 1) >&2 || die "benchmarks.glyph_data made no data"
        mv -nT "$made/glyphs" "$data"
        rm -rf "$made"
    fi
    echo "$data"
}

# preflight ARGUMENT...: everything that can be seen to be wrong before the tasks start, in one line.
preflight() {
    local output code=0
    output=$("${LAUNCH[@]}" python -m open_clip_train_fastclip.preflight "$@" 2>&1) || code=$?
    output=${output##*$'\n'}
    ((code == 0)) || die "${output#preflight: error: }"
    echo "$output"
}
