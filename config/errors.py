"""InputError, the one exception for bad input, the small helpers that write its messages, and how a script runs and ends."""

from __future__ import annotations

import codecs
import contextlib
import difflib
import errno
import importlib
import io
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

Value = TypeVar("Value")


class InputError(Exception):
    """Bad input that a person can fix. The message says what was found, where, what was expected and what to do.

    Scripts print it and exit with code 2.
    """


# Control characters (C0, DEL, C1), line and paragraph separators, and those that reorder the text around them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    """Return `text` as one line that any terminal can print.

    Control characters, which start escape sequences, characters that reorder text, and unpaired surrogates are written as
    escapes such as `\\x1b`. lines: keep line ends and tabs.
    """

    def escaped(match: re.Match) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        return character.encode("unicode_escape").decode()

    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub(escaped, text)


def is_text(text: str) -> bool:
    """Return whether `text` can be written in UTF-8: a file name or an argument of other bytes cannot."""
    return text.isascii() or not _SURROGATE.search(text)


def shortened(text: str, length: int = 200) -> str:
    """Return `text`, or if it has more than `length` characters its beginning and end."""
    if len(text) <= length:
        return text
    begin = length * 3 // 4
    return f"{text[:begin]} ... ({len(text):,} characters) ... {text[begin - length :]}"


def nearest(name: object, options: Iterable[object], cutoff: float = 0.5) -> str:
    """`; did you mean "x"?` for the option spelled most like `name`, or a full stop. cutoff: how alike, from 0 to 1."""
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=cutoff)
    return f'; did you mean "{close[0]}"?' if close else "."


def nearest_path(path: Path, others: Iterable[Path] = ()) -> str:
    """`; did you mean "x"?` for the path in the same folder, or among `others`, whose name is spelled most like that of
    `path`, which does not exist; or a full stop."""
    try:
        beside = sorted(path.parent.iterdir())
    except OSError:
        beside = []
    places = {other.name: other for other in [*others, *beside]}
    close = difflib.get_close_matches(path.name, list(places), n=1, cutoff=0.6)
    return f'; did you mean "{places[close[0]]}"?' if close else "."


def choose(table: Mapping[str, Value], key: str, what: str) -> Value:
    """Return `table[key]`. InputError lists the known keys and the nearest one; `what` names the choice."""
    if key not in table:
        raise InputError(f'{what}: "{key}" is unknown{nearest(key, table)} Known: {", ".join(sorted(table))}.')
    return table[key]


def is_hub_name(text: str) -> bool:
    """Return whether `text` has the form of a repository's name on the hub, `owner/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) is not None


# Makes one model.safetensors from one or more pytorch_model.bin. A tensor shared by two names is written under both.
HOW_TO_CONVERT = (
    'python -c "import glob, torch; from safetensors.torch import save_file; '
    "save_file({name: tensor.clone().contiguous() for file in glob.glob('pytorch_model*.bin') "
    "for name, tensor in torch.load(file, 'cpu', weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})\""
)


def how_to_convert(path: str | Path) -> str:
    """Return advice that ends a message about unreadable weights; `path` is their folder or hub name."""
    if Path(path).is_dir():
        return f"A pickled pytorch_model.bin is never opened; in its folder, convert it once: {HOW_TO_CONVERT}"
    folder = str(path).rpartition("/")[2]
    return (
        "A pickled pytorch_model.bin is never opened; download it, convert it once and put the folder into the config "
        f"instead of {path}: hf download {path} --local-dir {folder} && cd {folder} && {HOW_TO_CONVERT}"
    )


# Faults of the machine rather than of the program, also where Python does not name the file.
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "a file would exceed the size limit (ulimit -f)",
}
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_OF_THE_MACHINE = (*_FULL, *_FORBIDDEN, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENAMETOOLONG)


