# Sourced by slurm/pretrain.sh and slurm/evaluate.sh: the site's settings, arguments, checks, queueing.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SBATCH_OPTIONS=${SBATCH_OPTIONS:-}
# shellcheck disable=SC1091
[ ! -f "$here/site.sh" ] || source "$here/site.sh"
# shellcheck source=launchers/environment.sh
source "$here/../launchers/environment.sh"

# Sets options (for sbatch), chain (jobs to queue), dry (yes: queue nothing) and arguments (the rest).
split_arguments() {
    options=() arguments=() chain=1 dry=""
    local word end=""
    for word in "$@"; do if [ "$word" = -- ]; then end=yes; fi; done
    while [ $# -gt 0 ]; do
        case $1 in
        --) shift; break ;;
        --chain=*) chain=${1#--chain=} ;;
        --dry-run) dry=yes ;;
        -*) options+=("$1") ;;
        *) if [ -n "$end" ]; then options+=("$1"); else break; fi ;;
        esac
        shift
    done
    arguments=("$@")
    case $chain in '' | *[!0-9]* | 0*)
        echo "error: --chain=$chain; give the number of jobs, such as --chain=5" >&2
        exit 2
        ;;
    esac
}

# Prints the numbers of processes that the job may have: inside it the one there is, before it one for each number of
# nodes that the options allow.
world_sizes() {
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        (place_in_slurm && echo $((NNODES * ${PROCESSES:-1})))
        return
    fi
    local word previous="" nodes="" gpus="" tasks="" all_gpus="" all_tasks="" count
    local -a given=(${SBATCH_GRES:+"--gres=$SBATCH_GRES"} ${SBATCH_GPUS:+"--gpus=$SBATCH_GPUS"}
        ${SBATCH_GPUS_PER_NODE:+"--gpus-per-node=$SBATCH_GPUS_PER_NODE"}) # sbatch reads these variables
    # shellcheck disable=SC2086
    for word in ${given[@]+"${given[@]}"} ${SBATCH_OPTIONS} ${options[@]+"${options[@]}"}; do
        case $previous in
        -N | --nodes | --gpus-per-node | --ntasks-per-node | --gres | -G | --gpus | -n | --ntasks) word=$previous=$word ;;
        esac
        case $word in
        -N=* | --nodes=*) nodes=${word#*=} ;;
        -N?*) nodes=${word#-N} ;;
        --gpus-per-node=*) gpus=$(count_gpus "$(typed "${word#*=}")") ;;
        --gres=*) gpus=$(count_gpus "${word#*=}") ;;
        -G=* | --gpus=*) all_gpus=$(count_gpus "$(typed "${word#*=}")") ;;
        -G?*) all_gpus=$(count_gpus "$(typed "${word#-G}")") ;;
        --ntasks-per-node=*) tasks=${word#*=} ;;
        -n=* | --ntasks=*) all_tasks=${word#*=} ;;
        -n[0-9]*) all_tasks=${word#-n} ;;
        esac
        previous=$word
    done
    if [ -z "$nodes" ] && [ -n "$tasks" ] && [ -n "$all_tasks" ]; then
        nodes=$(((all_tasks + tasks - 1) / tasks)) # Slurm takes as many as the tasks need
    fi
    nodes=${nodes:-1}
    for word in "${nodes%-*}" "${nodes#*-}" "${tasks:-1}" "${all_tasks:-1}"; do
        case $word in '' | *[!0-9]*)
            echo "error: '$word' among the options of sbatch is not a number of nodes or tasks" >&2
            return 2
            ;;
        esac
    done
    for ((count = ${nodes%-*}; count <= ${nodes#*-}; count++)); do
        [ -n "$tasks" ] || word=$(tasks_per_node "$all_tasks" "$count")
        if [ -z "${PROCESSES:-}${tasks}${word:-}${gpus}" ] && [ $((${all_gpus:-$count} % count)) != 0 ]; then
            echo "error: $all_gpus GPUs do not divide evenly among $count nodes; give --gpus-per-node" >&2
            return 2
        fi
        echo $((count * ${PROCESSES:-${tasks:-${word:-${gpus:-$((${all_gpus:-$count} / count))}}}}))
    done
}

# Prints a list of numbers or types of GPUs, such as h100:2,a100:4, as generic resources.
typed() { echo "gpu:${1//,/,gpu:}"; }

# Prints the sum of the GPUs among generic resources such as gpu:h100:8,nvme:1 (a type without a number is one), or
# nothing.
count_gpus() {
    local item sum=""
    for item in ${1//,/ }; do
        item=${item#gres/} item=${item//=/:}
        case $item in gpu | gpu:*) ;; *) continue ;; esac
        item=${item%%(*}
        case ${item##*:} in *[!0-9]*) sum=$((sum + 1)) ;; *) sum=$((sum + ${item##*:})) ;; esac
    done
    echo "$sum"
}

# Runs one of our programs once, where its packages are: here, else in a container on a node of the job.
ask() {
    if "$python" -c 'import yaml, pydantic' 2>/dev/null; then
        "$python" -m "$@"
    elif [ -n "${SLURM_JOB_ID:-}" ]; then
        # shellcheck disable=SC2086
        srun --nodes=1 --ntasks=1 ${SRUN_ARGS:-} "$python" -m "$@"
    else
        echo "note: $python here lacks the project's packages (are they in a container?); the job itself will check" >&2
    fi
}

# Queues this script with the options and arguments, as often as the chain is long, and ends the script.
queue() {
    local link job previous=""
    local -a after=() command
    [ "$chain" = 1 ] || export FUSIONTREE_CHAIN=$chain
    for ((link = 1; link <= chain; link++)); do
        # The next job starts unless this one succeeded; then Slurm removes the rest.
        [ -z "$previous" ] || after=("--dependency=afternotok:$previous" --kill-on-invalid-dep=yes)
        # shellcheck disable=SC2206
        command=(sbatch --parsable ${SBATCH_OPTIONS} ${options[@]+"${options[@]}"} ${after[@]+"${after[@]}"} "$1" "${arguments[@]}")
        if [ -n "$dry" ]; then
            echo "would queue: $(printf '%q ' "${command[@]}")"
            previous=JOB$link
            continue
        fi
        job=$("${command[@]}") || exit 2
        previous=${job%%;*}
        echo "queued job $previous"
    done
    exit 0
}

# True when another job, already queued, continues this one.
continued_elsewhere() { [ -n "${FUSIONTREE_CHAIN:-}" ] || [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; }

# Prints what the ranks' logs of this job end with, where they speak of an error.
show_errors() {
    local file
    for file in "$1"/job-"$SLURM_JOB_ID".*.log; do
        [ -f "$file" ] || continue
        tail -n 60 "$file" | grep -iE '^error|Error:|Killed|out of memory' | tail -n 3 | sed "s|^|${file##*/}: |" >&2
    done
}
