"""The numbers of the emoji report: shares with intervals, what wrong names were, and Markdown tables of both. Answers and
files are not known here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from demo.emoji import GROUPS
from demo.emoji_baselines import EmojiData

PARTS = {
    "": "known concepts",
    "symbol_": "symbols: clocks, arrows, boxed letters, coloured shapes, flags",
    "new_": "held-out concepts",
}
KINDS = {
    "name_en": "name, English",
    "name_zh": "name, Chinese",
    "yes_no": "yes or no",
    "which": "which of two",
    "group": "group",
    "in_chinese": "in Chinese",
    "pair": "two images: same thing?",
}
FEATURES = {"class_and_patches": "class token and mean of patches", "patches": "mean of patches"}  # best known first

NOTES = (
    "Blind: the same questions about swapped images. Nearest: the training image of the largest cosine. Ridge: its alpha is "
    "chosen by holding out one training style after another. Both use standardised features, in the first table those of "
    "the second table's first line. Of the right group: among the wrong answers that are another known concept's name. "
    "Chance: the same if each of them were a random other name."
)


def share(right: int, count: int) -> dict:
    """Return {"right", "n", "percent", "low", "high"}: percent with Wilson's 95 % interval, None if `count` is 0."""
    if count == 0:
        return {"right": 0, "n": 0, "percent": None, "low": None, "high": None}
    z, p = 1.959964, right / count
    centre, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1))
    return {"right": right, "n": count, "percent": 100 * p, "low": 100 * max(low, 0.0), "high": 100 * min(high, 1.0)}


def baseline_shares(found: dict, concepts: Sequence[str]) -> dict:
    """Return {"nearest": share, "ridge": share} of `concepts` that are taken for themselves."""
    return {
        name: share(sum(found[name][concept] == concept for concept in concepts), len(concepts))
        for name in ("nearest", "ridge")
    }


def wrong_names(data: EmojiData, wrong: Sequence[tuple[str, str | None]]) -> dict:
    """Return what wrong answers were. wrong: (the concept shown, the known concept that was named or None).

    right_group: share of the answers that name another concept which name one of the same group; chance: the percentage
    of it if each of them were a random other concept. no_name: how many are no known concept's name.
    """
    sizes = {group: sum(data.groups[one] == group for one in data.names if one in data.groups) for group in GROUPS}
    named = [(data.groups[shown], data.groups.get(concept)) for shown, concept in wrong if concept is not None]
    chances = [(sizes[group] - 1) / (len(data.names) - 1) for group, _ in named]
    return {
        "wrong": len(wrong),
        "no_name": len(wrong) - len(named),
        "right_group": share(sum(group == other for group, other in named), len(named)),
        "chance": 100 * sum(chances) / len(chances) if chances else None,
    }


def percent(found: dict, interval: bool = True) -> str:
    if found["percent"] is None:
        return "-"
    return f"{found['percent']:.1f}" + (f" ({found['low']:.1f}-{found['high']:.1f})" if interval else "")


def report_table(entries: Sequence[dict]) -> str:
    """Return the questions as a Markdown table."""
    lines = [
        "| question | n | correct % (95 %) | blind % | nearest % | ridge % | wrong: another's name / no name "
        "| of the right group % (chance) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    part = ""
    for entry in entries:
        prefix = next(prefix for prefix in ("symbol_", "new_", "") if entry["type"].startswith(prefix))
        if PARTS[prefix] != part:
            part = PARTS[prefix]
            lines.append(f"| **{part}** | | | | | | | |")
        cells = [KINDS[entry["type"].removeprefix(prefix)], str(entry["correct"]["n"]), percent(entry["correct"])]
        cells.append(percent(entry["blind"], interval=False))
        if "ridge" in entry:
            cells += [percent(entry[name], interval=False) for name in ("nearest", "ridge")]
            cells.append(f"{entry['right_group']['n']} / {entry['no_name']}")
            chance = "" if entry["chance"] is None else f" ({entry['chance']:.1f})"
            cells.append(percent(entry["right_group"], interval=False) + chance)
        lines.append(f"| {' | '.join([*cells, *[''] * (8 - len(cells))])} |")
    return "\n".join(lines)


def baseline_table(baselines: dict, data: EmojiData, concepts: set[str]) -> str:
    """Return the baselines about the known concepts `concepts` as a Markdown table, with all symbols."""
    lines = [
        f"| frozen features, {len(data.training)} training images -> {len(concepts)} of {data.held_out_style} "
        "| nearest % (95 %) | ridge % (95 %) | ridge's alpha |",
        "|---|--:|--:|--:|",
    ]
    for kind, found in baselines.items():
        shares = baseline_shares(found, sorted(concepts))
        lines.append(
            f"| {FEATURES[kind]} | {percent(shares['nearest'])} | {percent(shares['ridge'])} | {found['alpha']:g} |"
        )
    return "\n".join(lines)
