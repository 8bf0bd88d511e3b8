"""Answers that are asked fast are those that are asked one at a time, and nothing is read twice or too early.

python -m pytest tests/test_answer_speed.py
"""

import contextlib
import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import model.answer
import qwen
from model.answer import AHEAD, READERS, WINDOW, Answer, Answerer, Request
from model.generate import Prompt, generate
from model.model import VisionLanguageModel
from model.projector import build_projector
from tests.toy_language import HIDDEN, WRITERS
from visual.images import ImageError

N, SIDE = 6, 4  # image tokens; pixels a side
NEW = 8


class Tower(nn.Module):
    """N features of an image, which depend on all of its pixels."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3 * SIDE * SIDE, N * 16)
        self.model.dtype, self.device = torch.float32, torch.device("cpu")
        self.seen = 0

    def forward(self, pixel_values):
        self.seen += len(pixel_values)
        return self.model(pixel_values.flatten(1)).unflatten(1, (N, 16))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """family -> a fresh vision-language model with LoRA that changes what it says, and never stops by itself."""
    folders = {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITERS.items()}

    def load(family):
        lm = qwen.load_language_model(folders[family])
        qwen.attach_tokenizer(lm, qwen.load_tokenizer(folders[family]))
        lm.generation_config.eos_token_id = None
        torch.manual_seed(0)
        lm = get_peft_model(lm, LoraConfig(r=4, target_modules=qwen.lora_target_modules(lm, ["all-linear"])))
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return VisionLanguageModel(Tower(), build_projector("mlp", 16, HIDDEN, HIDDEN), lm).eval()

    return load


def make_prompts(vlm, shapes):
    """A prompt for each (head, pictures, question): so many tokens before the pictures, the same wherever there are as
    many; the pictures; so many tokens of its own."""
    image = [vlm.causal_lm.config.image_token_id] * N
    rng = torch.Generator().manual_seed(1)
    prompts = []
    for head, pictures, question in shapes:
        own = torch.randint(0, 400, (question,), generator=rng).tolist()
        prompts.append(Prompt([*(i % 256 for i in range(7, 7 + head)), *image * len(pictures), *own], pictures))
    return prompts


@torch.no_grad()
def one_at_a_time(vlm, prompts, pixel_values) -> list[list[int]]:
    """An independent reference: the whole sequence through the network for every token, no cache, no padding."""
    answers, lm = [], vlm.causal_lm
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(NEW):
            features = vlm.encode_images(pixel_values[list(prompt.pictures)]) if prompt.pictures else None
            hidden = lm.model(input_ids=torch.tensor([ids]), image_features=features, use_cache=False)
            logits = lm.lm_head(hidden.last_hidden_state[0, -1])
            logits[lm.config.image_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
        answers.append(ids[len(prompt.ids) :])
    return answers


def pictures_of(count):
    return 2 * torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@contextlib.contextmanager
def tokens_read(vlm):
    """The shapes of the ids that the language model is given, one after the other."""
    shapes = []
    forward = vlm.causal_lm.model.forward
    vlm.causal_lm.model.forward = lambda input_ids=None, **kwargs: (
        shapes.append(tuple(input_ids.shape)),
        forward(input_ids=input_ids, **kwargs),
    )[1]
    try:
        yield shapes
    finally:
        del vlm.causal_lm.model.forward


SHARED = {  # name -> (the prompts: tokens before the pictures, pictures, tokens of the question)
    "questions about one picture": [(3, (0,), question) for question in (1, 4, 9, 2)],
    "questions about some pictures": [(3, (i % 3,), 2 + i) for i in range(7)],
    "one picture asked about once": [(3, (0,), 5), (3, (1,), 3), (3, (0,), 2)],
    "several pictures a prompt": [(2, (0, 1), 3), (2, (0, 1), 6), (2, (1, 0), 4), (2, (1, 0), 2)],
    "heads of other lengths": [(1, (0,), 3), (5, (0,), 6), (1, (0,), 2), (5, (0,), 4), (5, (1, 2), 1), (5, (1, 2), 2)],
    "some without a picture": [(3, (0,), 4), (3, (0,), 9), (4, (), 3), (3, (0,), 5), (3, (1,), 5), (3, (0,), 2)],
}


@pytest.mark.parametrize("shapes", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("family", WRITERS)
def test_a_shared_picture_changes_no_token(load, family, shapes):
    vlm, pixels = load(family), pictures_of(3)
    prompts = make_prompts(vlm, shapes)
    with tokens_read(vlm) as read:
        found = generate(vlm, prompts, pixels, max_new_tokens=NEW).tolist()
    assert read[0][0] < len(prompts) and read[1][0] == len(prompts)  # it was shared
    assert found == one_at_a_time(vlm, prompts, pixels)
    assert len(set(map(tuple, found))) > len(prompts) // 2  # the answers do depend on what is asked and shown


@pytest.mark.parametrize("family", WRITERS)
def test_the_answer_depends_on_the_shared_picture(load, family):
    vlm = load(family)
    prompts = make_prompts(vlm, SHARED["questions about one picture"])
    found = [generate(vlm, prompts, pictures_of(2)[i : i + 1], max_new_tokens=NEW).tolist() for i in (0, 1)]
    assert found[0] != found[1]


def test_a_picture_is_encoded_once_and_read_once(load):
    vlm = load("qwen2")
    prompts = make_prompts(vlm, [(3, (i // 4,), 2 + i % 4) for i in range(8)])
    with tokens_read(vlm) as read:
        generate(vlm, prompts, pictures_of(2), max_new_tokens=3)
    assert read == [(2, 3 + N), (8, 5), (8, 1), (8, 1)]
    assert vlm.vision_tower.seen == 2


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, (0,), 2), (3, (1,), 4)],
        [(3, (), 2), (3, (), 2)],
        [(3, (0,), 4)],
        [(3, (0,), 60), (60, (1,), 2), (3, (0,), 2)],
    ],
    ids=["other pictures", "no pictures", "one prompt", "more to read than apart"],
)
def test_what_would_not_save_anything_is_read_in_one_go(load, shapes):
    vlm, pixels = load("qwen2"), pictures_of(2)
    prompts = make_prompts(vlm, shapes)
    with tokens_read(vlm) as read:
        found = generate(vlm, prompts, pixels, max_new_tokens=NEW).tolist()
    assert read[0] == (len(prompts), max(len(prompt.ids) for prompt in prompts))
    assert found == one_at_a_time(vlm, prompts, pixels)


def test_beams_are_those_of_each_prompt_alone(load):
    vlm, pixels = load("qwen3"), pictures_of(3)
    prompts = make_prompts(vlm, SHARED["questions about some pictures"])
    options = {"max_new_tokens": NEW, "num_beams": 3}
    together = generate(vlm, prompts, pixels, **options).tolist()
    assert vlm.vision_tower.seen == 3
    assert together == [generate(vlm, [prompt], pixels, **options)[0].tolist() for prompt in prompts]


def test_a_prompt_that_just_fits_qwen_v1_is_not_refused_for_the_padding_between(load):
    vlm, pixels = load("qwen"), pictures_of(2)
    limit = vlm.causal_lm.config.max_position_embeddings
    longest = limit - NEW - N
    prompts = make_prompts(vlm, [(longest - 1, (0,), 1), (longest - 1, (0,), 1), (1, (1,), 30)])
    assert max(len(prompt.ids) for prompt in prompts) + NEW == limit
    assert generate(vlm, prompts, pixels, max_new_tokens=NEW).shape == (3, NEW)


# --- many requests: order, memory, threads


class Chat:
    """A prompt is as long as its question, and remembers how often it was made."""

    def __init__(self):
        self.encoded = Counter()

    def encode_prompt(self, turns):
        self.encoded[turns] += 1
        return [0] * len(turns)


class Ids:
    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        return [str(row) for row in rows]


class Reader:
    """Pictures by name: the number in it, everywhere. "bad" cannot be read."""

    def __init__(self):
        self.read, self.lock = Counter(), threading.Lock()

    def __call__(self, path):
        with self.lock:
            self.read[path] += 1
        if "bad" in path.name:
            raise ImageError("no picture", where=path)
        return torch.full((3, 2, 2), float(path.stem))


@pytest.fixture
def asking(monkeypatch):
    """(ask, batches): an Answerer whose answers are "question length/numbers of its pictures", and what it was asked at
    once: (the prompts' lengths and pictures, how many pictures were encoded)."""
    batches = []

    def answer(vlm, prompts, pixel_values, **options):
        shown = [[int(pixel_values[i].mean()) for i in prompt.pictures] for prompt in prompts]
        batches.append((shown, 0 if pixel_values is None else len(pixel_values)))
        return [f"{len(prompt.ids)}/{pictures}" for prompt, pictures in zip(prompts, shown, strict=True)]

    monkeypatch.setattr(model.answer, "generate", answer)
    vlm = nn.Module()
    vlm.projector = nn.Linear(1, 1)
    return Answerer(vlm, Ids(), Chat(), Reader(), contextlib.nullcontext), batches


def question(length, *pictures):
    return Request("q" * length, [Path(f"{picture}.png") for picture in pictures])


def expected(request):
    return f"{len(request.turns)}/{[int(path.stem) for path in request.images]}"


def test_answers_come_in_the_order_of_the_requests(asking):
    ask, _ = asking
    requests = [question(1 + 7 * i % 11, *range(i % 5, i % 5 + i % 3)) for i in range(100)]
    for given in (ask.answer_all(requests, 4), list(ask.stream(iter(requests), 4))):
        assert [answer.text for answer in given] == [expected(request) for request in requests]
        assert all(isinstance(answer, Answer) and answer.seconds >= 0 for answer in given)
    assert ask.answer(requests) == [expected(request) for request in requests]
    assert ask.answer_all([], 4) == ask.answer([]) == []


def test_all_questions_about_a_picture_are_asked_together_wherever_they_stand(asking):
    ask, batches = asking
    apart = [question(2 + i, picture) for i in range(4) for picture in range(40)]  # the same picture every 40 requests
    ask.answer_all(apart, 4)
    assert [encoded for _, encoded in batches] == [1] * 40
    assert set(ask.read_pixels.read.values()) == {1}


def test_batches_hold_prompts_of_like_lengths(asking):
    ask, batches = asking
    requests = [question(1 + 13 * i % 32, i) for i in range(32)]
    ask.answer_all(requests, 8)
    lengths = [sorted(1 + 13 * picture % 32 for (picture,) in shown) for shown, _ in batches]
    assert lengths == [list(range(start, start + 8)) for start in (1, 9, 17, 25)]


def test_every_prompt_is_tokenised_once_and_a_picture_of_several_batches_read_once(asking):
    ask, batches = asking
    ask.answer_all([question(length, 0) for length in range(1, 30)], 4)
    assert set(ask.chat.encoded.values()) == {1} and len(ask.chat.encoded) == 29
    assert ask.read_pixels.read == {Path("0.png"): 1} and len(batches) == 8


def test_a_picture_that_cannot_be_read_takes_its_own_questions_with_it_and_no_others(asking):
    ask, batches = asking
    requests = [
        question(2, 1),
        question(3, "bad"),
        question(5, 2, "bad"),
        question(4, 2),
        question(6, "bad"),
        question(1),
    ]
    given = list(ask.stream(requests, 6))
    assert [isinstance(answer, ImageError) for answer in given] == [False, True, True, False, True, False]
    assert [answer.text for answer in given if isinstance(answer, Answer)] == ["2/[1]", "4/[2]", "1/[]"]
    assert "bad.png" in str(given[1]) and len(batches) == 1
    assert [type(answer) for answer in ask.stream(requests[1:2], 4)] == [ImageError]  # a batch of nothing else
    with pytest.raises(ImageError, match="bad.png"):
        ask.answer_all(requests, 6)


def test_a_folder_without_end_is_answered_within_bounded_memory(asking):
    ask, batches = asking
    size, taken = 4, itertools.count()
    endless = (question(1, next(taken)) for _ in itertools.count())
    answers = ask.stream(endless, size)
    assert next(answers).text == "1/[0]"
    assert len(batches) == 1 and next(taken) <= WINDOW * size
    list(itertools.islice(answers, 10 * size))
    assert len(ask.read_pixels.read) <= (len(batches) + AHEAD) * size
    answers.close()


def test_the_next_pictures_are_read_while_the_model_answers(asking, monkeypatch):
    """The model answers its first batch when the pictures of the batches ahead have been read; if reading and answering
    took turns, it would wait in vain."""
    ask, _ = asking
    read = [threading.Event() for _ in range(8)]
    reader, answer, overlapped = ask.read_pixels, model.answer.generate, []

    def read_and_say_so(path):
        pixels = reader(path)
        read[int(path.stem)].set()
        return pixels

    def answer_when_they_are_there(*arguments, **options):
        if not overlapped:
            overlapped.append(all(event.wait(10) for event in read[2 : 2 + 2 * AHEAD]))
        return answer(*arguments, **options)

    ask.read_pixels = read_and_say_so
    monkeypatch.setattr(model.answer, "generate", answer_when_they_are_there)
    assert len(list(ask.stream([question(1, picture) for picture in range(8)], 2))) == 8
    assert overlapped == [True]


def test_who_stops_listening_stops_the_reading(asking, monkeypatch):
    """Pictures of later batches stay unread until the threads have been told to stop: then those in hand are finished."""
    ask, _ = asking
    before, told, reader = threading.active_count(), threading.Event(), ask.read_pixels

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            super().shutdown(wait=False, **options)
            told.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(model.answer, "ThreadPoolExecutor", Pool)
    ask.read_pixels = lambda path: (int(path.stem) < 20 or told.wait(10), reader(path))[1]
    answers = ask.stream([question(1, picture) for picture in range(400)], 20)
    next(answers)
    answers.close()
    assert threading.active_count() == before and len(reader.read) <= 20 + READERS


def test_an_error_that_is_no_pictures_fault_is_not_hidden(asking):
    ask, _ = asking
    ask.read_pixels = lambda path: 1 // 0
    with pytest.raises(ZeroDivisionError):
        list(ask.stream([question(1, 1)], 1))
