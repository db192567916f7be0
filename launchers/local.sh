#!/usr/bin/env bash
# Runs a recipe on several ranks of this machine (launchers/local.py says how):
#   launchers/local.sh --nproc 2 recipes/prune.py +conf=width trainer.tensor_model_parallel_size=2
# The interpreter is $NEMO_MINITRON_PYTHON, else the project's environment, set up if need be.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${NEMO_MINITRON_PYTHON:-$(make -s --no-print-directory -C "$root" python)}
# exec: signals reach the launcher itself, not a shell above it.
exec "$python" "$root/launchers/local.py" "$@"
