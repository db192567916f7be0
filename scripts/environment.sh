#!/usr/bin/env bash
# Finds a Python that can hold the environment and hands over to environment.py.
# Usage: scripts/environment.sh {python|find|clean} [options of environment.py]; PYTHON=... overrides the choice.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# A pyenv shim may exist for a version that is not active, so only running it tells.
usable() {
    "$1" -I -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    # 3.11 first: that is where the pinned versions were run.
    for candidate in python3.11 python3 python3.12; do
        if usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

if [[ -n ${PYTHON:-} ]]; then
    usable "$PYTHON" || { echo "PYTHON=$PYTHON: does not run, or is no Python 3.11 or 3.12" >&2; exit 2; }
    python=$PYTHON
elif ! python=$(find_python); then
    [[ ${1:-} != find ]] || exit 1
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "no Python 3.11 or 3.12 found: installing Debian's" >&2
        apt-get update -q >&2 && apt-get install -yq --no-install-recommends python3 python3-venv >&2
    fi
    python=$(find_python) || {
        echo "no Python 3.11 or 3.12 found: install one (Debian: apt-get install python3 python3-venv) or give PYTHON=..." >&2
        exit 2
    }
fi

exec "$python" -I "$here/environment.py" "$@"
