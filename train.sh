#!/bin/sh
# Train what config.yaml says:   sh train.sh [--config FILE] [--stage NAME] [--resume auto|none|DIR] [--check] [key=value ...]
# Several GPUs share each step's samples; the config stays the same:
#   LAUNCHER="torchrun --nproc_per_node 4" sh train.sh
set -eu
ROOT=$(cd "$(dirname "$0")" && pwd)
REQUIREMENTS="requirements.txt"
. "$ROOT/setup.sh"
if [ -n "${LAUNCHER:-}" ]; then
    PATH="$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH" exec $LAUNCHER "$ROOT/train.py" "$@"
fi
exec "$PYTHON" "$ROOT/train.py" "$@"
