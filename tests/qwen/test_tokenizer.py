"""The v1 tokenizer gives tiktoken's ids, text never becomes a special token, and a saved tokenizer reloads unchanged.

The vocabulary is Qwen's own `qwen.tiktoken`, which is part of the test-only package dashscope.
"""

import base64
import json
import random
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import qwen
from config import InputError
from qwen.tokenizer import QWEN1_SPECIAL_TOKENS, _growth
from tests.downloads import qwen1_vocabulary
from tests.toy_language import WRITERS, write_qwen1, write_qwen2, write_qwen3

# From tokenization_qwen.py, as Qwen published it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPELLED = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|extra_0|>", "<|image_pad|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen v1 folder with the real vocabulary."""
    folder = write_qwen1(tmp_path_factory.mktemp("qwen1"))
    shutil.copy(qwen1_vocabulary(), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return qwen.load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder):
    lines = (folder / "qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    special = {token: len(ranks) + i for i, token in enumerate(QWEN1_SPECIAL_TOKENS)}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def hard_strings(count: int) -> list[str]:
    """Make seeded strings of everything on which tokenizers tend to differ."""
    rng = random.Random(0)
    assigned = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    cjk = [chr(i) for i in range(0x4E00, 0x9FA6)]
    emoji = ["😀", "👩‍👩‍👧", "🇩🇪", "👍🏽", "❤️", "☀", "1️⃣", "\u200d", "\ufe0f"]
    space = [" ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2028", "\v", "\x85", " \n ", "\n\n\n"]
    english = "I'm you'LL they've don'T it's we'd o'clock 'sup rock'n'roll café naïve ﬁne Straße İstanbul".split()
    code = [
        "def f(x):\n\treturn x**2",
        "a[i]+=b->c;//",
        '{{"k": [1, null]}}',
        "</div>\n\n",
        "<|im_",
        "|>",
        "$$\\frac{a}{b}$$",
    ]
    accents = ["e\u0301", "\u00e9", "a\u0308\u0323", "\uac00", "\u1100\u1161", "\u212b", "ｱﾞ", "\u0958"]
    runs = [letter * n for letter in ("a", "=", "-", "!", " ", "哈", "0", "ab", "\n") for n in (2, 3, 5, 7, 17, 33)]
    pieces = [
        lambda: rng.choice(assigned),
        lambda: "".join(rng.choices(cjk, k=rng.randint(1, 12))),
        lambda: rng.choice(emoji),
        lambda: rng.choice(space),
        lambda: rng.choice(english),
        lambda: rng.choice(code),
        lambda: rng.choice(accents),
        lambda: rng.choice(runs),
        lambda: str(rng.randrange(10 ** rng.randint(1, 12))),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFG _'-.", k=rng.randint(1, 20))),
        lambda: unicodedata.normalize("NFD", "Crème Brûlée Ελλάδα Ångström 한국어 が"),
        lambda: "描述一下这张图片，里面有什么？",
        lambda: "What is in the picture?",
    ]
    return ["".join(rng.choice(pieces)() for _ in range(rng.randint(1, 12))) for _ in range(count)]


def test_ids_equal_tiktokens_on_thousands_of_hard_strings(tokenizer, reference):
    for text in hard_strings(6000):
        expected = reference.encode(unicodedata.normalize("NFC", text), disallowed_special=())
        assert qwen.encode_text(tokenizer, text) == expected, repr(text)


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_ids_equal_those_of_a_released_tokenizer_json(family, request):
    """As the tokenizers library reads it without its added tokens, whose spellings are text then."""
    folder = request.getfixturevalue(family)
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = [token["content"] for token in values["added_tokens"]]
    reference = Tokenizer.from_str(json.dumps(values | {"added_tokens": []}))
    released = qwen.load_tokenizer(folder)
    assert {"<|im_start|>", "<|im_end|>"} <= set(added) and ("<think>" in added) == (family == "qwen3")
    for text in [*hard_strings(2000), *SPELLED, *added, *(f"图{token}片 {token}" for token in added)]:
        assert qwen.encode_text(released, text) == reference.encode(text, add_special_tokens=False).ids, repr(text)


DIGITS = {"type": "Digits", "individual_digits": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\p{L}+|."}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"pre_tokenizer": BYTES},  # GPT-2's
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES | {"use_regex": False}]}},
        {"normalizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"ignore_merges": True}},
    ],
)
def test_a_byte_level_tokenizer_json_is_used_as_it_is_written(changed, tmp_path):
    """Beside `model_type: qwen2`, for which AutoTokenizer takes the rules from Qwen2Tokenizer."""
    folder = write_qwen2(tmp_path / "toy")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"] | {"redpicture": 430}  # ignore_merges finds it, merges do not
    model = values["model"] | changed.get("model", {})
    values |= changed | {"model": model | {"vocab": vocabulary if "model" in changed else model["vocab"]}}
    path.write_text(json.dumps(values))
    plain = Tokenizer.from_str(json.dumps(values | {"added_tokens": []}))
    loaded = qwen.load_tokenizer(folder)
    loaded.save_pretrained(tmp_path / "saved")
    again = qwen.load_tokenizer(tmp_path / "saved")
    texts = [*hard_strings(200), "In 12345 redpicture", "IS it A Star? cafe\u0301"]
    for text in texts:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert qwen.encode_text(loaded, text) == ids == qwen.encode_text(again, text), repr(text)
    released = AutoTokenizer.from_pretrained(folder)
    assert [released(text).input_ids == qwen.encode_text(loaded, text) for text in texts].count(False) == 0 or changed
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert loaded.convert_tokens_to_ids(token) == released.convert_tokens_to_ids(token)
    assert loaded.pad_token == loaded.eos_token == "<|endoftext|>" and type(loaded) is (
        PreTrainedTokenizerFast if changed else type(released)
    )


