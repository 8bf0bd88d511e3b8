"""The language of a text by its script. Run: python -m pytest tests/dataset/test_language.py"""

import pytest

from dataset.language import LANGUAGES, language_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", "en"),
        ("Where is it?", "en"),
        ("Where is it？", "en"),  # the full-width question mark of a Chinese keyboard
        ("Où est le café ?", "en"),  # every Latin script counts as "en"
        ("What does the sign 出口 on the left side of the wall mean?", "en"),  # 2 of 58 characters are Han
        ("这是什么颜色？", "zh"),
        ("图中 what is it?", "zh"),  # 2 of 14 characters are Han
        ("\U00020000 is rare", "zh"),  # a Han character outside of the basic plane
        ("Где кот?", "other"),
        ("これは何ですか？", "other"),  # kana beside a Han character
        ("これ is here", "other"),
        ("猫はどこ", "other"),
        ("한국어", "other"),
        ("The letter α is the first one of them.", "en"),
    ],
)
def test_the_script_decides(text, language):
    assert language_of(text) == language and language in LANGUAGES


@pytest.mark.parametrize(("letter", "language"), [("图", "zh"), ("ж", "other")])
def test_more_than_a_tenth_of_the_characters_decide(letter, language):
    assert language_of("a" * 9 + letter) == "en"
    assert language_of("a" * 8 + letter) == language


def test_kana_outweighs_han():
    assert language_of("猫猫猫猫猫猫はは") == "other"  # both shares are above a tenth
