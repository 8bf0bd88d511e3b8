"""Give the columns of a source the names that the readers know, as `columns` of the source says."""

from __future__ import annotations

import dataclasses

from config import ColumnsConfig, InputError, nearest, shortened
from dataset.json_stream import Item


def with_own_names(items: list[Item], columns: ColumnsConfig, where: str, *, is_first: bool) -> list[Item]:
    """The records with the keys of `columns` renamed, and without those that it ignores.

    A key that has one of our names already, but another meaning, must be given another name or be ignored. is_first: whether
    these are the first records, in which every named column must occur. where: the place, for messages.
    """
    theirs = {name: own for own, name in dataclasses.asdict(columns).items() if isinstance(name, str)}
    known = {key for item in items if isinstance(item.value, dict) for key in item.value}
    found = {key.strip().lower(): key for key in known}
    for name in [*theirs, *columns.ignore] if is_first and known else []:
        if name not in known and name.strip().lower() not in found:
            raise InputError(
                f'{where} has no column "{name}", which "columns" names{nearest(name, known)} It has: '
                f"{shortened(', '.join(map(str, sorted(known))))}."
            )
    renamed = {name if name in known else found.get(name.strip().lower(), name): own for name, own in theirs.items()}
    ignored = {name if name in known else found.get(name.strip().lower(), name) for name in columns.ignore}
    taken = set(renamed.values())
    return [
        item._replace(
            value={
                renamed.get(key, key if key not in taken else f"{key} (given)"): value
                for key, value in item.value.items()
                if key not in ignored
            }
        )
        if isinstance(item.value, dict)
        else item
        for item in items
    ]
