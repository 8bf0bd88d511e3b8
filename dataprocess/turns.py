"""The turns of raw conversations: roles, texts, parts, and which answers count."""

from __future__ import annotations

import json

from dataprocess.keys import is_empty, is_metadata, shown
from dataprocess.marks import Piece
from dataprocess.media import Reference, images_in
from dataset.record import RecordError

_ROLES = {"human": "user", "gpt": "assistant"} | {name: name for name in ("system", "user", "assistant")}
_IMAGE_PARTS = ("image", "image_url", "input_image")
_SIZE_HINTS = frozenset(("detail", "min_pixels", "max_pixels", "resized_width", "resized_height"))
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(turns: object) -> list[dict]:
    """Turns as {"role", "content"}, from such turns, from {"from", "value"}, or from JSON text of either.

    An answer that must not be a target has "loss": False. Raises RecordError (wrong_type, unknown_key).
    """
    if type(turns) is list:
        try:  # a fast path for valid turns
            if turns and "from" in turns[0]:
                read = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
            else:
                read = [{"role": _ROLES[turn["role"]], "content": turn["content"]} for turn in turns]
            if sum(map(len, turns)) == 2 * len(turns):
                return read
        except (KeyError, TypeError):
            pass
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise RecordError("wrong_type", f'"conversations" is text that is not JSON: {error}.') from None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError("wrong_type", "the conversation is missing or not a list of objects.")
    return [_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _turn(turn: dict, number: int) -> dict:
    rest = dict(turn)
    name = rest.pop("from") if not is_empty(rest.get("from")) else rest.pop("role", None)
    content = rest.pop("value") if rest.get("value") is not None else rest.pop("content", None)
    role = _ROLES.get(name, name) if isinstance(name, str) else name
    read = {"role": role, "content": content}
    for key, value in rest.items():
        if key in ("loss", "train", "weight"):
            if _counts(key, value, number) is False and role == "assistant":
                read["loss"] = False
            elif key != "weight" and value is True and role == "user":
                raise RecordError("unknown_key", f'turn {number} (user) has "{key}": true; only answers are targets.')
        elif not is_empty(value) and not (is_metadata(key) and not isinstance(value, (dict, list))):
            raise RecordError(
                "unknown_key",
                f'turn {number} has "{key[:80]}" ({shown(value)}), which is not read; expected {{"role", "content"}}.',
            )
    return read


def _counts(key: str, value: object, number: int) -> bool:
    """True if a turn with this "loss", "train" or "weight" is a target; null says nothing."""
    if is_empty(value) or value in (0, 1) and isinstance(value, (bool, int, float)):
        return is_empty(value) or bool(value)
    raise RecordError(
        "unknown_key", f'turn {number} has "{key}": {shown(value)}; an answer is a target (1, true) or not (0, false).'
    )


def pieces_of(parts: list) -> tuple[list[Piece], list[Reference | None]]:
    """The pieces of a content, and for each image among them the path or bytes that its part names, or None."""
    pieces: list[Piece] = []
    own_images: list[Reference | None] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        given = {key: value for key, value in part.items() if key != "type" and not is_empty(value)} if kind else {}
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str) and given.keys() <= {"text"}:
            pieces.append(part["text"])
        elif kind in _IMAGE_PARTS and (named := _named(given, kind)) is not None:
            pieces.append(None)
            own_images += named or [None]
        else:
            raise RecordError("wrong_type", f'a part {_brief(part)}; expected {{"type": "text" or "image", ...}}.')
    return pieces, own_images


def _named(given: dict, kind: str) -> list[Reference] | None:
    """The image that a part names, in a list; empty if it names none, None if the part has keys that are not read."""
    named = [given.pop(key) for key in ("image", "path", "url", "image_url", "bytes", "base64") if key in given]
    if isinstance(source := given.get("source"), dict):  # Anthropic's form
        named.append(source.get("data") or source.get("url"))
        given.pop("source")
    if len(named) > 1 or given.keys() - _SIZE_HINTS:
        return None
    if not named:
        return []
    value = named[0]
    if isinstance(value, dict):
        value = {key: one for key, one in value.items() if key not in _SIZE_HINTS}
    images = images_in(value, kind)
    return images if len(images) == 1 else None


def _brief(part: object) -> str:
    if not isinstance(part, dict):
        return shown(part)
    return "{" + ", ".join(f"{str(key)[:40]}: {shown(value)}" for key, value in list(part.items())[:4]) + "}"
