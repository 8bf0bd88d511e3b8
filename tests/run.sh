#!/bin/sh
# All checks:   sh tests/run.sh          One file, without the linter and type checker:   sh tests/run.sh tests/config/test_load.py
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
REQUIREMENTS="requirements.txt tests/requirements.txt"
. "$ROOT/setup.sh"
if [ "$PYTHON" = "$ROOT/.venv/bin/python" ]; then # for the tests with real models, which are skipped without them
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements-emoji.txt" ||
        echo "note: requirements-emoji.txt is not installed; the tests with real models are skipped" >&2
fi
cd "$ROOT"
if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
    export OMP_NUM_THREADS=1 # the tests' models are too small for threads; two files at a time use two cores instead
    set -- -n 2 --dist loadfile
fi
exec "$PYTHON" -m pytest -q "$@"
