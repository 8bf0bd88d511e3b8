"""Format the results of `dataset.checks.records` and `dataset.checks.sample` as text for the user."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from config import printable, shortened
from dataset.checks.findings import SHOWN
from dataset.checks.records import ENOUGH_HELD_OUT, Checked
from dataset.checks.sample import Lengths
from dataset.json_stream import stream_json
from dataset.language import LANGUAGES

BAR_WIDTH = 36
LONGEST_NAME = 40  # characters shown of a source or a type
EIGHTHS = " ▏▎▍▌▋▊▉"


def describe(checked: Checked, lengths: Lengths | None, images: int, max_length: int) -> str:
    """Describe a QA file: counts by source and language, types, and histograms of the sample's lengths and labels.

    images: the number of images that were decoded.
    """
    sampled = "all" if len(checked.sample) == checked.read else f"{len(checked.sample):,} of {checked.read:,}"
    lines = [f"{checked.path}: {checked.read:,} records", *_source_table(checked), *_types(checked)]
    lines += [f"  {images:,} images fully decoded ({sampled} records)"] if images else []
    if lengths is not None and len(lengths.tokens):
        lines += [
            "",
            f"  tokens per conversation ({sampled} records), max_length {max_length:,}: {_spread(lengths.tokens)}",
        ]
        lines += histogram(lengths.tokens, _edges(lengths.tokens), lambda edge: f"{edge:,.0f}", mark=max_length)
        cut = float(np.mean(lengths.tokens > max_length))
        if cut:
            lines.append(f"  {cut:.1%} are longer than max_length: the end of their answers is not trained on")
        lines += ["", f"  supervised share of the tokens: {_spread(100 * lengths.supervised, ' %')}"]
        lines += histogram(lengths.supervised, np.linspace(0, 1, 11), lambda edge: f"{edge:.0%}")
    return "\n".join(lines)


def _source_table(checked: Checked) -> list[str]:
    rows: list[tuple[str, ...]] = [("source", "records", "turns", "images", "text only", *LANGUAGES)]
    for name, count in sorted(checked.sources.items(), key=lambda pair: (-pair[1].records, pair[0])):
        numbers = (
            count.records,
            count.turns,
            count.images,
            count.text_only,
            *(count.languages[x] for x in LANGUAGES),
        )
        rows.append((printable(shortened(name, LONGEST_NAME)) or "(none)", *(f"{number:,}" for number in numbers)))
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        f"  {name:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        for name, *cells in rows
    ]


def _types(checked: Checked) -> list[str]:
    named = [(name, count) for name, count in checked.types.most_common() if name]
    if not named:
        return []
    more = f", and {len(named) - 12} more" if len(named) > 12 else ""
    shown = [f"{printable(shortened(name, LONGEST_NAME))} {count:,}" for name, count in named[:12]]
    return ["  types: " + ", ".join(shown) + more]


def _spread(values: np.ndarray, unit: str = "") -> str:
    median, most, nearly_all = np.percentile(values, (50, 95, 99))
    named = {"median": median, "95 %": most, "99 %": nearly_all, "most": values.max()}
    return ", ".join(f"{name} {value:,.0f}{unit}" for name, value in named.items())


def _edges(values: np.ndarray) -> np.ndarray:
    """Return the edges of about ten buckets of a round width that cover the values."""
    width = max(1.0, float(np.ptp(values)) / 10)
    size = 10 ** np.floor(np.log10(width))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= width)
    return np.arange(values.min() // step * step, values.max() + step + 1, step)


def histogram(
    values: np.ndarray, edges: np.ndarray, label: Callable[[float], str], mark: float | None = None
) -> list[str]:
    """Draw one line with a bar for each bucket [edge, next edge); the last bucket includes its end.

    Empty buckets at both ends are omitted. mark: draw a line after the bucket that contains it.
    """
    counts, _ = np.histogram(values, edges)
    used = np.flatnonzero(counts)
    names = [f"{label(low)} - {label(high)}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    shown = range(used[0], used[-1] + 1)
    width = max(len(names[i]) for i in shown)
    lines = []
    for i in shown:
        whole, part = divmod(round(8 * BAR_WIDTH * counts[i] / counts.max()), 8)
        bar = "█" * whole + (EIGHTHS[part] if part else "") or ("▏" if counts[i] else "")
        lines.append(f"  {names[i]:>{width}}  {bar:<{BAR_WIDTH}} {counts[i]:>7,}".rstrip())
        if mark is not None and edges[i] <= mark < edges[i + 1]:
            lines.append(f"  {'':>{width}}  {'╌' * BAR_WIDTH} max_length {mark:,}")
    return lines


def notes(checked: Checked, max_refused: float, thorough: bool) -> list[str]:
    """Return notes that do not prevent training.

    max_refused: the share of duplicate records above which they are noted even if not `thorough`.
    """
    found, count = [], len(checked.duplicates)
    if count and (thorough or count > max_refused * checked.read):
        word = "lines" if checked.sample and checked.sample[0][0].line else "items"
        first = "; ".join(f"{word} {a} and {b}" for a, b in checked.duplicates[:3].tolist())
        found.append(
            f"{checked.path.name}: {count:,} of {checked.read:,} records repeat another one, image and turns ({first}"
            f"{'; ...' if count > 3 else ''}); each is trained on as often as it is listed."
        )
    if checked.held_out_texts:
        found.append(
            f"{checked.path.name}: {checked.held_out_texts:,} records without an image are also held out, "
            "word for word."
        )
    images, texts = len(checked.some_images), len(checked.text_hashes)  # of a held-out file; 0 for a training file
    if 0 < images + texts < ENOUGH_HELD_OUT:
        held = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((images, "image"), (texts, "text")) if n]
        found.append(
            f"{checked.path.name}: holds only {' and '.join(held)}, so scores on it say little about other data. Hold out "
            f"{ENOUGH_HELD_OUT} or more: raise data.validation_fraction, or give more data for validation."
        )
    return found


def refused_rows(path: Path) -> str:
    """Describe the raw records that data preparation refused: the first rows of each reason.

    path: the list written by data preparation; if it does not exist, the result is empty.
    """
    by_reason: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for item in stream_json(path) if path.exists() else ():
        row = item.value
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("reason", "file", "detail")):
            continue  # not written by data preparation
        counts[row["reason"]] += 1
        if counts[row["reason"]] <= SHOWN:
            where = f"line {row['line']}" if row.get("line") else f"item {row.get('index')}"
            text = f"{row['file']} {where} ({json.dumps(row.get('id'), ensure_ascii=False)}): {row['detail']}"
            by_reason.setdefault(row["reason"], []).append(printable(text))
    found = []
    for reason, count in counts.most_common():
        found.append(f"refused when the data were prepared: {reason}, {count:,} record{'' if count == 1 else 's'}")
        found += [f"    {text}" for text in by_reason[reason]]
        if count > SHOWN:
            found.append(f"    ... and {count - SHOWN:,} more; the full list is in {path}")
    return "".join(f"{line}\n" for line in found)
