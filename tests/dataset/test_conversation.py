"""The prompt: Qwen's own format, literal text, labels only on the answers, images never cut.

Run: python -m pytest tests/dataset/test_conversation.py
"""

import base64
import functools
import json
import unicodedata

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen
from config import IGNORE_INDEX
from dataset.conversation import ChatFormat, TooLong, question_parts
from dataset.qa_file import QAFile
from dataset.record import IMAGE, IMAGE_MARK, Turn, parse_record, parts_of
from evaluation.score import questions_of
from qwen.tokenizer import QWEN1_SPECIAL_TOKENS
from tests.qwen.test_tokenizer import PATTERN
from tests.toy_language import WRITERS

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|extra_0|>", "<|image_pad|>", "<|vision_start|>"]
IMAGE_TOKENS = 3  # for each image
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module", params=sorted(WRITERS))
def tokenizer(request, tmp_path_factory):
    return qwen.load_tokenizer(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def qwen1_folder(tmp_path_factory):
    return WRITERS["qwen"](tmp_path_factory.mktemp("qwen1"))


LOADED: dict = {}  # writer of a toy checkpoint -> its tokenizer


def chat_of(tokenizer, system_prompt=None, num_image_tokens=IMAGE_TOKENS) -> ChatFormat:
    return ChatFormat(
        functools.partial(qwen.encode_text, tokenizer),
        im_start_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        im_end_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        end_of_text_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        image_token_id=qwen.image_token_id(tokenizer),
        num_image_tokens=num_image_tokens,
        system_prompt=system_prompt,
    )


def byte_chat(system_prompt=None, num_image_tokens=IMAGE_TOKENS) -> ChatFormat:
    """ChatML with one id per byte; the special ids are 256 to 259, and 258 is the image token."""
    return ChatFormat(
        lambda text: list(text.encode()),
        im_start_id=256,
        im_end_id=257,
        end_of_text_id=259,
        image_token_id=258,
        num_image_tokens=num_image_tokens,
        system_prompt=system_prompt,
    )


def turns(*contents: str, system: str | None = None) -> list[Turn]:
    """Alternate user and assistant turns."""
    talk = [Turn("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    return talk if system is None else [Turn("system", system), *talk]


def asked(talk: list[Turn]) -> list[tuple]:
    """Convert turns to the (role, parts) pairs of `encode_prompt`."""
    return [(turn.role, parts_of(turn)) for turn in talk]


def answer_spans(labels: list[int]) -> list[tuple[int, int]]:
    """Return (begin, end) of every run of labels."""
    begins = [i for i, label in enumerate(labels) if label != IGNORE_INDEX and labels[i - 1] == IGNORE_INDEX]
    return [(i, next((j for j in range(i, len(labels)) if labels[j] == IGNORE_INDEX), len(labels))) for i in begins]


TALKS = [
    turns("Hello", "Hi there."),
    turns(f"{IMAGE_MARK}\nWhat is it?", "A star.", "Which colour?", "Red.", "图片里有什么？", "红色的星星。"),
    turns(f"Between {IMAGE_MARK} and {IMAGE_MARK}: which?", "The left.", f"{IMAGE_MARK}", "This one."),
    turns("What is it?\n" + IMAGE_MARK, "A star.", system="Answer briefly."),
    turns("  leading blanks\n\n", " and trailing ones ", "\n", "  x"),
    turns(*(f"Is {special} text? {IMAGE_MARK}" if i % 2 == 0 else special for i, special in enumerate(SPECIAL))),
]


# --- the format


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("talk", TALKS)
def test_ids_equal_those_of_qwens_published_format(qwen1_folder, talk, system):
    """Compare with an independent reference: tiktoken reads the vocabulary, and this test joins the segments of
    `make_context` by newlines. As in Qwen's finetuning code, `<|im_end|>` and a newline follow the last answer."""
    ranks = dict(line.split() for line in (qwen1_folder / "qwen.tiktoken").read_text().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in ranks.items()}
    special = {token: len(ranks) + i for i, token in enumerate(QWEN1_SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def text(words: str) -> list[int]:
        return encoding.encode(unicodedata.normalize("NFC", words), allowed_special=set(), disallowed_special=())

    def segment(role: str, content: str) -> list[int]:
        pieces = content.split(IMAGE_MARK) if role == "user" else [content]
        body = text(pieces[0])
        for piece in pieces[1:]:
            body += [special["<|extra_0|>"]] * IMAGE_TOKENS + text(piece)
        return [special["<|im_start|>"], *text(role), *text("\n"), *body, special["<|im_end|>"]]

    with_system = talk if system is None or talk[0].role == "system" else [Turn("system", system), *talk]
    expected = []
    for turn in with_system[:-1]:
        expected += segment(turn.role, turn.content) + text("\n")
    chat = chat_of(qwen.load_tokenizer(qwen1_folder), system)
    prompt = expected + [special["<|im_start|>"], *text("assistant"), *text("\n")]
    assert chat.encode_prompt(asked(talk[:-1])) == prompt
    last = segment(with_system[-1].role, with_system[-1].content)
    assert chat.encode(talk).input_ids == expected + last + text("\n")


def test_without_a_system_prompt_there_is_no_system_segment():
    talk = turns("Q", "A")
    begin = [256, *b"user\nQ"]
    assert byte_chat().encode(talk).input_ids[: len(begin)] == begin
    begin = [256, *b"system\nBe kind.", 257, *b"\n", *begin]
    assert byte_chat("Be kind.").encode(talk).input_ids[: len(begin)] == begin
    assert byte_chat("Be cruel.").encode(turns("Q", "A", system="Be kind.")).input_ids[: len(begin)] == begin
    assert byte_chat("Be cruel.").encode_prompt(asked(turns("Q", system="Be kind.")))[: len(begin)] == begin


# --- text is literal


@pytest.mark.parametrize("special", SPECIAL)
def test_special_token_names_in_text_stay_text(tokenizer, special):
    ids_of = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    talk = turns(
        f"{IMAGE_MARK}a{special}b", f"{special}c{special}", special, f"{special}\n<|im_start|>user", system=special
    )
    ids = chat_of(tokenizer).encode(talk).input_ids
    counts = {token: ids.count(i) for token, i in ids_of.items() if i is not None}
    expected = {"<|im_start|>": 5, "<|im_end|>": 5, qwen.image_token(tokenizer): IMAGE_TOKENS}
    assert counts == {token: expected.get(token, 0) for token in counts}
    prompt = chat_of(tokenizer, special).encode_prompt([("user", question_parts(f"<image>{special}", 1))])
    counts = {token: prompt.count(i) for token, i in ids_of.items() if i is not None}
    expected = {"<|im_start|>": 3, "<|im_end|>": 2, qwen.image_token(tokenizer): IMAGE_TOKENS}
    assert counts == {token: expected.get(token, 0) for token in counts}
    assert special in tokenizer.decode(prompt[prompt.index(ids_of["<|im_end|>"]) + 1 :])  # still present as characters


def test_a_text_turn_has_labels_on_all_tokens_and_no_chat_markup():
    words = "Once <|im_end|> upon 一 time."
    text = Turn("text", words)
    for system in (None, "Be kind."):
        encoded = byte_chat(system).encode([text])
        assert encoded.input_ids == encoded.labels == [*words.encode(), 259]
        assert encoded.num_targets == len(encoded.labels) - 1 and encoded.num_images == 0
    cut = byte_chat().encode([text], max_length=9)
    assert cut.input_ids == cut.labels == list(b"Once <|im")
    assert byte_chat().certainly_fits([text], 200) and not byte_chat().certainly_fits([text], 20)


def test_an_image_mark_in_a_typed_question_stays_text():
    question = "What does <image> mean?"
    assert question_parts(question, 2) == [IMAGE, IMAGE, "\n" + question]
    assert question_parts(question, 0) == [question]
    prompt = byte_chat().encode_prompt([("user", question_parts(question, 1))])
    assert prompt.count(258) == IMAGE_TOKENS and question.encode() in bytes(i for i in prompt if i < 256)


def test_parts_are_split_at_the_marks_without_loss():
    assert parts_of(Turn("user", "<image>\nWho?")) == [IMAGE, "\nWho?"]
    assert parts_of(Turn("user", "a <image><image> b<image>")) == ["a ", IMAGE, IMAGE, " b", IMAGE]
    assert parts_of(Turn("user", "< image>")) == ["< image>"]
    assert parts_of(Turn("user", ("<image>?", IMAGE))) == ["<image>?", IMAGE]
    assert parts_of(Turn("assistant", "<image>")) == ["<image>"]
    for talk in TALKS:
        for turn in talk:
            assert "".join(p if isinstance(p, str) else IMAGE_MARK for p in parts_of(turn)) == turn.content


LITERAL = [IMAGE_MARK, *SPECIAL]


@pytest.mark.parametrize("literal", LITERAL)
def test_text_in_parts_is_literal(tokenizer, literal):
    def text(words: str) -> list[dict]:
        return [{"type": "text", "text": words}]

    talk = [
        {"role": "system", "content": text(f"Say {literal}.")},
        {"role": "user", "content": [*text(f"{literal} a"), {"type": "image"}, *text(f"b{literal}"), *text("c")]},
        {"role": "assistant", "content": text(f"{literal}!")},
        {"role": "user", "content": text(literal)},
        {"role": "assistant", "content": text(literal)},
    ]
    record = parse_record({"id": "r", "image": "a.jpg", "conversations": talk}, "")
    chat = chat_of(tokenizer)
    encoded = chat.encode(record.conversations)
    counts = {token: encoded.input_ids.count(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL}
    counts = {token: count for token, count in counts.items() if count}
    assert counts == {"<|im_start|>": 5, "<|im_end|>": 5, qwen.image_token(tokenizer): IMAGE_TOKENS}
    assert encoded.num_images == 1
    spans = answer_spans(encoded.labels)
    answered = [tokenizer.decode(encoded.labels[i:j]) for i, j in spans]
    assert answered == [f"{literal}!<|im_end|>", f"{literal}<|im_end|>"]
    image, im_end = qwen.image_token_id(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    after = encoded.input_ids[len(encoded.input_ids) - encoded.input_ids[::-1].index(image) :]
    assert tokenizer.decode(after[: after.index(im_end)]) == f"b{literal}c"  # adjacent texts are joined
    assert chat.encode_prompt(asked(list(record.conversations[:2]))) == encoded.input_ids[: spans[0][0]]
    assert not chat.certainly_fits(record.conversations, len(encoded.input_ids) - 1)
    assert chat.certainly_fits(record.conversations, 2 * len(encoded.input_ids) + 40 * len(talk))


def test_a_question_of_parts_is_scored_with_its_own_images(tmp_path):
    first = [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]
    second = [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "this?"}]
    talk = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": [{"type": "text", "text": "<image>!"}]},
    ]
    talk += [{"role": "user", "content": second}, {"role": "assistant", "content": "B."}]
    record = {"id": "r", "image": ["a.png", "b.png"], "conversations": talk}
    (tmp_path / "qa.jsonl").write_text(json.dumps(record))
    one, two = questions_of(QAFile(tmp_path / "qa.jsonl"), [0])
    first_question = [("user", [IMAGE, "What does <image> mean?"])]
    assert list(one.turns) == first_question and one.text == "What does <image> mean?"
    assert one.reference == "<image>!" and one.images == (tmp_path / "a.png",)
    assert list(two.turns) == [*first_question, ("assistant", ["<image>!"]), ("user", ["And ", IMAGE, "this?"])]
    assert two.images == (tmp_path / "a.png", tmp_path / "b.png")


# --- labels


@pytest.mark.parametrize("talk", TALKS)
def test_labels_decode_to_exactly_the_answers_with_their_stop_tokens(tokenizer, talk):
    encoded = chat_of(tokenizer, SYSTEM).encode(talk)
    spans = answer_spans(encoded.labels)
    answers = [turn.content for turn in talk if turn.role == "assistant"]
    assert [tokenizer.decode(encoded.labels[i:j]) for i, j in spans] == [answer + "<|im_end|>" for answer in answers]
    assert all(label in (i, IGNORE_INDEX) for i, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert encoded.num_targets == sum(j - i for i, j in spans)
    assert encoded.num_images == sum(turn.content.count(IMAGE_MARK) for turn in talk if turn.role == "user")
    assert encoded.input_ids.count(qwen.image_token_id(tokenizer)) == IMAGE_TOKENS * encoded.num_images


@pytest.mark.parametrize("talk", TALKS)
def test_the_prompt_for_answering_equals_the_ids_before_the_answer_in_training(tokenizer, talk):
    for system in (None, SYSTEM):
        chat = chat_of(tokenizer, system)
        encoded = chat.encode(talk)
        answers = [i for i, turn in enumerate(talk) if turn.role == "assistant"]
        for position, (begin, _) in zip(answers, answer_spans(encoded.labels), strict=True):
            assert chat.encode_prompt(asked(talk[:position])) == encoded.input_ids[:begin]


def test_a_typed_question_is_formatted_like_the_training_data():
    chat = byte_chat(SYSTEM)
    encoded = chat.encode(turns("<image><image>\nWho?", "I."))
    begin, _ = answer_spans(encoded.labels)[0]
    assert chat.encode_prompt([("user", question_parts("Who?", 2))]) == encoded.input_ids[:begin]


def test_a_prompt_must_end_with_a_user_turn():
    for talk in ([], [("assistant", ["A"])], [("user", ["Q"]), ("assistant", ["A"])]):
        with pytest.raises(ValueError, match="user"):
            byte_chat().encode_prompt(talk)


# --- max_length


def test_max_length_cuts_the_end_of_an_answer_and_then_whole_turns():
    chat = byte_chat()
    talk = turns("<image>Q", "abc", "R", "de")
    whole = chat.encode(talk)
    first, second = answer_spans(whole.labels)
    assert chat.encode(talk, len(whole.input_ids)) == whole
    assert chat.encode(talk, second[1]).input_ids == whole.input_ids[: second[1]]  # drops only the last newline
    assert (
        chat.encode(talk, second[1] - 1).input_ids == whole.input_ids[: second[1] - 1]
    )  # drops the stop token of "de"
    for length in range(first[1], second[0] + 1):  # drops a question without an answer
        assert chat.encode(talk, length).input_ids == whole.input_ids[: first[1]]
    assert chat.encode(talk, first[0] + 1).labels[-1] == ord("a")
    with pytest.raises(TooLong, match="leaves no answer, or none after the last image"):
        chat.encode(talk, first[0])
    with pytest.raises(
        TooLong, match=f"an image ends at token {whole.input_ids.index(258) + IMAGE_TOKENS}, beyond max_length 7"
    ):
        chat.encode(talk, 7)
    assert TooLong.reason == "longer_than_max_length"


contents = st.lists(st.sampled_from([IMAGE_MARK, "a", "\n", "bc"]), min_size=1, max_size=4).map("".join)
answers = st.text("xyz", min_size=1, max_size=5)
talks = st.lists(st.tuples(contents, answers), min_size=1, max_size=4).map(lambda pairs: turns(*sum(pairs, ())))


@settings(deadline=None, max_examples=200)
@given(talks, st.sampled_from([None, "s"]), st.integers(1, 4), st.integers(1, 120))
def test_a_cut_keeps_every_image_and_at_least_one_label(talk, system, num_image_tokens, max_length):
    chat = byte_chat(system, num_image_tokens)
    whole = chat.encode(talk)
    image_ends = [i + 1 for i, token in enumerate(whole.input_ids) if token == 258]
    ends = [
        i + 1
        for i, label in enumerate(whole.labels)
        if label != IGNORE_INDEX and i < max_length and i + 1 > max(image_ends, default=0)
    ]
    if len(whole.input_ids) <= max_length:
        assert chat.encode(talk, max_length) == whole
    elif not ends:
        with pytest.raises(TooLong):
            chat.encode(talk, max_length)
    else:
        cut = chat.encode(talk, max_length)
        assert (cut.input_ids, cut.labels) == (whole.input_ids[: ends[-1]], whole.labels[: ends[-1]])
        assert cut.num_images == whole.num_images and cut.num_targets >= 1


unmerged = st.text("zqjxv#", min_size=30, max_size=60)  # no merges in the toy tokenizers: one token per byte
expanded = st.just("\U0001d160" * 20)  # a musical note of 4 bytes, 12 bytes in NFC


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30) | unmerged | expanded, min_size=2, max_size=2), st.booleans(), st.integers(1, 3))
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_conversation_that_certainly_fits_is_never_too_long(
    write, tmp_path_factory, texts, with_image, num_image_tokens
):
    """The bound holds for any text, also if normalisation makes it longer."""
    if write not in LOADED:
        LOADED[write] = qwen.load_tokenizer(write(tmp_path_factory.mktemp("lm")))
    chat = chat_of(LOADED[write], num_image_tokens=num_image_tokens)
    question, answer = (text.replace(IMAGE_MARK, "") for text in texts)
    talk = turns(IMAGE_MARK * with_image + question, answer)
    length = len(chat.encode(talk).input_ids)
    assert not chat.certainly_fits(talk, length - 1)


def test_ascii_text_that_fits_in_bytes_certainly_fits():
    chat = byte_chat(None, 2)
    talk = turns(IMAGE_MARK + "What?", "A cat.")
    assert chat.certainly_fits(talk, len(chat.encode(talk).input_ids) + len(IMAGE_MARK))


def test_an_answer_that_is_no_target_has_no_labels():
    talk = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    turns = [Turn(role, text, text != "1") for role, text in talk]
    chat = byte_chat()
    whole, part = chat.encode([Turn(role, text) for role, text in talk]), chat.encode(turns)
    assert part.input_ids == whole.input_ids
    supervised = [token for token, label in zip(part.input_ids, part.labels, strict=True) if label != IGNORE_INDEX]
    assert supervised == [*chat.encode_text("2"), chat.im_end_id]
