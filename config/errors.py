"""InputError, the one exception for bad input, and the small helpers that write its messages."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")


class InputError(Exception):
    """Bad input that a person can fix. The message says what was found, where, what was expected and what to do.

    Scripts print it and exit with code 2.
    """


# Control characters (C0, DEL, C1), line and paragraph separators, and those that reorder the text around them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


def shortened(text: str, length: int = 200) -> str:
    """Return `text`, or if it has more than `length` characters its beginning and end."""
    if len(text) <= length:
        return text
    begin = length * 3 // 4
    return f"{text[:begin]} ... ({len(text):,} characters) ... {text[begin - length :]}"


def nearest(name: object, options: Iterable[object]) -> str:
    """`; did you mean "x"?` for the option spelled most like `name`, or a full stop."""
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else "."


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


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main()` and exit with its result. An InputError becomes one line on stderr and exit code 2; a closed
    pipe (`train.py | head`) ends the script as it ends other commands."""
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would fail again when it flushes stdout at exit
        sys.exit(141)  # a shell's exit code for SIGPIPE
    except InputError as error:
        print(f"error: {printable(str(error), lines=True)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
