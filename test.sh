#!/bin/sh
# Ask the trained model:   sh test.sh [IMAGE_OR_FOLDER] [--question TEXT]... [--checkpoint DIR] [key=value ...]
# Score it on a QA file:   sh test.sh --qa FILE
set -eu
ROOT=$(cd "$(dirname "$0")" && pwd)
REQUIREMENTS="requirements.txt"
. "$ROOT/setup.sh"
exec "$PYTHON" "$ROOT/test.py" "$@"