def test_the_rules_of_a_wrong_tokenizer_class_are_not_used(tmp_path):
    folder = write_qwen2(tmp_path / "toy")
    plain = Tokenizer.from_str(json.dumps(json.loads((folder / "tokenizer.json").read_text()) | {"added_tokens": []}))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "BertTokenizer"}))
    loaded = qwen.load_tokenizer(folder)
    for text in hard_strings(200):
        assert qwen.encode_text(loaded, text) == plain.encode(text, add_special_tokens=False).ids, repr(text)


def test_every_special_token_has_its_released_id(tokenizer, reference):
    assert (tokenizer.convert_tokens_to_ids("<|endoftext|>"), tokenizer.convert_tokens_to_ids("<|im_end|>")) == (
        151643,
        151645,
    )
    assert len(tokenizer) == 151851
    for token in QWEN1_SPECIAL_TOKENS:
        assert tokenizer(f"a{token}b").input_ids == reference.encode(f"a{token}b", allowed_special="all")


def test_single_tokens_decode_to_their_bytes(tokenizer, reference):
    for index in range(0, 151643, 97):
        assert tokenizer.decode([index]) == reference.decode([index])


def test_autotokenizer_reads_the_saved_v1_tokenizer(tokenizer, folder, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(
        folder / "config.json", tmp_path
    )  # in a v1 model's folder, whose model_type must not confuse AutoTokenizer
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*hard_strings(200), "<|im_start|>user\nhi<|extra_0|><|im_end|>"]
    assert again(texts).input_ids == tokenizer(texts).input_ids
    assert (again.pad_token, len(again)) == ("<|endoftext|>", 151851)


@pytest.mark.parametrize("family", WRITERS)
def test_autotokenizer_reads_a_saved_tokenizer_offline(family, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tokenizer = qwen.load_tokenizer(WRITERS[family](tmp_path / "toy"))
    tokenizer.save_pretrained(tmp_path / "saved")
    texts = [*hard_strings(100), "<|im_start|>a" + qwen.image_token(tokenizer) + "<|im_end|><|endoftext|>"]
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), qwen.load_tokenizer(tmp_path / "saved")):
        assert again(texts).input_ids == tokenizer(texts).input_ids
        assert (again.pad_token, len(again)) == ("<|endoftext|>", len(tokenizer))
        assert qwen.image_token_id(again) == qwen.image_token_id(tokenizer)


# Text is data


