"""The images that a raw record names: paths, addresses, bytes, base64 text, alone or in lists and objects."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from urllib.parse import unquote

from dataprocess.keys import has_content, image_keys_of, is_empty, is_metadata, shown, unsupported
from dataset.record import RecordError

Reference = str | bytes  # of an image: a path, an address, base64 text, or the bytes of the file

_PATHS = ("path", "file_name", "filename", "image", "url", "image_url", "data", "base64")  # keys of an object
# How base64 text of a JPEG, PNG, GIF, WebP, BMP and TIFF file begins; a path of this form is shorter.
_BASE64_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")
_SHORTEST_BASE64 = 48
_is_base64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*\Z").match
_is_address = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE).match


def images_of(obj: dict) -> list[Reference]:
    """The images under any of the known keys.

    If several keys hold images, the bytes are used before a path, and a path before an address. Raises RecordError:
    wrong_type for a value that is no image, unknown_key for keys that name different images.
    """
    found: dict[str, list[Reference]] = {}
    for key in image_keys_of(obj):
        images = images_in(obj[key], key) if key != "image_id" or isinstance(obj[key], str) and not found else []
        if images and images not in found.values():
            found[key] = images
    if not found and not is_empty(obj.get("image_id")):
        raise RecordError("unknown_key", f'"image_id" is {shown(obj["image_id"])}, which is not the name of a file.')
    if len(found) < 2:
        return next(iter(found.values()), [])
    best = min(map(_rank, found.values()))
    first, *others = [key for key, images in found.items() if _rank(images) == best]
    if others and best:
        raise RecordError("unknown_key", f'"{first}" and "{others[0]}" name different images; leave one of them out.')
    return found[first]


def images_in(value: object, key: str) -> list[Reference]:
    """The images in the value of `key`."""
    if type(value) is str and value and value[0] != "[":
        return [] if value.isspace() else [value]
    if is_empty(value):
        return []
    if isinstance(value, str):
        value = _list_in(value)
    if isinstance(value, list):
        return [_image(one, key) for one in value]
    return [_image(value, key)]


def _image(value: object, key: str) -> Reference:
    """A path or bytes, alone or in an object, such as {"bytes", "path"} of Parquet tables."""
    if isinstance(value, dict):
        data = value.get("bytes")
        if isinstance(data, bytes) and data:
            return data
        named = {name: one for name, one in value.items() if not is_empty(one) and name != "bytes"}
        found = data or next((named.pop(name) for name in _PATHS if name in named), None)
        if any(has_content(one) and not is_metadata(name) for name, one in named.items()):
            raise unsupported(key)
        value = found.get("url") if isinstance(found, dict) else found
    if isinstance(value, (str, bytes)) and value:
        return value
    raise unsupported(key)


def _list_in(text: str) -> str | list:
    """The list that a cell of a table writes as JSON or Python, or the text itself."""
    for form in (text, text.replace("'", '"')):
        try:
            value = json.loads(form)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return value
    return text


def _rank(images: Sequence[Reference]) -> int:
    if any(isinstance(image, bytes) or bytes_in(image) is not None for image in images):
        return 0
    return 2 if any(isinstance(image, str) and _is_address(image) for image in images) else 1


def bytes_in(text: Reference) -> bytes | None:
    """The bytes of an image that is written as a data: address or as base64 text; None for other text.

    Raises RecordError (unreadable_image) for a data: address that is not base64.
    """
    if not isinstance(text, str):
        return text
    if text[:5].lower() == "data:":
        head, comma, encoded = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RecordError("unreadable_image", f"{text[:40]}...: a data: address without base64; write a path.")
    elif len(text) >= _SHORTEST_BASE64 and text.startswith(_BASE64_HEADS) and _is_base64(text):
        encoded = text
    else:
        return None
    try:
        return base64.b64decode("".join(unquote(encoded).split()), validate=True)
    except (binascii.Error, ValueError):
        raise RecordError("unreadable_image", f"{text[:40]}...: base64 text that is cut or damaged.") from None


def path_in(text: str) -> str:
    """The path of a file:// address; other text unchanged."""
    if text[:7].lower() != "file://":
        return text
    path = unquote(text[7:])
    return path.removeprefix("localhost") if path.startswith("localhost/") else path
