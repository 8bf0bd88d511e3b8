"""The language of a text, judged by its script. Knows nothing about records."""

from __future__ import annotations

import re

LANGUAGES = ("en", "zh", "other")

_HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U000323af]")
# Letters that are neither Latin nor Han.
_FOREIGN = re.compile(r"[^\W\d_a-zA-Z\u00c0-\u024f\u3400-\u9fff\U00020000-\U000323af]")


def language_of(text: str) -> str:
    """Return "en", "zh" or "other".

    "other": more than 10 % of the characters are letters that are neither Latin nor Han. Otherwise "zh": more than 10 %
    are Han characters. Everything else is "en", including other languages in Latin script and an empty text.
    """
    if text.isascii():
        return "en"
    if 10 * len(_FOREIGN.findall(text)) > len(text):
        return "other"
    return "zh" if 10 * len(_HAN.findall(text)) > len(text) else "en"
