#!/usr/bin/env bash
# One rank, for launchers/agent.py: rank.sh LOGS STATE COMMAND...
# It leaves its process id where the launcher finds it to forward signals, and sends its output to its own files.
set -euo pipefail
logs=$1/rank$RANK state=$2
shift 2
echo $$ >"$state/$RANK.part"
mv "$state/$RANK.part" "$state/$RANK.pid"
# exec keeps that id: signals reach the recipe itself, not a shell around it.
exec "$@" >"$logs.stdout.log" 2>"$logs.stderr.log"
