#!/bin/bash
# A real SLURM on this one machine, to rehearse and test the batch scripts. Needs root on Debian or Ubuntu.
#
#   eval "$(scripts/slurm/local_cluster.sh up --nodes 8 --gpus 4)"   # prints: export SLURM_CONF=...
#   scripts/slurm/local_cluster.sh down
#
# Node n1, n2, ... are slurmd processes with host names of their own; their GPUs are pretended. Missing packages are
# installed. Everything else lies in one folder (LOCAL_CLUSTER, default /tmp/fastclip-local-cluster) and in marked lines
# of /etc/hosts; `down` ends all jobs and daemons and removes both. The packages stay.
set -euo pipefail

folder=${LOCAL_CLUSTER:-/tmp/fastclip-local-cluster}
conf=$folder/slurm.conf
packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge)
port=16817 # of slurmctld; slurmd of node n1, n2, ... takes 17001, 17002, ...
mark="# fastclip-local-cluster $folder"

die() {
    echo "local_cluster.sh: error: $*" >&2
    exit 2
}

usage="usage: local_cluster.sh up|down [--nodes 8] [--gpus 4]"
[[ $# -gt 0 ]] || die "$usage"
action=$1
shift
nodes=8 gpus=4
while [[ $# -gt 0 ]]; do
    [[ $# -gt 1 && $2 =~ ^[1-9][0-9]?$ ]] || die "$1 needs a number from 1 to 99; $usage"
    case $1 in
        --nodes) nodes=$2 ;;
        --gpus) gpus=$2 ;;
        *) die "unknown option $1; $usage" ;;
    esac
    shift 2
done

installed() {
    command -v slurmctld slurmd sbatch munged >/dev/null
}

install_packages() {
    installed && return
    command -v apt-get >/dev/null || die "SLURM is missing and apt-get as well: install ${packages[*]}"
    echo "installing ${packages[*]}" >&2
    # A package list that is not the newest is good enough if the packages are still there.
    apt-get update -qq >&2 || true
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >&2 || true
    installed || die "these packages cannot be installed: ${packages[*]} (apt-get install says why)"
}

# A daemon that has ended can linger as a zombie, which kill -0 takes for alive.
alive() {
    local state
    state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) || true
    [[ -n $state && $state != [ZX] ]]
}

# has PID LINE: whether LINE is in its environment, so that a later process with an old number is not taken for ours.
has() {
    alive "$1" && { tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null | grep -q "^$2"
}

daemons() {
    local file pid
    for file in "$folder"/run/*.pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        if has "$pid" "LOCAL_CLUSTER_DAEMON=$folder\$"; then echo "$pid"; fi
    done
}

# What jobs left running: slurmstepd, and tasks, which have the cluster's configuration and the name of a node.
job_processes() {
    local path pid command
    for path in /proc/[0-9]*; do
        pid=${path#/proc/}
        command=$({ tr '\0' ' ' <"$path/cmdline"; } 2>/dev/null) || continue
        if has "$pid" "SLURM_CONF=$conf\$" && has "$pid" SLURMD_NODENAME=; then
            echo "$pid"
        elif [[ $command == slurmstepd:* ]] && has "$pid" "LOCAL_CLUSTER_DAEMON=$folder\$"; then
            echo "$pid"
        fi
    done
}

end() { # end SIGNAL TENTHS PID...: signal, then wait until they are gone or the time is up
    local signal=$1 tenths=$2 pid left
    shift 2
    for pid in "$@"; do kill "-$signal" "$pid" 2>/dev/null || true; done
    while ((tenths-- > 0)); do
        left=0
        for pid in "$@"; do if alive "$pid"; then left=1; fi; done
        ((left)) || return 0
        sleep 0.1
    done
    return 0
}

write_configuration() {
    local i names="n[1-$nodes]"
    mkdir -p "$folder"/{run,log,state,spool,dev}
    # munged insists on a folder that nobody else can write to
    chmod 755 "$folder" "$folder"/run
    for ((i = 0; i < gpus; i++)); do [[ -e $folder/dev/nvidia$i ]] || mknod "$folder/dev/nvidia$i" c 1 3; done
    [[ -s $folder/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    if ((gpus > 1)); then
        echo "Name=gpu File=$folder/dev/nvidia[0-$((gpus - 1))]"
    else
        echo "Name=gpu File=$folder/dev/nvidia0"
    fi >"$folder/gres.conf"
    cat >"$conf" <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=10
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
MpiDefault=none
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
TreeWidth=64
SlurmdTimeout=300
MinJobAge=3600
JobRequeue=1
KillWait=5
SchedulerParameters=bf_interval=5,sched_min_interval=0,sched_interval=2
CONF
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=n$i NodeHostname=n$i NodeAddr=127.0.1.$i Port=$((17000 + i)) Sockets=2 CoresPerSocket=32" \
            "ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:$gpus State=UNKNOWN"
    done >>"$conf"
    echo "PartitionName=local Nodes=$names Default=YES MaxTime=UNLIMITED State=UP" >>"$conf"
}

remove_hosts() {
    # written in place: /etc/hosts may be a mount of its own
    local kept
    kept=$(grep -vF "$mark" /etc/hosts || true)
    [[ $kept == "$(cat /etc/hosts)" ]] || printf '%s\n' "$kept" >/etc/hosts
}

up() {
    [[ $(id -u) -eq 0 ]] || die "the cluster needs root, for host names of its own: run it as root, or in a container"
    if [[ -n $(daemons) ]]; then
        [[ $(cat "$folder/size" 2>/dev/null) == "$nodes $gpus" ]] ||
            die "a cluster of another size is up in $folder: first local_cluster.sh down"
    else
        install_packages
        ! (: </dev/tcp/127.0.0.1/$port) 2>/dev/null ||
            die "port $port is taken, perhaps by a cluster in another folder: end it with LOCAL_CLUSTER=FOLDER"
        remove_hosts
        write_configuration
        for ((i = 1; i <= nodes; i++)); do echo "127.0.1.$i n$i $mark"; done >>/etc/hosts
        echo "$nodes $gpus" >"$folder/size"
        export SLURM_CONF=$conf LOCAL_CLUSTER_DAEMON=$folder
        munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
            --pid-file="$folder/run/munged.pid" --seed-file="$folder/munge.seed" --log-file="$folder/log/munged.log" \
            >&2 || die "munged does not start: see $folder/log/munged.log"
        slurmctld -f "$conf" >&2 || die "slurmctld does not start: see $folder/log/slurmctld.log"
        for ((i = 1; i <= nodes; i++)); do
            unshare --uts bash -c "hostname n$i && exec slurmd -f '$conf' -N n$i" >&2 ||
                die "slurmd of n$i does not start: see $folder/log/slurmd-n$i.log"
        done
    fi
    export SLURM_CONF=$conf
    for ((i = 0; i < 300; i++)); do
        if (($(sinfo -h -N -t idle,mixed,allocated,completing -o %N 2>/dev/null | wc -l) == nodes)); then
            echo "$nodes nodes with $gpus GPUs each are up" >&2
            echo "export SLURM_CONF=$conf"
            return
        fi
        sleep 0.1
    done
    die "not all nodes came up in 30 seconds: see $folder/log"
}

down() {
    local pids
    [[ -d $folder ]] || { remove_hosts && return; }
    if [[ -n $(daemons) ]]; then
        SLURM_CONF=$conf timeout 10 scancel --state=PENDING,RUNNING,SUSPENDED -u root 2>/dev/null || true
        for ((i = 0; i < 100; i++)); do
            [[ -n $(SLURM_CONF=$conf timeout 5 squeue -h 2>/dev/null) ]] || break
            sleep 0.1
        done
    fi
    mapfile -t pids < <(daemons)
    end TERM 100 "${pids[@]}"
    mapfile -t pids < <(daemons; job_processes)
    end KILL 50 "${pids[@]}"
    rm -rf -- "$folder"
    remove_hosts
    echo "the cluster is down" >&2
}

case $action in
    up) up ;;
    down) down ;;
    *) die "unknown action $action; $usage" ;;
esac
