#!/bin/bash
# Submits every run of one of the paper's tables: the same flags for all, and one loss each.
#
#   scripts/slurm/submit_benchmark.sh medium --dry-run       # prints the commands only
#   scripts/slurm/submit_benchmark.sh large --seeds "2024 2025 2026" --nodes 8 -- --workers 8
#
# medium is CC3M, large is CC12M, on the 2 nodes with 4 GPUs each of the published tables. What follows -- goes to every
# training command. A run that was begun before, continues.
set -euo pipefail

script=submit_benchmark.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/slurm/common.sh
. "$here/common.sh"

usage="usage: $script medium|large [--dry-run] [--seeds \"2024 2025\"] [--nodes 2] [-- ARGUMENT...]"
dry_run='' seeds=2024 nodes=2
case ${1:-} in
    medium) recipe=medium_cc3m ;;
    large) recipe=large_cc12m ;;
    *) die "$usage" ;;
esac
shift
while [[ $# -gt 0 ]]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --seeds) seeds=${2-} && shift ;;
        --nodes) nodes=${2-} && shift ;;
        --) shift && break ;;
        *) die "unknown option $1; $usage" ;;
    esac
    shift || die "$usage"
done
[[ $seeds =~ ^[0-9]+( +[0-9]+)*$ ]] || die "--seeds takes whole numbers, separated by spaces; $usage"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes takes a number; $usage"
for flag in --loss --name --seed; do
    [[ -z $(value_of "$flag" "" "$@") ]] || die "$flag differs between the runs: leave it out"
done
[[ -n $dry_run ]] || load_site

submitted=0
for seed in $seeds; do
    for loss in clip sogclr isogclr v0 v1 v2 v3; do
        name=$recipe-$loss-seed$seed
        command=(env "RECIPE=$recipe" "LOSS=$loss" sbatch "--job-name=$name" "--nodes=$nodes" "$here/fastclip_32gpu.sh"
            --name "$name" --seed "$seed" "$@")
        if [[ -n $dry_run ]]; then
            printf '%q ' "${command[@]}" && echo
        else
            "${command[@]}" || die "sbatch refused $name; $submitted runs were submitted before it"
            submitted=$((submitted + 1))
        fi
    done
done
