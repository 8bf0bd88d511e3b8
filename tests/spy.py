"""Note the calls of a function without changing what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def spy(patch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[..., Any]) -> list[Any]:
    """Patch `owner.name` so that each call first appends note(*arguments) to the returned list."""
    notes: list[Any] = []
    function = getattr(owner, name)

    def noting(*positional: Any, **named: Any) -> Any:
        notes.append(note(*positional, **named))
        return function(*positional, **named)

    patch.setattr(owner, name, noting)
    return notes
