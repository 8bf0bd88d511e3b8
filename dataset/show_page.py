"""Write the rows of a batch as one HTML page that shows the model's input: its images, and each token with its purpose.

Uses only the tensors of the batch and does not know the prompt format, so a fault in the format becomes visible. The
page has no scripts and needs no other files.
"""

from __future__ import annotations

import base64
import codecs
import html
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
from PIL import Image
from torch import Tensor

from config import IGNORE_INDEX, printable
from dataset.html_page import html_page

KINDS = {  # kind of a token -> its meaning
    "image": "the position of one image feature",
    "prompt": "read, not learned",
    "supervised": "learned",
    "mislabelled": "the label is a different token",
    "padding": "fills the row; no sample attends to it",
}
WIDTH = 240  # width of an image on the page; a smaller one is enlarged by an integer factor, with visible pixels

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --dim: #60646c; --page: #f4f5f7; --card: #fff; --line: #d9dce1;
  --image: #d3c4f7; --prompt: #e6e8eb; --supervised: #aee3bd; --mislabelled: #ffb3ad; --padding: #f0f0f2; }
@media (prefers-color-scheme: dark) { :root { --text: #edeef0; --dim: #a3a9b3; --page: #111315; --card: #1b1e22;
  --line: #363b42; --image: #513d86; --prompt: #30353c; --supervised: #1f6238; --mislabelled: #8c2f2b;
  --padding: #22262b; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .8rem; } h2 { font-size: .95rem; font-weight: 600; margin: 2rem 0 .6rem; }
header, article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem; }
.dim, dt, h2 span { color: var(--dim); font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0 0 1rem; } dd { margin: 0; }
table { border-spacing: 0 .2rem; } td { padding: 0 1.2rem 0 0; } td:not(.dim) { white-space: nowrap; }
td:nth-child(2), td:nth-child(3) { text-align: right; }
.bar { display: flex; height: 8px; gap: 1px; border-radius: 4px; overflow: hidden; margin: .5rem 0 .8rem; }
article { display: flex; gap: 1.4rem; margin: 0 0 1rem; } article > div { flex: 1; min-width: 0; }
figure { margin: 0; flex: none; width: 240px; } figure img { display: block; margin: 0 0 .5rem; border-radius: 6px; }
figure p { margin: 0; } .pixels { image-rendering: pixelated; }
h3 { font-size: 1rem; margin: 0; } h3 span { font-weight: 400; font-size: .85rem; color: var(--dim); margin-left: .6rem; }
.lengths { font-size: .85rem; color: var(--dim); } .lengths b { color: var(--text); font-weight: 600; }
.tokens { font: 14px/1.9 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; white-space: pre-wrap; }
hr { border: 0; border-top: 2px dashed var(--dim); margin: 1rem 0; }
i { font-style: normal; border-radius: 3px; padding: 2px 0; margin-right: 1px; }
.image { background: var(--image); } .prompt { background: var(--prompt); } .supervised { background: var(--supervised); }
.mislabelled { background: var(--mislabelled); text-decoration: underline wavy; }
.padding { background: repeating-linear-gradient(135deg, var(--padding) 0 5px, var(--line) 5px 6px); }
.chip { padding: 2px 7px; border-radius: 9px; }
.special { outline: 1px solid var(--dim); outline-offset: -1px; padding: 2px 4px; font-size: .86em; }
s { text-decoration: none; background: radial-gradient(circle, var(--dim) 1px, transparent 1.3px); }
s[class] { background: none; color: var(--dim); } .tab::before { content: "⇥"; } .end::before { content: "↵"; }
u { text-decoration: none; font-size: .75em; border: 1px solid var(--dim); border-radius: 3px; padding: 0 2px; }
@media (max-width: 44rem) { article { flex-direction: column; } }
"""


@dataclass(frozen=True)
class Row:
    """One row of a batch, of one or more samples."""

    input_ids: Tensor  # [L]
    labels: Tensor  # [L]
    attention_mask: Tensor  # [L]
    position_ids: Tensor  # [L]; a new sample begins at each 0
    images: np.ndarray  # [m, S, S, 3] uint8, as the encoder receives them, in reading order
    names: Sequence[tuple[str, str]]  # (id, remark) of each sample

    def kinds(self, image_token_id: int) -> list[str]:
        """Return the kind of each of the L tokens: a key of KINDS."""

        def kind(token: int, label: int, is_read: int) -> str:
            if not is_read:
                return "padding"
            if label != IGNORE_INDEX:
                return "supervised" if label == token else "mislabelled"
            return "image" if token == image_token_id else "prompt"

        columns = (self.input_ids.tolist(), self.labels.tolist(), self.attention_mask.tolist())
        return [kind(*values) for values in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Vocabulary:
    """How token ids are displayed."""

    token_bytes: Callable[[int], bytes]  # id -> the bytes of its text
    special: dict[int, str]  # id -> name of a special token, which never represents text
    image_token_id: int
    num_image_tokens: int  # how many times image_token_id is repeated for one image


def write_row(row: Row, vocabulary: Vocabulary) -> str:
    """Return the HTML of one row: its images, lengths and tokens, with a line between its samples."""
    kinds = row.kinds(vocabulary.image_token_id)
    parts, names = [], iter(row.names)
    for number, (begin, end) in enumerate(_samples(row)):
        name, remark = next(names)
        heading = f"<h3>{html.escape(printable(name))}<span>{html.escape(printable(remark))}</span></h3>"
        parts.append(("<hr>" if number else "") + heading + _lengths(Counter(kinds[begin:end])))
        tokens = _tokens(row, kinds=kinds, begin=begin, end=end, vocabulary=vocabulary)
        parts.append(f'<div class="tokens">{"".join(tokens)}</div>')
    images = "".join(map(_image, row.images)) or '<p class="dim">no image</p>'
    return f"<article><figure>{images}</figure><div>{''.join(parts)}</div></article>"


def write_page(
    title: str, about: dict[str, str], counts: Counter, batches: Sequence[tuple[str, str, Sequence[str]]]
) -> str:
    """Return the HTML of the page.

    about: name -> value of the settings that made the page. counts: number of tokens by kind. batches: (name, remark,
    HTML of the rows) of each batch.
    """
    facts = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in about.items())
    legend = "".join(
        f'<tr><td><i class="chip {kind}">{kind}</i><td>{counts[kind]:,}<td>{counts[kind] / counts.total():.1%}'
        f'<td class="dim">{meaning}'
        for kind, meaning in KINDS.items()
        if counts[kind] or kind != "mislabelled"
    )
    legend += (
        '<tr><td><i class="special">&lt;|…|&gt;</i><td><td><td class="dim">a special token; text never becomes one'
    )
    body = "".join(
        f"<section><h2>{html.escape(name)} <span>{html.escape(remark)}</span></h2>{''.join(rows)}</section>"
        for name, remark, rows in batches
    )
    header = f"<header><h1>{html.escape(title)}</h1><dl>{facts}</dl><table>{legend}</table></header>"
    return html_page(title, style=_STYLE, body=header + body)


def _lengths(counts: Counter) -> str:
    """Return the number of tokens of each kind, in words and as a bar."""
    read = counts.total() - counts["padding"]
    words = [f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind] and kind != "padding"]
    padding = f" + {counts['padding']:,} padding" if counts["padding"] else ""
    bar = "".join(f'<span class="{kind}" style="flex:{counts[kind]}"></span>' for kind in KINDS if counts[kind])
    text = f"<b>{read:,} tokens</b>, {counts['supervised'] / read:.1%} learned: {' · '.join(words)}{padding}"
    return f'<div class="lengths">{text}</div><div class="bar">{bar}</div>'


def _samples(row: Row) -> Iterator[tuple[int, int]]:
    """Return (begin, end) of each sample in the row. The padding belongs to the last sample."""
    starts = ((row.position_ids == 0) & (row.attention_mask != 0)).nonzero().flatten().tolist()
    if len(starts) != len(row.names):
        raise ValueError(f"{len(row.names)} names for a row in which {len(starts)} samples begin")
    return zip(starts, [*starts[1:], len(row.input_ids)], strict=True)


def _tokens(row: Row, kinds: list[str], begin: int, end: int, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield the HTML of the tokens from `begin` to `end`, split into images, special tokens and whole characters."""
    ids = row.input_ids.tolist()
    span = partial(_span, row=row, vocabulary=vocabulary)
    for kind, run in groupby(range(begin, end), kinds.__getitem__):
        places = list(run)
        if kind == "image":
            for first in range(0, len(places), vocabulary.num_image_tokens):
                one_image = places[first : first + vocabulary.num_image_tokens]
                yield span("chip image", f"&lt;image&gt; × {len(one_image)}", one_image)
        elif kind == "padding":
            yield span("chip padding", f"padding × {len(places)}", places)
        else:
            for is_special, some in groupby(places, lambda place: ids[place] in vocabulary.special):
                if is_special:
                    for place in some:
                        yield span(f"{kind} special", html.escape(vocabulary.special[ids[place]]), [place])
                else:
                    for group, text in _characters(list(some), ids, vocabulary.token_bytes):
                        yield span(kind, _visible(text), group)


def _characters(
    places: list[int], ids: list[int], token_bytes: Callable[[int], bytes]
) -> Iterator[tuple[list[int], str]]:
    """Yield (places, text) of each token; tokens that share the bytes of one character form a group."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # the text may be cut inside a character
    group, text = [], ""
    for place in places:
        group.append(place)
        text += decoder.decode(token_bytes(ids[place]), final=place == places[-1])
        if not decoder.getstate()[0]:
            yield group, text
            group, text = [], ""


def _span(style: str, content: str, places: list[int], row: Row, vocabulary: Vocabulary) -> str:
    """Return `content` as an element whose tooltip lists the positions, ids and labels of the tokens at `places`."""

    def listed(values: list[int]) -> str:
        same = len(set(values)) == 1
        return f"{values[0]}" if same else " ".join(map(str, values))

    first, last = places[0], places[-1]
    where = f"token {first}" if first == last else f"tokens {first}–{last}"
    ids = row.input_ids[first : last + 1].tolist()
    labels = row.labels[first : last + 1].tolist()
    learned = "" if any(label != IGNORE_INDEX for label in labels) else " (not learned)"
    name = f" {vocabulary.special[ids[0]]}" if ids[0] in vocabulary.special else ""
    tip = f"{where} · position {row.position_ids[first]} · id {listed(ids)}{name} · label {listed(labels)}{learned}"
    return f'<i class="{style}" title="{html.escape(tip)}">{content}</i>'


def _visible(text: str) -> str:
    """Return text as HTML with visible spaces and line ends; unprintable characters are shown as their code points."""

    def visible(character: str) -> str:
        if character == "\n":
            return '<s class="end">\n</s>'
        if character == "\t":
            return '<s class="tab">\t</s>'
        if character == " ":
            return "<s> </s>"
        return html.escape(character) if character.isprintable() else f"<u>U+{ord(character):04X}</u>"

    return "".join(map(visible, text))


def _image(pixels: np.ndarray) -> str:
    """Return the image [S, S, 3] uint8 as an HTML element. PNG keeps the pixels exact."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    side = len(pixels)
    width = side * (WIDTH // side) or WIDTH
    small = ' class="pixels"' if width > side else ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{small} width="{width}" alt="{side} × {side} pixels" src="data:image/png;base64,{data}">'
