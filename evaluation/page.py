"""Write answers as one HTML page: every image with its questions and answers. The page has no scripts and needs no other
files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from config.files import write_whole
from dataset.html_page import html_page
from visual.images import read_image

THUMBNAIL = 220  # pixels of the longer side
RIGHT = 0.5  # score from which an answer is shown as right
MAGNIFY_BELOW = 100  # a smaller image is enlarged, with visible pixels

_STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
  color: #1c2024; background: #f6f7f8; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } .about { color: #60646c; margin-top: 0; overflow-wrap: anywhere; }
article { display: flex; gap: 1.5rem; background: #fff; border-radius: 10px; padding: 1.2rem; margin: 1rem 0;
  box-shadow: 0 1px 3px #0002; }
figure { margin: 0; width: 220px; flex: none; text-align: center; } img { max-width: 220px; border-radius: 6px; }
img.small { image-rendering: pixelated; width: 160px; }
figcaption { font-size: .8rem; color: #60646c; overflow-wrap: anywhere; }
dl { margin: 0; flex: 1; } dt { color: #60646c; } dd { margin: 0 0 .9rem; font-size: 1.1rem; white-space: pre-wrap; }
.right { color: #18794e; } .wrong { color: #b42318; } .reference { color: #60646c; font-size: .9rem; }
pre { background: #fff; padding: 1rem; border-radius: 10px; overflow-x: auto; }
@media (max-width: 40rem) { article { flex-direction: column; } }
"""


def write_page(
    path: Path, title: str, about: str, rows: Sequence[dict], unreadable: Sequence[dict] = (), table: str = ""
) -> None:
    """Write the page to `path`, replacing a link of that name. Raises OSError.

    rows: {"image": its path or None, "question", "answer"}, and with a reference also {"reference", "correct"} and perhaps
    {"metric", "score"} and {"blind"}, the answer about a swapped image; consecutive rows about one image share its
    thumbnail. unreadable: {"image", "problem"}. table: preformatted text.
    """
    groups: list[tuple[str | None, list[dict]]] = []
    for row in rows:
        if not groups or groups[-1][0] != row["image"]:
            groups.append((row["image"], []))
        groups[-1][1].append(row)
    body = [f"<h1>{html.escape(title)}</h1>", f'<p class="about">{html.escape(about)}</p>']
    if table:
        body.append(f"<pre>{html.escape(table)}</pre>")
    body += [_article(image, asked) for image, asked in groups]
    if unreadable:
        items = "".join(f"<li>{html.escape(str(entry['problem']))}</li>" for entry in unreadable)
        body.append(f"<h2>Not read</h2><ul>{items}</ul>")
    write_whole(path, html_page(title, style=_STYLE, body="".join(body)))


def _article(image: str | None, asked: Sequence[dict]) -> str:
    entries = []
    for row in asked:
        is_right = _is_right(row)
        verdict = "" if is_right is None else ' class="right"' if is_right else ' class="wrong"'
        entries.append(f"<dt>{html.escape(row['question'])}</dt><dd{verdict}>{html.escape(row['answer'])}")
        if row.get("reference") is not None and not is_right:
            entries.append(f'<div class="reference">expected: {html.escape(row["reference"])}</div>')
        if row.get("blind") is not None:
            entries.append(f'<div class="reference">with another image: {html.escape(row["blind"])}</div>')
        entries.append("</dd>")
    figure = ""
    if image is not None:
        caption = f"<figcaption>{html.escape(Path(image).name)}</figcaption>"
        figure = f"<figure>{_thumbnail(image)}{caption}</figure>"
    return f"<article>{figure}<dl>{''.join(entries)}</dl></article>"


def _is_right(row: dict) -> bool | None:
    """Return whether an answer is shown as right: by its metric if it has one; None for a caption and without a
    reference."""
    if row.get("metric") in (None, "exact"):
        return row.get("correct")
    return None if row["metric"] == "caption" else row["score"] >= RIGHT


def _thumbnail(path: str) -> str:
    image = read_image(path)  # as the model reads it: turned upright
    is_small = max(image.size) < MAGNIFY_BELOW
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if is_small else "JPEG", quality=85)
    kind = "png" if is_small else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{" class=small" if is_small else ""} alt="" src="data:image/{kind};base64,{data}">'
