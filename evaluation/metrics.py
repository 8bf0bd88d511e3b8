"""The metrics of answers, each chosen by the type of its question, with bootstrap intervals. Knows no model.

A metric writes the statistics of each answer into a row of numbers, and its values are functions of the rows' sums, so a
resample needs nothing but a sum.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np

from evaluation.answers import anls, is_correct, read_choice, read_yes_no, vqa_accuracy
from evaluation.captions import bleu4, bleu_counts, cider_d, rouge_l, tokenise

RESAMPLES = 1000
TAILS = (2.5, 97.5)  # percentiles of a 95 % interval
AT_ONCE = 2**22  # random numbers in memory


class Asked(Protocol):
    """What a metric reads of a question."""

    @property
    def type(self) -> str: ...
    @property
    def metric(self) -> str: ...  # "" for the one of its type
    @property
    def references(self) -> Sequence[str]: ...
    @property
    def options(self) -> Sequence[str]: ...
    @property
    def group(self) -> str: ...  # of questions that only count together; "" for none
    @property
    def unit(self) -> Hashable: ...  # its images: what a bootstrap draws


Row = Sequence[float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How the answers of one type are scored.

    rows: (questions, answers, all questions of the metric) -> one row of K numbers for each answer.
    values: sums of rows [..., K] -> name -> [...]. The first is the main value.
    single: the rows [n, K] -> the score of each answer [n].
    """

    rows: Callable[[Sequence[Asked], Sequence[str], Sequence[Asked]], list[Row]]
    values: Callable[[np.ndarray], dict[str, np.ndarray]]
    single: Callable[[np.ndarray], np.ndarray] = lambda rows: rows[:, 0]


def _each(score: Callable[[str, Sequence[str]], float]) -> Callable[..., list[Row]]:
    def rows(questions: Sequence[Asked], answers: Sequence[str], _: Sequence[Asked]) -> list[Row]:
        return [(score(answer, q.references), 1) for q, answer in zip(questions, answers, strict=True)]

    return rows


def _mean(name: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return lambda sums: {name: _ratio(sums[..., 0], sums[..., 1])}


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.shape(a)), where=np.asarray(b) != 0)


