"""Guard a Python process: Python imports this file by itself when its folder is on PYTHONPATH, in every process that
inherits the environment. It knows nothing of the project.

    GUARD_LOG     a file to which each refusal is added, one JSON list [what, ...] per line; it does not exist until
                  something is refused. Without this variable nothing is guarded.
    GUARD_WRITES  folders, separated by ":", in which files may be written, created, renamed and removed
    GUARD_PICKLE  modules, separated by ":", that may unpickle objects with a class (plain values need none)

Refused with an error and logged, since an error alone could be caught: every network address that is looked up, connected
to or bound (AF_UNIX sockets between processes of one machine are allowed), every path elsewhere, every class in a pickle.
Audit hooks see what goes through Python, not what a library does in its own C or Rust code.
"""

import json
import os
import socket
import sys

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NET = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}
_LOOK_UPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
# event -> positions of its paths among the arguments, and of the folder handles that they are relative to
_PATHS = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.remove": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "sqlite3.connect": ((0, None),),
}


class Refused(RuntimeError):
    pass


def _guard(log: str, folders: list[str], unpicklers: set[str]) -> None:
    log = os.path.realpath(log)
    roots = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)

    def refuse(*what: str) -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(handle, (json.dumps([*what, " ".join(sys.orig_argv)[:200]]) + "\n").encode())
        os.close(handle)
        raise Refused(f"refused: {' '.join(what)}")

    def may_write(path: object, folder: int | None = None, follows: bool = False) -> None:
        if isinstance(path, int):
            return  # already open
        path = os.fsdecode(path)
        if folder is not None and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        # a link is created, renamed or removed at its own place; opening it opens its target
        parent, name = os.path.split(path)
        path = os.path.realpath(path) if follows else os.path.join(os.path.realpath(parent), name)
        if path != log and not os.path.join(path, "").startswith(roots):
            refuse("write", path)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITES:
                may_write(path, follows=True)
        elif event in _PATHS:
            for at, folder in _PATHS[event]:
                may_write(arguments[at], None if folder is None else arguments[folder])
        elif event in _NET and arguments[0].family != socket.AF_UNIX:
            refuse("network", event, repr(arguments[1]))
        elif event in _LOOK_UPS:
            refuse("network", event, repr(arguments[:2]))
        elif event == "pickle.find_class":
            caller = sys._getframe(1).f_globals.get("__name__", "?")
            if caller not in unpicklers:
                refuse("pickle", caller, *arguments)

    sys.addaudithook(hook)


if os.environ.get("GUARD_LOG"):
    _guard(
        os.environ["GUARD_LOG"],
        os.environ.get("GUARD_WRITES", "").split(":"),
        set(os.environ.get("GUARD_PICKLE", "").split(":")),
    )
