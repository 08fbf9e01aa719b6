#!/usr/bin/env bash
# Builds the wheels of all that fd-scale needs into a folder, on a machine with a network; nodes without one install
# them (FD_WHEELHOUSE in cluster.env). The hashes of requirements.lock are checked here.
#   PYTHON=/opt/python3.11/bin/python3 bash slurm/wheelhouse.sh /shared/wheels
set -euo pipefail
target=$(realpath -m "${1:?usage: wheelhouse.sh FOLDER}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -m pip wheel --no-deps --require-hashes --requirement requirements.lock --wheel-dir "$target"
"$python" -m pip wheel --no-deps --wheel-dir "$target" .
echo "$(find "$target" -name '*.whl' | wc -l) wheels in $target"
