# Sets PYTHON to a Python that has the packages of $REQUIREMENTS (files, relative to $ROOT). train.sh, test.sh and
# tests/run.sh set both variables and source this file. It takes the first that has the packages: $PYTHON if the user set
# it, .venv, the python3 on the PATH. If none has them, it creates .venv and installs them there.

has_packages() {
    command -v "$1" >/dev/null 2>&1 && "$1" - "$ROOT" $REQUIREMENTS <<'CHECK'
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C ends it without a traceback
import sys
from importlib.metadata import PackageNotFoundError, version

if sys.version_info < (3, 11):
    sys.exit(1)
OLDEST = {"torch": (2, 9), "transformers": (5, 17), "peft": (0, 19), "accelerate": (1, 12)}
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
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST.get(name, ()):
            sys.exit(1)
if others:
    print("note: other versions than in requirements.txt: " + ", ".join(others), file=sys.stderr)
CHECK
}

fail() {
    echo "error: $1" >&2
    exit 2
}

if [ -n "${PYTHON:-}" ]; then
    has_packages "$PYTHON" || fail "PYTHON=$PYTHON lacks packages of: $REQUIREMENTS; install them there, or unset PYTHON."
elif has_packages "$ROOT/.venv/bin/python"; then
    PYTHON="$ROOT/.venv/bin/python"
elif has_packages python3; then
    PYTHON=python3
else
    PYTHON="$ROOT/.venv/bin/python"
    if [ -e "$ROOT/.venv" ] || [ -L "$ROOT/.venv" ]; then # never deleted: it may be the user's own
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 ||
            fail "$ROOT/.venv exists, but has no Python 3.11 or newer; move it away or remove it, then run the command again."
    else
        BASE=
        for name in python3 python3.13 python3.12 python3.11; do
            if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
                BASE=$name
                break
            fi
        done
        [ -n "$BASE" ] || fail "Python 3.11 or newer is needed; found $(python3 --version 2>&1 || echo none)."
        "$BASE" -m venv --without-pip "$ROOT/.venv" || fail "cannot create $ROOT/.venv with $BASE."
    fi
    if "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1; then
        install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$1"; }
    elif command -v uv >/dev/null 2>&1; then # `uv venv` makes environments without pip
        install() { uv pip install --quiet --python "$PYTHON" -r "$1"; }
    else
        fail "$ROOT/.venv has no pip (on Debian and Ubuntu: apt install python3-venv), and uv is not installed either."
    fi
    echo "Installing the packages into $ROOT/.venv (once)"
    for file in $REQUIREMENTS; do
        install "$ROOT/$file" ||
            fail "$file could not be installed into $ROOT/.venv; fix the cause shown above, then run the command again."
    done
fi
