#!/usr/bin/env bash
# Every shell script of the project: bash -n and shellcheck; the Dockerfile: hadolint. check_shell.sh BIN
# BIN is the environment's. Both tools are there on x86_64 Linux; elsewhere what is not run is said.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 status=0
mapfile -d '' scripts < <(find .ci launchers scripts -type f \( -name '*.sh' -o -name '*.sbatch' -o -name run \) -print0)

lint() {
    local tool=$1
    shift
    if [[ -x $bin/$tool ]]; then "$bin/$tool" "$@" || status=1; else echo "no $tool here: not run" >&2; fi
}

for script in "${scripts[@]}"; do
    bash -n "$script" || status=1
done
lint shellcheck "${scripts[@]}"
lint hadolint launchers/docker/Dockerfile
exit $status
