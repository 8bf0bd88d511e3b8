# Sets PYTHON to a Python that has the packages of $REQUIREMENTS (files, relative to $ROOT). Sourced by train.sh, test.sh and
# tests/run.sh, which set both. Takes, in this order: $PYTHON if the user set it, .venv, the python3 on the PATH; and where
# none of them has the packages, makes .venv and installs them there.

has_packages() {
    command -v "$1" >/dev/null 2>&1 && "$1" - "$ROOT" $REQUIREMENTS <<'CHECK'
import sys
from importlib.metadata import PackageNotFoundError, version

if sys.version_info < (3, 11):
    sys.exit(1)
others = []
root, *paths = sys.argv[1:]
for path in paths:
    for line in open(f"{root}/{path}", encoding="utf-8"):
        name, _, pinned = line.strip().partition("==")
        if not name or name.startswith("#"):
            continue
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            sys.exit(1)
        if found != pinned:
            others.append(f"{name} {found} (tested with {pinned})")
        if name == "transformers" and int(found.split(".")[0]) < 5:
            sys.exit(1)
if others:
    print("note: other versions than in requirements.txt: " + ", ".join(others), file=sys.stderr)
CHECK
}

if [ -n "${PYTHON:-}" ]; then
    has_packages "$PYTHON" || {
        echo "error: PYTHON=$PYTHON lacks packages of: $REQUIREMENTS; install them there, or unset PYTHON." >&2
        exit 2
    }
elif has_packages "$ROOT/.venv/bin/python"; then
    PYTHON="$ROOT/.venv/bin/python"
elif has_packages python3; then
    PYTHON=python3
else
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "error: Python 3.11 or newer is needed, found: $(python3 --version 2>&1 || echo none)" >&2
        exit 2
    }
    echo "Installing the packages into $ROOT/.venv (once)"
    [ -x "$ROOT/.venv/bin/python" ] || python3 -m venv "$ROOT/.venv"
    PYTHON="$ROOT/.venv/bin/python"
    for file in $REQUIREMENTS; do
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file" || exit 1
    done
fi
