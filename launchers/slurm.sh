#!/usr/bin/env bash
# Submits a recipe to SLURM (launchers/slurm.py says how); --dry-run prints the job and submits nothing:
#   launchers/slurm.sh --dry-run recipes/distill.py +conf=llama31_8b/width +cluster=slurm
# The interpreter is $NEMO_MINITRON_PYTHON, else the project's environment, set up if need be.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${NEMO_MINITRON_PYTHON:-$(make -s --no-print-directory -C "$root" python)}
exec "$python" "$root/launchers/slurm.py" "$@"