def run_script(main: str | Callable[[], int | None], check: Callable[[], object] | None = None) -> NoReturn:
    """Run a script's `main()` and exit with its result. No environment ends in a traceback.

    main: the function, or its dotted name ("train.main"). The module of a name is imported here, so that a script can call
    this before its own imports: a missing package and an interrupted import end in a line too.
    check: called before that import, which may take seconds, to find wrong arguments at once.

    Exit codes: 2 after one line on stderr for an InputError, a missing package, and what the machine refuses (full disk,
    read-only folder); 130 for an interrupt. A closed pipe (`train.py | head`) ends the script as it ends other commands.
    """
    code: object = None
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by the script for its first imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _open_streams()
        try:
            if isinstance(main, str):
                os.getcwd()  # raises if the current folder was deleted
                _use_utf8()
                _refuse_other_bytes(sys.argv[1:])
                if check is not None:
                    check()
                main = _imported(main)
            code = main()
        except SystemExit as ended:  # argparse, for example after --help
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141  # a shell's exit code for SIGPIPE
    except InputError as error:
        code = _fail(f"error: {printable(str(error), lines=True)}", 2)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except Exception as error:
        if (message := explain_fault(error)) is None:
            raise
        code = _fail(f"error: {printable(message, lines=True)}", 2)
    _is_output_lost()  # else Python would fail when it flushes stdout at exit
    sys.exit(code)


@contextlib.contextmanager
def explain_imports() -> Iterator[None]:
    """Exit with code 2 and one line if a package is missing or too old, or so is Python. Errors in our own modules pass."""
    how = (
        ". Run sh train.sh, which prepares .venv with all packages, or activate that environment: . .venv/bin/activate"
    )
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 - the Python on the PATH may be older
            found = f"{sys.executable} is Python {platform.python_version()}, but 3.11 or newer is needed"
            sys.exit(_fail(f"error: {found}{how}", 2))
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        root = Path(__file__).parent.parent
        if not package or (root / package).is_dir() or (root / f"{package}.py").is_file():
            raise
        if isinstance(error, ModuleNotFoundError):
            found = f"the package {package} is not installed in {sys.executable}"
        else:
            found = f"the package {package} in {sys.executable} cannot be used ({shortened(str(error))})"
        sys.exit(_fail(f"error: {found}{how}", 2))


def explain_fault(error: Exception) -> str | None:
    """Return a message for an error that a file or the machine causes; None for any other error.

    That is an OSError, or the form in which libraries written in Rust report one ("... (os error 28)").
    """
    if isinstance(error, OSError):
        named, number = [error.filename, error.filename2], error.errno
    elif found := re.search(r"\(os error (\d+)\)", str(error)):
        named, number = [], int(found[1])
    else:
        return None
    paths = [os.fsdecode(name) for name in named if isinstance(name, str | bytes)]
    if not paths and number == errno.ENOENT and isinstance(error, OSError):
        return "the current folder does not exist any more; change to another folder."
    if not paths and number not in _OF_THE_MACHINE:
        return None
    # a partial file would get its name at the end
    paths = [re.sub(r"/\.([^/]+?)\.([0-9a-f]{8}\.)?partial$", r"/\1", path) for path in paths]
    where = " -> ".join(paths) or ("standard output" if _is_output_lost() else "a file")
    if number in _FULL:
        return f"{where}: cannot be written: {_FULL[number]}. Free some space, or write to another disk."
    reason = str(error) if number is None else os.strerror(number)
    if number in _FORBIDDEN:
        return f"{where}: {reason}. Give a folder that this user may read and write, in the config or as an option."
    return f"{where}: {reason}."


def _open_streams() -> None:
    """Make the standard streams usable: a closed one discards what is written, and a character that the terminal does
    not have is written as an escape."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # else a file opened later would become the stream
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _use_utf8() -> None:
    """Start the script again in Python's UTF-8 mode if the locale is another one: it could not open files whose names have
    characters of other languages. The terminal keeps its encoding."""
    if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name == "utf-8":
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _refuse_other_bytes(words: list[str]) -> None:
    """Raise InputError for an argument that is not UTF-8: no tokenizer takes such a text, and few libraries such a path."""
    for word in words:
        if not is_text(word):
            raise InputError(
                f'the argument "{shortened(word)}" is not UTF-8 text; set the terminal to UTF-8, or rename the file.'
            )


def _imported(name: str) -> Callable[[], int | None]:
    module, _, function = name.rpartition(".")
    with explain_imports():
        return getattr(importlib.import_module(module), function)


def _is_output_lost() -> bool:
    """Return whether stdout cannot be written. What it holds is then discarded."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # stdout is not a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr is full
        print(message, file=sys.stderr)
    return code
