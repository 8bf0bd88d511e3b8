#!/bin/sh
# All checks:   sh tests/run.sh          One file:   sh tests/run.sh tests/config/test_load.py
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
REQUIREMENTS="requirements.txt tests/requirements.txt"
. "$ROOT/setup.sh"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -q "$@"
