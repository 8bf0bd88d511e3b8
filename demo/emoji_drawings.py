"""The drawings of emoji: four styles, each an npm package of Iconify, downloaded by name and version, checked against its
SHA-256 and rendered by resvg. Questions are not known here."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from config import InputError
from config.files import publish

SIDE = 224  # of the images in pixels
REGISTRY = "https://registry.npmjs.org/@iconify-json"


@dataclass(frozen=True)
class Style:
    """An npm package of drawings."""

    version: str
    sha256: str  # of the downloaded archive
    licence: str
    author: str


STYLES = {
    "twemoji": Style(
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        licence="CC-BY-4.0",
        author="Twitter, https://github.com/jdecked/twemoji",
    ),
    "openmoji": Style(
        version="1.2.29",
        sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        licence="CC-BY-SA-4.0",
        author="OpenMoji, https://github.com/hfg-gmuend/openmoji",
    ),
    "noto": Style(
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        licence="Apache-2.0",
        author="Google, https://github.com/googlefonts/noto-emoji",
    ),
    "fluent-emoji-flat": Style(
        version="1.2.6",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        licence="MIT",
        author="Microsoft, https://github.com/microsoft/fluentui-emoji",
    ),
}


class Icons:
    """The drawings of one style: code points -> SVG -> image."""

    def __init__(self, icons: dict, names: dict[str, str], groups: dict[str, list[str]]) -> None:
        self._icons = icons
        self._names = {plain_code(code): name for code, name in names.items()}
        self._groups = {name: group for group, members in groups.items() for name in members}

    def __contains__(self, code: str) -> bool:
        return code in self._names

    def group(self, code: str) -> str:
        return self._groups[self._names[code]]

    def draw(self, code: str) -> Image.Image:
        """Return an RGB image of SIDE x SIDE pixels on white."""
        import resvg_py

        name = self._names[code]
        while name not in self._icons["icons"]:  # an alias of another icon
            name = self._icons["aliases"][name]["parent"]
        icon = self._icons["icons"][name]
        width, height = (icon.get(side, self._icons.get(side, 16)) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="white")
        return Image.open(io.BytesIO(bytes(png))).convert("RGB").resize((SIDE, SIDE))


def load_icons(style: str, folder: Path) -> Icons:
    """Read a style's package; download it into `folder` if it is not there. Raises InputError."""
    package = STYLES[style]
    archive = folder / f"{style}-{package.version}.tgz"
    address, is_new = f"{REGISTRY}/{style}/-/{archive.name}", not archive.exists()
    if is_new:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"{address}: cannot be downloaded ({error!r}). Check the connection, or put the file into {folder}."
            ) from error
    else:
        content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        what, advice = (address, "try again later") if is_new else (archive, "delete the file and try again")
        raise InputError(f"{what}: SHA-256 is {found}, expected {package.sha256}; {advice}.")
    if is_new:
        publish(archive, content)
    with tarfile.open(fileobj=io.BytesIO(content)) as files:

        def read(name: str) -> Any:
            member = files.extractfile(f"package/{name}.json")
            assert member is not None
            return json.load(member)

        return Icons(read("icons"), read("chars"), read("metadata")["categories"])


def plain_code(code: str) -> str:
    """Return code points without the variation selector, which packages write or leave out."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")
