"""BLEU-4, ROUGE-L and CIDEr-D equal those of pycocoevalcap. Run: python -m pytest tests/evaluation/test_captions.py"""

import random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from evaluation.captions import bleu4, bleu_counts, cider_d, rouge_l, tokenise

WORDS = "a cat dog on the mat red t-shirt 猫 坐 在".split()


@pytest.mark.parametrize("count, seed", [(1, 0), (2, 1), (7, 2), (300, 3)])
def test_the_values_are_those_of_the_coco_challenge(count, seed):
    generator = random.Random(seed)

    def sentence() -> list[str]:
        return [generator.choice(WORDS) for _ in range(generator.randint(1, 14))]

    references = [[sentence() for _ in range(generator.randint(1, 5))] for _ in range(count)]
    captions = [generator.choice([*several, sentence(), sentence()]) for several in references]
    theirs = {i: [" ".join(one) for one in several] for i, several in enumerate(references)}
    given = {i: [" ".join(caption)] for i, caption in enumerate(captions)}

    counts = np.array([bleu_counts(*pair) for pair in zip(captions, references, strict=True)])
    bleu, bleus = Bleu(4).compute_score(theirs, given, verbose=0)
    assert bleu4(counts.sum(0)) == pytest.approx(bleu[3], abs=1e-9)
    assert bleu4(counts) == pytest.approx(bleus[3], abs=1e-9)
    rouges = [rouge_l(*pair) for pair in zip(captions, references, strict=True)]
    assert rouges == pytest.approx(Rouge().compute_score(theirs, given)[1], abs=1e-9)
    ciders = cider_d(captions, references)
    assert ciders == pytest.approx(Cider().compute_score(theirs, given)[1], abs=1e-9)
    # of a part of the set, with the rarity of the whole
    assert cider_d(captions[:1], references[:1], references) == pytest.approx(ciders[:1], abs=1e-12)


def test_an_empty_caption_scores_nothing():
    assert rouge_l([], [["a"]]) == 0 and cider_d([[], ["b"]], [[["a"]], [["b"]]])[0] == 0
    assert bleu4(np.array(bleu_counts([], [["a"]]))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("A man's dog isn't on the well-known t-shirt.", "a man 's dog is n't on the well-known t-shirt"),
        ("He’s at 9:30 p.m. in the U.S. and cannot go...", "he 's at 9:30 p.m. in the u.s. and can not go"),
        ('The "quoted" sign (2) says 50% off; 1,000!', "the quoted sign 2 says 50 % off 1,000"),
        ("children's toys - the dogs' bowl", "children 's toys the dogs bowl"),
        ("一只猫坐在红色的垫子上。", "一 只 猫 坐 在 红 色 的 垫 子 上"),
        ("两个iPhone 15手机", "两 个 iphone 15 手 机"),
        ("", ""),
    ],
)
def test_a_caption_is_divided_into_words_and_chinese_characters(caption, tokens):
    """The English ones are what the challenge's own Java tokenizer returns."""
    assert tokenise(caption) == tokens.split()