def _all_right(rights: Sequence[bool], groups: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Return for the first member of each group (are all its members right, 1), and (0, 0) for the others and for those
    of the group ""."""
    wrong = {group for right, group in zip(rights, groups, strict=True) if not right}
    seen: set[Hashable] = {""}
    found = []
    for group in groups:
        found.append((0, 0) if group in seen else (int(group not in wrong), 1))
        seen.add(group)
    return found


def _yes_no_rows(questions: Sequence[Asked], answers: Sequence[str], _: Sequence[Asked]) -> list[Row]:
    """True and false positives, true and false negatives, unclear answers, pairs, images."""
    found = []
    for q, answer in zip(questions, answers, strict=True):
        given, expected = read_yes_no(answer), read_yes_no(q.references[0]) == "yes"
        is_yes = given != "no"  # as POPE: an answer that says neither counts as yes
        found.append(
            (is_yes and expected, is_yes and not expected, not (is_yes or expected), expected and not is_yes, not given)
        )
    pairs = _all_right([row[0] or row[2] for row in found], [(q.type, q.unit) for q in questions])
    return [(*row, *pair) for row, pair in zip(found, pairs, strict=True)]


def _yes_no_values(sums: np.ndarray) -> dict[str, np.ndarray]:
    tp, fp, tn, fn, unclear, right, images = np.moveaxis(np.asarray(sums, float), -1, 0)
    n = tp + fp + tn + fn
    return {
        "accuracy": _ratio(tp + tn, n),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "yes_share": _ratio(tp + fp, n),
        "unclear_share": _ratio(unclear, n),
        "accuracy_plus": _ratio(right, images),
    }


def _choice_rows(questions: Sequence[Asked], answers: Sequence[str], _: Sequence[Asked]) -> list[Row]:
    rights = []
    for q, answer in zip(questions, answers, strict=True):
        letter = read_choice(answer, q.options)
        rights.append(letter != "" and letter == read_choice(q.references[0], q.options))
    circles = _all_right(rights, [q.group for q in questions])
    return [(right, 1, *circle) for right, circle in zip(rights, circles, strict=True)]


def _choice_values(sums: np.ndarray) -> dict[str, np.ndarray]:
    found = {"accuracy": _ratio(sums[..., 0], sums[..., 1])}
    if np.any(sums[..., 3]):
        found["circular_accuracy"] = _ratio(sums[..., 2], sums[..., 3])
    return found


def _caption_rows(questions: Sequence[Asked], answers: Sequence[str], every: Sequence[Asked]) -> list[Row]:
    captions = [tokenise(answer) for answer in answers]
    references = [[tokenise(reference) for reference in q.references] for q in questions]
    corpus = None if every is questions else [[tokenise(reference) for reference in q.references] for q in every]
    ciders = cider_d(captions, references, corpus)
    return [
        (cider, rouge_l(caption, several), 1, *bleu_counts(caption, several))
        for caption, several, cider in zip(captions, references, ciders, strict=True)
    ]


def _caption_values(sums: np.ndarray) -> dict[str, np.ndarray]:
    n = sums[..., 2]
    return {
        "cider_d": _ratio(sums[..., 0], n), "bleu_4": bleu4(sums[..., 3:]), "rouge_l": _ratio(sums[..., 1], n)
    }  # fmt: skip


METRICS: dict[str, Metric] = {
    "exact": Metric(
        _each(lambda answer, references: any(is_correct(answer, one) for one in references)), _mean("accuracy")
    ),
    "vqa": Metric(_each(vqa_accuracy), _mean("accuracy")),
    "yes_no": Metric(_yes_no_rows, _yes_no_values, lambda rows: rows[:, 0] + rows[:, 2]),
    "choice": Metric(_choice_rows, _choice_values),
    "anls": Metric(_each(anls), _mean("anls")),
    "caption": Metric(_caption_rows, _caption_values),
}


def metric_of(question: Asked) -> str:
    """Return the name of the metric that scores a question: that of its own `metric` or the first word of its type
    ("vqa/number", "yes_no"); without one "choice" if it has options, else "exact". "yes_no" and "choice" need a reference
    that is yes or no, or one of the options; another is compared exactly."""
    name = question.metric or question.type.partition("/")[0]
    if name not in METRICS:
        name = "choice" if question.options else "exact"
    reference = question.references[0]
    is_unread = name == "yes_no" and not read_yes_no(reference)
    return "exact" if is_unread or name == "choice" and not read_choice(reference, question.options) else name


def answer_scores(questions: Sequence[Asked], answers: Sequence[str]) -> list[tuple[str, float]]:
    """Return (name of the metric, score) of each answer. Scores are in [0, 1]; those of captions, CIDEr-D, in [0, 10]."""
    scores: dict[int, tuple[str, float]] = {}
    for name, members in _by_metric(questions).items():
        some = [questions[i] for i in members]
        rows = np.array(METRICS[name].rows(some, [answers[i] for i in members], some), float)
        scores |= {i: (name, float(one)) for i, one in zip(members, METRICS[name].single(rows), strict=True)}
    return [scores[i] for i in range(len(questions))]


def summarise(
    questions: Sequence[Asked],
    answers: Sequence[str],
    blind: Mapping[str, Mapping[int, str]],
    seed: int,
    groupings: Mapping[str, Sequence[str]],
) -> dict:
    """Return {metric: {"n", "images", value: {"value", "low", "high"}, ..., "image_adds": {kind: ...}, grouping: {group: the
    same}}}.

    blind: kind of blind image -> {number of a question: its answer}. "image_adds" is how much higher the main value is
    with the own images, over the questions that have both answers.
    groupings: name -> the group of each question, "" for none. "low" and "high" bound a 95 % bootstrap interval: images are
    drawn with all their questions, so questions about one image are not counted as independent. They are None for a
    single image. The seed decides what is drawn.
    """
    found = {}
    for name, members in _by_metric(questions).items():
        metric, some = METRICS[name], [questions[i] for i in members]
        place = {i: k for k, i in enumerate(members)}
        own = np.array(metric.rows(some, [answers[i] for i in members], some), float)
        others: dict[str, np.ndarray] = {}
        for kind, given in blind.items():
            both = [i for i in members if i in given]
            others[kind] = np.full_like(own, np.nan)
            if both:
                rows = metric.rows([questions[i] for i in both], [given[i] for i in both], some)
                others[kind][[place[i] for i in both]] = rows
        units = [q.unit for q in some]
        entry = _summary(metric, own, others, units=units, seed=seed)
        for grouping, groups in groupings.items():
            parts: dict[str, list[int]] = defaultdict(list)
            for i in members:
                if groups[i]:
                    parts[groups[i]].append(place[i])
            entry[grouping] = {
                group: _summary(
                    metric,
                    own[part],
                    {kind: rows[part] for kind, rows in others.items()},
                    units=[units[k] for k in part],
                    seed=seed,
                )
                for group, part in sorted(parts.items())
            }
        found[name] = entry
    return found


def _by_metric(questions: Sequence[Asked]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {name: [] for name in METRICS}
    for i, question in enumerate(questions):
        members[metric_of(question)].append(i)
    return {name: some for name, some in members.items() if some}


def _summary(
    metric: Metric, own: np.ndarray, others: Mapping[str, np.ndarray], *, units: Sequence[Hashable], seed: int
) -> dict:
    """own: rows [n, K]; others: kind -> rows [n, K], NaN where a question has no blind answer; units: [n]."""
    entry = {"n": len(own), "images": len(set(units)), **_bounded(metric.values, own, units, seed=seed)}
    adds = {}
    for kind, rows in others.items():
        both = np.flatnonzero(~np.isnan(rows[:, 0]))
        if len(both):
            pairs, k = np.concatenate([own[both], rows[both]], 1), own.shape[1]

            def difference(sums: np.ndarray, k: int = k) -> dict[str, np.ndarray]:
                mine, its = (next(iter(metric.values(part).values())) for part in (sums[..., :k], sums[..., k:]))
                return {"": mine - its}

            adds[kind] = {
                "n": len(both),
                **_bounded(difference, pairs, [units[i] for i in both.tolist()], seed=seed)[""],
            }
    return entry | ({"image_adds": adds} if adds else {})


def _bounded(
    values: Callable[[np.ndarray], dict[str, np.ndarray]], rows: np.ndarray, units: Sequence[Hashable], *, seed: int
) -> dict[str, dict[str, float | None]]:
    """Return name -> {"value", "low", "high"} of values of the sum of rows [n, K]; see `summarise`."""
    numbers = {unit: k for k, unit in enumerate(dict.fromkeys(units))}
    sums = np.zeros((len(numbers), rows.shape[1]))
    np.add.at(sums, [numbers[unit] for unit in units], rows)
    exact = values(sums.sum(0))
    bounds: dict[str, tuple[float | None, float | None]] = dict.fromkeys(exact, (None, None))
    if len(sums) > 1:
        drawn = values(_resampled(sums, seed))
        for name in exact:
            low, high = np.percentile(drawn[name], TAILS)
            bounds[name] = float(low), float(high)
    return {
        name: {"value": float(value), "low": bounds[name][0], "high": bounds[name][1]} for name, value in exact.items()
    }


def _resampled(sums: np.ndarray, seed: int) -> np.ndarray:
    """Return the sums of RESAMPLES samples with replacement from the rows [G, K]: [RESAMPLES, K]."""
    generator, count = np.random.default_rng(seed), len(sums)
    size = max(1, AT_ONCE // count)
    chunks = []
    for start in range(0, RESAMPLES, size):
        draws = min(size, RESAMPLES - start)
        picked = generator.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
        chunks.append(np.bincount(picked.ravel(), minlength=draws * count).reshape(draws, count) @ sums)
    return np.concatenate(chunks)
