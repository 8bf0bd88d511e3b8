"""Build frozen dataclasses from YAML text and `key=value` overrides, with one message for every mistake.

This module knows no key of the config.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Hashable, Iterable
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import yaml

from config.errors import InputError, is_hub_name, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Built = TypeVar("Built", bound="DataclassInstance")


class FolderOrHub(str):
    """A model: a local folder or the name of a hub repository (`openai/clip-vit-large-patch14-336`)."""


class Trainable(str):
    """The word that says what of a part trains: `frozen`, `lora`, `full` or `top:N` (the last N layers)."""

    WORDS = re.compile(r"frozen|lora|full|top:[1-9][0-9]*")

    @property
    def kind(self) -> str:
        """The word without its number: frozen, lora, full or top."""
        return self.split(":")[0]

    @property
    def top(self) -> int | None:
        """N of `top:N`; None for the other words."""
        return int(self.split(":")[1]) if self.kind == "top" else None


class Switch(str):
    """auto, on or off. YAML 1.1 reads on and off as true and false, which are accepted too."""

    WORDS = ("auto", "on", "off")


def bounds(
    default: Any = dataclasses.MISSING, low: float | None = None, high: float | None = None, **kwargs: Any
) -> Any:
    """Declare a dataclass field that must lie in [low, high]; either end may be open (None). Without a default it is
    required."""
    return field(default=default, metadata={"low": low, "high": high}, **kwargs)


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses duplicate keys, where YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'"{key}" is given twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):  # a few lines of aliases can expand to gigabytes
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias (*name); write the value out", mark)
        return super().compose_node(parent, index)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML text. Raises InputError with `where` for any fault.

    PyYAML converts its own tags without checks (month 13 is a ValueError, `!!bool maybe` a KeyError), so it raises more than
    its own errors.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        fault = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        advice = ""
        if "'\\t'" in fault:
            advice = " Indent with spaces; YAML allows no tabs there."
        elif "expected ':'" in fault or "mapping values are not allowed" in fault:
            advice = " In YAML a key is followed by a colon and a space: key: value."
        elif "expected <block end>" in fault:
            advice = " Keys of one section start in the same column."
        raise InputError(f"{where}: not valid YAML: {fault}{advice}") from None


class Typed(str):
    """Text from the command line. A path in it is relative to the current folder, not to the YAML file."""


def _as_typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_typed(item) for item in value]
    return Typed(value) if isinstance(value, str) else value


def apply_override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals and key.endswith((".yaml", ".yml")):
        raise InputError(f'"{override}": a config file needs its option; did you mean --config {override}?')
    if not equals or not key.strip():
        raise InputError(f'"{override}": expected key=value without spaces, for example train.lora_lr=2e-4.')
    value = _as_typed(read_yaml(text, f'"{override}"'))
    target, *path = key.strip().split(".")
    here: Any = values
    for position, name in enumerate(path):
        here = _descend(here, target, key)
        target = name
        if here is None:
            raise InputError(f'"{key}": "{".".join(key.split(".")[: position + 1])}" holds no keys.')
    if isinstance(here, list):
        here[_list_index(here, target, key)] = value
    else:
        here[target] = value


def _descend(here: dict[str, Any] | list[Any], name: str, key: str) -> dict[str, Any] | list[Any] | None:
    """Return the mapping or list under `name`, created if absent; None if it is a plain value."""
    if isinstance(here, list):
        child = here[_list_index(here, name, key)]
    else:
        if here.get(name) is None:
            here[name] = {}
        child = here[name]
    return child if isinstance(child, (dict, list)) else None


def _list_index(items: list, name: str, key: str) -> int:
    """Return the index of an item, given as a number or as the item's "name"."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if name in names:
        return names.index(name)
    if not name.isdecimal() or int(name) >= len(items):
        known = ", ".join(f'"{each}"' for each in names if each)
        raise InputError(
            f'"{key}": "{name}" is not a position in a list of {len(items)} (counted from 0)'
            + (f", nor one of the names {known}." if known else ".")
        )
    return int(name)