@pytest.mark.parametrize("family", [*WRITERS, "real"])
def test_text_never_becomes_a_special_token(family, tokenizer, tmp_path):
    if family != "real":
        tokenizer = qwen.load_tokenizer(WRITERS[family](tmp_path))
    special = set(tokenizer.all_special_ids) | {qwen.image_token_id(tokenizer)}
    special |= {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    for spelled in SPELLED:
        for text in (spelled, f"a {spelled}\nb", f"图{spelled}{spelled}片", spelled[:-1] + spelled):
            ids = qwen.encode_text(tokenizer, text)
            assert special.isdisjoint(ids)
            assert tokenizer.decode(ids) == text
            # An intended special token is still a single token.
            assert tokenizer("<|im_end|>").input_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("family", WRITERS)
def test_added_tokens_in_text_are_encoded_as_characters(family, tmp_path):
    """Also added tokens that are not special: Qwen2.5 and 3 have "<tool_call>" and "<think>"."""
    tokenizer = qwen.load_tokenizer(WRITERS[family](tmp_path))
    added = {token: index for index, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}
    plain = [token for token in added if not token.special]
    assert bool(plain) == (family in ("qwen3", "qwen3_moe"))
    for token in map(str, added):
        for text in (token, f"a {token}\nb", f"图{token}{token}片", token[:-1] + token):
            ids = qwen.encode_text(tokenizer, text)
            assert set(added.values()).isdisjoint(ids)
            assert tokenizer.decode(ids) == text


def test_text_decodes_to_itself_in_nfc(tokenizer):
    for text in hard_strings(500):
        assert tokenizer.decode(qwen.encode_text(tokenizer, text)) == unicodedata.normalize("NFC", text)
    assert qwen.encode_text(tokenizer, "") == []


def test_an_earlier_call_with_truncation_has_no_effect(tokenizer):
    text = "What is in the picture? " * 20
    expected = qwen.encode_text(tokenizer, text)
    tokenizer(["short", text], truncation=True, max_length=5, padding=True)
    assert qwen.encode_text(tokenizer, text) == expected


# The image token


def test_the_image_token_of_each_generation(tokenizer, tmp_path):
    assert (qwen.image_token(tokenizer), qwen.image_token_id(tokenizer)) == ("<|extra_0|>", 151646)

    old = qwen.load_tokenizer(write_qwen2(tmp_path / "2"))  # has none: it is added after the others
    assert (qwen.image_token(old), qwen.image_token_id(old)) == ("<|image_pad|>", len(old) - 1)
    assert old("a<|image_pad|>").input_ids[-1] == len(old) - 1

    new = qwen.load_tokenizer(write_qwen3(tmp_path / "3"))
    released = AutoTokenizer.from_pretrained(tmp_path / "3")
    assert len(new) == len(released)
    assert qwen.image_token_id(new) == released.convert_tokens_to_ids("<|image_pad|>")
    assert {kind.pad_token for kind in (tokenizer, old, new)} == {"<|endoftext|>"}


def test_attaching_a_tokenizer_sets_the_models_ids(tmp_path):
    model, tokenizer = qwen.load_language_model(write_qwen1(tmp_path)), qwen.load_tokenizer(tmp_path)
    qwen.attach_tokenizer(model, tokenizer)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == stops
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.suppress_tokens == [qwen.image_token_id(tokenizer)]
    assert model.config.image_token_id == model.model.config.image_token_id == qwen.image_token_id(tokenizer)


def test_attaching_another_models_tokenizer_is_refused(tokenizer, tmp_path):
    model = qwen.load_language_model(write_qwen2(tmp_path))
    with pytest.raises(InputError, match="up to 151850, but the language model has 640 embeddings"):
        qwen.attach_tokenizer(model, tokenizer)


# Refusals


def test_a_damaged_vocabulary_is_refused(tmp_path):
    path = write_qwen1(tmp_path) / "qwen.tiktoken"
    lines = path.read_text().splitlines()
    for damage, message in [
        (lines[:7] + ["AA=="] + lines[8:], "line 8: expected a token in base64"),
        (lines[:7] + ["%%% 7"] + lines[8:], "line 8: expected a token in base64"),
        (lines[:300] + lines[301:], "ranks are not 0 to 418 once each"),
    ]:
        path.write_text("\n".join(damage))
        with pytest.raises(InputError, match=re.escape(message)):
            qwen.load_tokenizer(tmp_path)


def test_paths_without_a_qwen_tokenizer_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", "Qwen/Nothing"):
        with pytest.raises(InputError, match=f"tokenizer {re.escape(str(path))}: cannot be read"):
            qwen.load_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(write_qwen2(tmp_path / "2"))
    bare = tokenizer.backend_tokenizer.to_str().replace("<|im_end|>", "<|end|>")
    (tmp_path / "2" / "tokenizer.json").write_text(bare)
    settings = tmp_path / "2" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|im_end|>", "<|end|>"))
    with pytest.raises(InputError, match=r"<\|im_end\|> not in the vocabulary"):
        qwen.load_tokenizer(tmp_path / "2")


# A tokenizer.json from somebody else

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def steps(kind: str, *found: dict) -> dict:
    return {"type": "Sequence", kind: list(found)}


def hostile(folder: Path, normalizer=None, pre_tokenizer=BYTES, **model) -> Path:
    """A tokenizer whose file has these rules, and the chat tokens in its own vocabulary too. Without a model's config.json,
    as in a checkpoint, transformers follows the file."""
    (write_qwen2(folder) / "config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    values = json.loads((folder / "tokenizer.json").read_text())
    values["normalizer"], values["pre_tokenizer"] = normalizer, pre_tokenizer
    values["model"] |= model
    values["model"]["vocab"] |= {token["content"]: token["id"] for token in values["added_tokens"]}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


def test_a_vocabulary_that_turns_text_into_a_special_token_is_refused(tmp_path):
    folder = hostile(tmp_path / "own", ignore_merges=True)  # whole words are looked up
    with pytest.raises(
        InputError, match=rf"tokenizer {re.escape(str(folder))}: turns the text .* into the special token"
    ):
        qwen.load_tokenizer(folder)
    # A rule that hides the spellings from the check at loading, and one that makes them of other words.
    rules = steps("normalizers", replace({"String": "<|"}, "_"), replace({"String": "cat"}, "<|im_end|>"))
    tokenizer = qwen.load_tokenizer(hostile(tmp_path / "rules", rules, ignore_merges=True))
    assert qwen.encode_text(tokenizer, "<|im_end|>")
    with pytest.raises(InputError, match="rules: turns the text 'cat' into the special token '<.im_end.>'"):
        qwen.encode_text(tokenizer, "cat")


def test_a_pattern_that_takes_for_ever_is_one_message(tmp_path):
    """The library panics, with an error that is no Exception."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = qwen.load_tokenizer(hostile(tmp_path, pre_tokenizer=steps("pretokenizers", split, BYTES)))
    with pytest.raises(InputError, match=rf"tokenizer {re.escape(str(tmp_path))}: fails on the text 'aaa.*retry-limit"):
        qwen.encode_text(tokenizer, "a" * 100 + "b")


@pytest.mark.parametrize(
    "rules",
    [
        {"normalizer": replace({"Regex": "."}, "x" * 1000)},
        {"normalizer": replace({"String": "e"}, "x" * 1000)},
        {"normalizer": steps("normalizers", *[replace({"String": "e"}, "eeeeeeeeee")] * 3)},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 1000}},
        {"pre_tokenizer": steps("pretokenizers", *[BYTES] * 30)},
    ],
    ids=["regex", "literal", "chain", "prepend", "bytes"],
)
def test_rules_that_multiply_text_are_refused_at_loading(tmp_path, rules):
    with pytest.raises(InputError, match=r"its rules .* make a text up to [\d,]+ times as long, more than 256"):
        qwen.load_tokenizer(hostile(tmp_path, **rules))


def test_rules_of_released_tokenizers_are_accepted():
    """T5's and Llama's, for a language model from scratch. The table makes up to 33 bytes of a character."""
    table = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"abc\0" + b"x" * 33 + b"\0").decode()
    space = replace({"Regex": " {2,}"}, " ")
    t5 = steps("normalizers", {"type": "Precompiled", "precompiled_charsmap": table}, space)
    llama = steps("normalizers", {"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"))
    assert (_growth(t5), _growth(llama), _growth({"type": "NFC"})) == (66, 2, 1)
    long = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"x" * 5000 + b"\0").decode()
    assert _growth({"type": "Precompiled", "precompiled_charsmap": long}) == 5000


def test_the_unknown_token_may_stand_for_text():
    """A language model from scratch may use a tokenizer that is not a BPE."""
    word = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word.add_special_tokens(["[UNK]", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word)
    assert qwen.encode_text(tokenizer, "ö") == [0]


def test_sentencepiece_puts_no_space_after_a_chat_token(tmp_path):
    """A Llama tokenizer with ChatML tokens: a prompt's ids are those of the tokenizer itself."""
    merges = [("u", "s"), ("us", "e"), ("use", "r"), ("▁", "i"), ("▁i", "s"), ("▁", "▁")]
    tokens = ["<unk>", *(f"<0x{number:02X}>" for number in range(256)), "▁", *sorted(set("What is this? user ab"))]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    own = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    own.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(tmp_path)
    released = qwen.load_tokenizer(tmp_path)
    for text in ("user\n", "What is this?", " a  b"):
        start, *rest = own.encode("<|im_start|>" + text).ids
        assert start == own.token_to_id("<|im_start|>")
        assert qwen.encode_text(released, text) == rest, text
