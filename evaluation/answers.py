"""Compare one short answer with its references: exact match, VQA accuracy, yes or no, multiple choice, ANLS."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"  # of the options of a question

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
# Every word that the VQA rules write with apostrophes. They also accept it with any one of its apostrophes missing.
_CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've""".split()
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, character in enumerate(word) if character == "'"
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_number_with_comma = re.compile(r"\d,\d").search
_drop_periods = re.compile(r"\.(?!\d)").sub
_HAN = "\u3400-\u9fff\U00020000-\U000323af"
_has_han = re.compile(f"[{_HAN}]").search
_drop_blanks_of_han = re.compile(rf"(?<=[{_HAN}])\s+|\s+(?=[{_HAN}])").sub
_WIDE = str.maketrans("\u3002\u3001\u300a\u300b\u201c\u201d\u2018\u2019", '.,<>""' + "''")


def is_correct(answer: str, reference: str) -> bool:
    """Return whether the two are equal, except for whitespace at the ends and the form of composed characters: a tokenizer
    writes NFC, a reference may be in any form."""
    return unicodedata.normalize("NFC", answer).strip() == unicodedata.normalize("NFC", reference).strip()


def vqa_normalised(text: str) -> str:
    """Return an answer as the VQA challenge compares it: lower case, without articles, with digits for number words up to
    ten and apostrophes in contractions, and without punctuation: a sign beside a blank, and a comma of a number, are
    removed, other signs become a blank. Full-width signs and digits count as plain ones; blanks beside Chinese characters
    are removed.

    https://visualqa.org/evaluation.html, as in the challenge's own code.
    """
    text = unicodedata.normalize("NFKC", text) if not text.isascii() else text
    text = " ".join(text.translate(_WIDE).split())
    left = text
    removes_all = _number_with_comma(text) is not None
    for sign in _PUNCTUATION:
        if sign in text:
            left = left.replace(sign, "" if removes_all or f"{sign} " in text or f" {sign}" in text else " ")
    words = (_NUMBERS.get(word, word) for word in _drop_periods("", left).lower().split())
    found = " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
    return _drop_blanks_of_han("", found) if _has_han(found) else found


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return how far the annotators agree with an answer, in [0, 1]: the mean over all subsets that leave out one of the n
    references of min(1, equal references / 3). With ten references these are 0.3, 0.6, 0.9 and 1 for 1, 2, 3 and 4 equal
    ones. With two or three references all of a subset must be equal; with one, it alone counts."""
    found = vqa_normalised(answer)
    equal = sum(vqa_normalised(reference) == found for reference in references)
    n = len(references)
    if n == 1:
        return float(equal)
    needed = min(3, n - 1)
    with_one_less = min(1.0, (equal - 1) / needed) if equal else 0.0
    return (equal * with_one_less + (n - equal) * min(1.0, equal / needed)) / n


_NO = frozenset(("no", "not"))
_YES_ZH, _NO_ZH = ("是", "有", "对", "能", "会", "可以", "正确"), ("不", "没", "否", "无", "错", "非", "别")


def read_yes_no(answer: str) -> str:
    """Return "yes" or "no", or "" for an answer that has neither word.

    As POPE reads it: only the first sentence counts, and it is "no" if "no" or "not" is among its words. A Chinese answer
    is "no" if it starts with a word such as 不, 没 or 否, and "yes" if it starts with one such as 是, 有 or 对.
    """
    text = unicodedata.normalize("NFKC", answer).translate(_WIDE).strip().lower()
    if _has_han(text[:2]):
        if text.startswith(_NO_ZH) or text.startswith(("是不", "有没")):
            return "no"
        return "yes" if text.startswith(_YES_ZH) else ""
    words = re.findall(r"[\w']+", text.partition(".")[0])
    if not _NO.isdisjoint(words):
        return "no"
    return "yes" if "yes" in words else ""


_alone = re.compile(r"[\s(\[<*\"']*([A-Ja-j])[\s)\]>*\"'.,:;]*\Z").match
_first = re.compile(r"\s*(?:[(\[<]\s*([A-Ja-j])\s*[)\]>]|([A-J])\s*[.:),;])").match
_named = re.compile(
    r"(?:answer|option|choice)(?:\s+is|:|\s)*\s*[(\[]?([A-J])(?![\w'])|(?:答案|选项?|选择)[是为:]*\s*[(\[]?([A-J])"
).search
_signs = re.compile(r"[^\w\s]+").sub


def read_choice(answer: str, options: Sequence[str]) -> str:
    """Return the letter of the option that an answer means, or "" if it means none or several.

    In this order: a letter alone; a letter in brackets or before a sign at the beginning ("B. a cat"); the text of an
    option; a letter after a word such as "answer is" or 答案是; the only option whose text is part of the answer, where one
    that is itself part of another such option does not count. options: their texts; empty if only their letters are known.
    """
    text = unicodedata.normalize("NFKC", answer).translate(_WIDE).strip()
    known = LETTERS[: len(options)] or LETTERS
    for found in (_alone(text), _first(text)):
        if found and (letter := (found[1] or found[found.lastindex or 1]).upper()) in known:
            return letter
    plain, texts = _plain(text), [_plain(option) for option in options]
    equal = [letter for letter, one in zip(known, texts, strict=False) if one and one == plain]
    if len(equal) == 1:
        return equal[0]
    if (named := _named(text)) and (letter := named[1] or named[2]) in known:
        return letter
    inside = {one: letter for letter, one in zip(known, texts, strict=False) if one and _is_part(one, plain)}
    whole = [one for one in inside if not any(one != other and _is_part(one, other) for other in inside)]
    return inside[whole[0]] if len(whole) == 1 and texts.count(whole[0]) == 1 else ""


def _plain(text: str) -> str:
    found = " ".join(_signs(" ", unicodedata.normalize("NFKC", text).casefold()).split())
    return found or text.strip().casefold()


def _is_part(part: str, text: str) -> bool:
    """Return whether `part` is in `text`: as whole words, or anywhere if it is Chinese."""
    return part in text if _has_han(part) else f" {part} " in f" {text} "


def anls(answer: str, references: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity to the nearest reference, in [0, 1]; 0 if it is below one half.

    Case and the number of blanks do not count. Biten et al., Scene Text Visual Question Answering (2019), as in DocVQA.
    """
    return max((_similarity(_folded(answer), _folded(reference)) for reference in references), default=0.0)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    distance = levenshtein(a, b) / longest if longest else 0.0
    return 1.0 - distance if distance < 0.5 else 0.0


def levenshtein(a: str, b: str) -> int:
    """Return the number of characters to insert, delete or replace that make `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