def merge(below: dict, above: dict) -> dict:
    """Return `below` with the values of `above` replacing its own, section by section. A list replaces a list."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if both else value
    return merged


def build(
    cls: type[Built], values: Any, folder: Path, where: str = "", root: type[DataclassInstance] | None = None
) -> Built:
    """Build the dataclass `cls` from a mapping, checking that keys are known, types right and required keys present.

    folder: base of relative paths. where: the dotted key of `values`. root: the outermost dataclass; a misplaced key is
    looked up among its keys. Raises InputError that names the key.
    """
    root = root or cls
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f'"{where}": expected keys and values, found {kind_of(values)}.')
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            full = f"{where}.{key}" if where else key
            raise InputError(f'"{full}" is not a key of the config{_nearest_key(key, where, fields, root=root)}')
    built = {}
    for name, f in fields.items():
        full = f"{where}.{name}" if where else name
        if name in values:
            built[name] = _convert(hints[name], values[name], folder, where=full, root=root)
            _check_bounds(built[name], f, full)
        elif dataclasses.is_dataclass(hints[name]):
            built[name] = build(hints[name], {}, folder, where=full, root=root)
        elif f.default is dataclasses.MISSING:
            raise InputError(f'"{full}" is missing; it has no default, so the config must give it.')
    return cls(**built)


def nearest_key(word: str, root: type[DataclassInstance]) -> str | None:
    """Return the dotted key of a config that a misspelled or misplaced key means, or None."""
    match = re.search(r'did you mean "([^"]*)"', _nearest_key(word, "", [], root=root))
    return match[1] if match else None


def _nearest_key(key: str, where: str, fields: Iterable[str], root: type[DataclassInstance]) -> str:
    """Suggest the intended key: this word in another section, else one that ends with it ("lr"), else a similar one here,
    else a similar one anywhere."""
    prefix = f"{where}." if where else ""
    everywhere: dict[str, list[str]] = {}
    for full in all_keys(root):
        everywhere.setdefault(full.rsplit(".", 1)[-1], []).append(full)
    same = {key: everywhere[key]} if key in everywhere else {}
    ends = [full for full in all_keys(root) if full.startswith(prefix) and full.endswith(f"_{key}")]
    if ends and not same:
        meant = '" or "'.join(ends)
        return f'; did you mean "{meant}"?'
    for table in (same, {name: [prefix + name] for name in fields}, everywhere):
        for word in difflib.get_close_matches(key, list(table), n=1, cutoff=0.6):
            (meant,) = difflib.get_close_matches(prefix + key, table[word], n=1, cutoff=0.0)
            return f'; did you mean "{meant}"?'
    return f". Known here: {', '.join(fields)}."


def all_keys(cls: type[DataclassInstance], prefix: str = "") -> list[str]:
    """Return every dotted key of a dataclass of dataclasses, in order."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        full = f"{prefix}{name}"
        keys += all_keys(hint, full + ".") if isinstance(hint, type) and dataclasses.is_dataclass(hint) else [full]
    return keys


def _convert(hint: Any, value: Any, folder: Path, where: str, root: type[DataclassInstance]) -> Any:
    """Convert `value` to the type `hint`. Every type that a config's dataclasses use is handled here."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        (inner,) = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return None if value is None else _convert(inner, value, folder, where=where, root=root)
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise InputError(f'"{where}": {value!r} is not one of {", ".join(options)}{nearest(value, options)}')
        return value
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, str):  # a single item needs no brackets
            value = [value]
        if not isinstance(value, list):
            raise InputError(f'"{where}": expected a list, found {kind_of(value)}.')
        return tuple(_convert(inner, item, folder, where=f"{where}.{i}", root=root) for i, item in enumerate(value))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, folder, where=where, root=root)
    if hint is Trainable:
        if not isinstance(value, str) or not Trainable.WORDS.fullmatch(value):
            raise InputError(f'"{where}": {value!r} is not one of frozen, lora, full, top:N (N >= 1).')
        return Trainable(value)
    if hint is Switch:
        word = ("on" if value else "off") if isinstance(value, bool) else value
        if word not in Switch.WORDS:
            raise InputError(
                f'"{where}": {value!r} is not one of {", ".join(Switch.WORDS)}{nearest(value, Switch.WORDS)}'
            )
        return Switch(word)
    if hint is bool:
        if not isinstance(value, bool):
            raise InputError(f'"{where}": expected true or false, found {kind_of(value)}.')
        return value
    if hint in (int, float):
        return _number(hint, value, where)
    if not isinstance(value, str) or not value and hint is not str:
        raise InputError(f'"{where}": expected {"text" if hint is str else "a path"}, found {kind_of(value)}.')
    if hint is Path:
        return _absolute(value, where, Path.cwd() if isinstance(value, Typed) else folder)
    if hint is FolderOrHub:
        return FolderOrHub(_folder_or_hub(value, where, Path.cwd() if isinstance(value, Typed) else folder))
    return str(value)


def _number(kind: type[int] | type[float], value: Any, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 2e-4 (no dot) as text
        try:
            value = float(value)
        except ValueError:
            raise InputError(f'"{where}": expected a number, found the text {value!r}.') from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f'"{where}": expected a number, found {kind_of(value)}.')
    if not abs(value) < 1e300:  # NaN, infinity, and integers too large for a float
        raise InputError(f'"{where}": expected a finite number, found {value}.')
    if kind is int and value != int(value):
        raise InputError(f'"{where}": expected a whole number, found {value}.')
    return kind(value)


def _check_bounds(value: Any, f: dataclasses.Field[Any], where: str) -> None:
    low, high = f.metadata.get("low"), f.metadata.get("high")
    if value is None or (low is None and high is None):
        return
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f'"{where}": {value} is out of range; it must be {allowed}.')


def _absolute(value: str, where: str, folder: Path) -> Path:
    """Return a path as absolute. Windows' backslashes are read as "/", unless something of that very name exists."""
    try:
        path = (folder / Path(value).expanduser()).resolve()
        if "\\" in value and os.sep == "/" and not os.path.lexists(path):
            path = (folder / Path(value.replace("\\", "/")).expanduser()).resolve()
        return path
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, the ~ of an unknown user, a cycle of links
        raise InputError(f'"{where}": {value!r} cannot be a path ({error}).') from None


def _folder_or_hub(value: str, where: str, folder: Path) -> str:
    """Return a path as absolute, and a hub name unchanged.

    `owner/name` is a hub name unless such a folder exists. Other paths are made absolute even if they do not exist, so
    that the loader's message shows where it looked.
    """
    path = _absolute(value, where, folder)
    return value if is_hub_name(value) and not os.path.exists(path) else str(path)


def kind_of(value: object) -> str:
    names = {
        dict: "keys and values",
        list: "a list",
        type(None): "nothing",
        bool: f"{value}",
        str: f"the text {value!r}",
    }
    return names.get(str if isinstance(value, str) else type(value), f"{value!r}")
