#!/usr/bin/env bash
# Runs a command in the project's image, with the GPUs, the clone and the working directory of the host:
#   launchers/docker.sh build
#   launchers/docker.sh launchers/local.sh --nproc 8 recipes/prune.py +conf=llama31_8b/width source=DIR
#
# launchers/docker.sh [--dry-run] [--image NAME] [--base IMAGE] [--gpus all|none|N] [--mount SRC:DST]... build|COMMAND...
#   --dry-run prints docker's command line. --base: the image that `build` starts from. --mount: further directories,
#   such as those of checkpoints; SRC has to be there.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
    echo "launchers/docker.sh: $1" >&2
    exit 2
}

dry_run='' image=nemo_minitron:25.07 base='' gpus=all
mounts=("$root:$root")
[[ $PWD == "$root" ]] || mounts+=("$PWD:$PWD")
while [[ ${1:-} == --* ]]; do
    case $1 in
    --dry-run) dry_run=yes && shift && continue ;;
    --image | --base | --gpus | --mount) [[ $# -ge 2 ]] || refuse "$1: needs a value" ;;
    *) refuse "$1: no such option; there are --dry-run, --image, --base, --gpus and --mount" ;;
    esac
    case $1 in
    --image) image=$2 ;;
    --base) base=$2 ;;
    --gpus) gpus=$2 ;;
    --mount)
        [[ $2 == *:* ]] || refuse "--mount $2: must be SRC:DST"
        [[ -e ${2%%:*} ]] || refuse "--mount $2: ${2%%:*} is not here"
        mounts+=("$2")
        ;;
    esac
    shift 2
done
[[ $gpus =~ ^(all|none|[1-9][0-9]*)$ ]] || refuse "--gpus $gpus: must be all, none or a number"
[[ $# -ge 1 ]] || refuse "nothing to run: give build, or a command"

if [[ $1 == build ]]; then
    command=(docker build --tag "$image" ${base:+--build-arg "BASE=$base"} --file "$root/launchers/docker/Dockerfile" "$root/launchers/docker")
else
    # NCCL wants shared memory and locked pages; the user owns what the run writes.
    command=(docker run --rm --init)
    [[ $gpus == none ]] || command+=(--gpus "$gpus")
    command+=(--shm-size=16g --ulimit memlock=-1 --ulimit stack=67108864 --network=host)
    command+=(--user "$(id -u):$(id -g)" --env HOME=/tmp --env PYTHONPATH="$root")
    for name in NEMO_MINITRON_HOME HF_HOME; do
        if [[ -n ${!name:-} ]]; then
            command+=(--env "$name=${!name}")
            mounts+=("${!name}:${!name}")
        fi
    done
    for mount in "${mounts[@]}"; do command+=(--volume "$mount"); done
    command+=(--workdir "$PWD" "$image" "$@")
fi

if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}" && echo
    exit
fi
# A directory that docker makes for a mount is root's.
for name in NEMO_MINITRON_HOME HF_HOME; do [[ $1 == build || -z ${!name:-} ]] || mkdir -p "${!name}"; done
type docker >/dev/null 2>&1 || refuse "no docker on the path; --dry-run shows the command"
exec "${command[@]}"
