"""BLEU-4, ROUGE-L and CIDEr-D of captions, equal to those of pycocoevalcap (the code of the COCO caption challenge) on the
same tokens. sacrebleu and rouge-score define both of their metrics otherwise."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

Tokens = Sequence[str]
LONGEST = 4  # words of an n-gram
BETA = 1.2  # weight of recall in ROUGE-L
SIGMA = 6.0  # of the penalty for another length in CIDEr-D
SMALL, TINY = 1e-9, 1e-15  # keep BLEU's quotients defined

_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# Words with their inner signs, such as "t-shirt", "3.5" and "u.s.", which keeps its periods; each Chinese character.
_token = re.compile(
    rf"[{_HAN}]|(?:[^\W\d_]\.){{2,}}|\d+(?:[.,:/]\d+)*(?:-?[^\W_{_HAN}]+)*|[^\W_{_HAN}]+(?:[-'/_&][^\W_{_HAN}]+)*|[$%&#@+=*]"
).findall
_CLITIC = re.compile(r"(.+)(n't|'s|'re|'ve|'ll|'d|'m)\Z").match


def tokenise(caption: str) -> list[str]:
    """Return the tokens of a caption in lower case: words without punctuation, each Chinese character by itself.

    English words are divided as in the Penn Treebank, "isn't" into "is" and "n't". The challenge's own tokenizer is a Java
    program, which differs in rare words.
    """
    text = unicodedata.normalize("NFKC", caption).lower().replace("\u2019", "'")
    tokens: list[str] = []
    for word in _token(text):
        if "'" in word and (found := _CLITIC(word)):
            tokens += found.groups()
        elif word == "cannot":
            tokens += ("can", "not")
        else:
            tokens.append(word)
    return tokens


def _ngrams(tokens: Tokens) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1))


def bleu_counts(caption: Tokens, references: Sequence[Tokens]) -> list[int]:
    """Return what BLEU sums over captions: n-grams that are in a reference for n = 1 to 4, all n-grams for n = 1 to 4, the
    caption's length, and the length of the reference that is nearest in length."""
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= _ngrams(reference)
    right = [0] * LONGEST
    for ngram, count in _ngrams(caption).items():
        right[len(ngram) - 1] += min(count, most[ngram])
    length = len(caption)
    nearest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return [*right, *(max(0, length - n) for n in range(LONGEST)), length, nearest]


def bleu4(sums: np.ndarray) -> np.ndarray:
    """Return BLEU-4 of sums of `bleu_counts`: [..., 10] -> [...]."""
    sums = np.asarray(sums, float)
    precisions = (sums[..., :LONGEST] + TINY) / (sums[..., LONGEST : 2 * LONGEST] + SMALL)
    ratio = (sums[..., 8] + TINY) / (sums[..., 9] + SMALL)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / np.maximum(ratio, TINY)), 1.0)
    return precisions.prod(-1) ** (1 / LONGEST) * penalty


def rouge_l(caption: Tokens, references: Sequence[Tokens]) -> float:
    """Return ROUGE-L in [0, 1]: the weighted harmonic mean of the highest precision and the highest recall."""
    caption = caption or [""]
    common = [(_common_length(caption, reference or [""]), len(reference) or 1) for reference in references]
    precision = max(count for count, _ in common) / len(caption)
    recall = max(count / length for count, length in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_length(a: Tokens, b: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def cider_d(
    captions: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    corpus: Sequence[Sequence[Tokens]] | None = None,
) -> list[float]:
    """Return CIDEr-D of each caption, in [0, 10].

    corpus: the references of all captions of the set, in which common n-grams weigh little; by default `references`. A
    value depends on the whole set; in a set of a single caption it is 0.
    """
    grams = [[_ngrams(reference) for reference in several] for several in references]
    every = grams if corpus is None else [[_ngrams(reference) for reference in several] for several in corpus]
    found_in: Counter[tuple[str, ...]] = Counter()
    for several in every:
        found_in.update(set().union(*several))
    all_of_them = math.log(len(every)) if every else 0.0

    def vectors(counts: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        weights, squares, length = {}, [0.0] * LONGEST, 0
        for ngram, count in counts.items():
            weight = count * (all_of_them - math.log(max(1.0, found_in[ngram])))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight * weight
            length += count if len(ngram) == 2 else 0
        return weights, [math.sqrt(square) for square in squares], length

    scores = []
    for caption, several in zip(captions, grams, strict=True):
        mine, norms, length = vectors(_ngrams(caption))
        total = 0.0
        for reference in several:
            its, its_norms, its_length = vectors(reference)
            products = [0.0] * LONGEST
            for ngram, weight in mine.items():
                if other := its.get(ngram):
                    products[len(ngram) - 1] += min(weight, other) * other
            cosines = (
                product / (a * b) if a and b else product
                for product, a, b in zip(products, norms, its_norms, strict=True)
            )
            total += sum(cosines) * math.exp(-((length - its_length) ** 2) / (2 * SIGMA**2))
        scores.append(10.0 * total / LONGEST / len(several))
    return scores
