#!/usr/bin/env bash
# bash -n on every shell script of the project.
set -euo pipefail
cd "$(dirname "$0")/.."
status=0
while IFS= read -r -d '' script; do
    bash -n "$script" || status=1
done < <(find .ci launchers scripts -type f \( -name '*.sh' -o -name '*.sbatch' -o -name run \) -print0)
exit $status
