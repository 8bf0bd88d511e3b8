"""Batched answers equal those of one prompt at a time, and nothing is read twice or too early.

Run: python -m pytest tests/model/test_answer.py
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import model.answer
import qwen
from model.answer import AHEAD, READERS, WINDOW, Answer, Answerer, Request
from model.generate import generate
from model.model import VisionLanguageModel
from model.projector import build_projector
from tests.toy_language import HIDDEN, WRITERS
from tests.toy_model import NEW, SHARED, N, Tower, make_prompts, one_at_a_time, random_images
from visual.images import ImageError


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """family -> a new vision-language model whose LoRA is not zero and which never generates a stop token. sliding_window:
    tokens that its layers attend to, from Qwen2's second layer on."""
    folders = {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITERS.items()}

    def load(family, sliding_window=None):
        folder = folders[family]
        if sliding_window is not None:
            folder = Path(shutil.copytree(folder, tmp_path_factory.mktemp(family) / "window"))
            config = json.loads((folder / "config.json").read_text()) | {"max_window_layers": 1}
            config.pop("layer_types", None)
            config |= {"use_sliding_window": True, "sliding_window": sliding_window}
            (folder / "config.json").write_text(json.dumps(config))
        lm = qwen.load_language_model(folder)
        qwen.attach_tokenizer(lm, qwen.load_tokenizer(folder))
        lm.generation_config.eos_token_id = None
        torch.manual_seed(0)
        lm = get_peft_model(lm, LoraConfig(r=4, target_modules=qwen.lora_target_modules(lm, ["all-linear"])))
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return VisionLanguageModel(Tower(), build_projector("mlp", 16, HIDDEN, HIDDEN), lm).eval()

    return load


@contextlib.contextmanager
def tokens_read(vlm):
    """Record the shapes of the ids that the language model gets, in order."""
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


@pytest.mark.parametrize("shapes", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("family", WRITERS)
def test_a_shared_image_changes_no_token(load, family, shapes):
    vlm, pixels = load(family), random_images(3)
    prompts = make_prompts(vlm, shapes)
    with tokens_read(vlm) as read:
        found = generate(vlm, prompts, pixels, max_new_tokens=NEW).tolist()
    assert read[0][0] < len(prompts) and read[1][0] == len(prompts)  # the prefixes are shared
    assert found == one_at_a_time(vlm, prompts, pixels)
    assert len(set(map(tuple, found))) > len(prompts) // 2  # answers depend on questions and images


@pytest.mark.parametrize("family", WRITERS)
def test_the_answer_depends_on_the_shared_image(load, family):
    vlm = load(family)
    prompts = make_prompts(vlm, SHARED["questions about one image"])
    found = [generate(vlm, prompts, random_images(2)[i : i + 1], max_new_tokens=NEW).tolist() for i in (0, 1)]
    assert found[0] != found[1]


def test_an_image_passes_encoder_and_language_model_once(load):
    vlm = load("qwen2")
    prompts = make_prompts(vlm, [(3, (i // 4,), 2 + i % 4) for i in range(8)])
    with tokens_read(vlm) as read:
        generate(vlm, prompts, random_images(2), max_new_tokens=3)
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
    ids=["different images", "no images", "one prompt", "more tokens than separately"],
)
def test_prefixes_are_not_shared_if_that_saves_nothing(load, shapes):
    vlm, pixels = load("qwen2"), random_images(2)
    prompts = make_prompts(vlm, shapes)
    with tokens_read(vlm) as read:
        found = generate(vlm, prompts, pixels, max_new_tokens=NEW).tolist()
    assert read[0] == (len(prompts), max(len(prompt.ids) for prompt in prompts))
    assert found == one_at_a_time(vlm, prompts, pixels)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])  # a window in the second layer, in all layers
def test_answers_in_a_sliding_window_equal_those_of_one_prompt_at_a_time(load, family):
    """The window is shorter than a prompt, and padding between a shared prefix and the questions would be in it."""
    vlm, pixels = load(family, sliding_window=6), random_images(3)
    prompts = make_prompts(vlm, SHARED["heads of different lengths"])
    found = generate(vlm, prompts, pixels, max_new_tokens=NEW).tolist()
    assert found == one_at_a_time(vlm, prompts, pixels)
    assert found != generate(load(family), prompts, pixels, max_new_tokens=NEW).tolist(), (
        "the window makes a difference"
    )


def test_beam_search_equals_that_of_each_prompt_alone(load):
    vlm, pixels = load("qwen3"), random_images(3)
    prompts = make_prompts(vlm, SHARED["questions about some images"])
    options = {"max_new_tokens": NEW, "num_beams": 3}
    together = generate(vlm, prompts, pixels, **options).tolist()
    assert vlm.vision_tower.seen == 3
    assert together == [generate(vlm, [prompt], pixels, **options)[0].tolist() for prompt in prompts]


def test_padding_between_prefix_and_rest_does_not_exceed_qwen_v1s_limit(load):
    vlm, pixels = load("qwen"), random_images(2)
    limit = vlm.causal_lm.config.max_position_embeddings
    longest = limit - NEW - N
    prompts = make_prompts(vlm, [(longest - 1, (0,), 1), (longest - 1, (0,), 1), (1, (1,), 30)])
    assert max(len(prompt.ids) for prompt in prompts) + NEW == limit
    assert generate(vlm, prompts, pixels, max_new_tokens=NEW).shape == (3, NEW)


# --- many requests: order, memory, threads


class Chat:
    """Makes prompts as long as the question, and counts how often each is made."""

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
    """Reads an image whose pixels all are the number in its name, and counts the reads. "bad" cannot be read."""

    def __init__(self):
        self.read, self.lock = Counter(), threading.Lock()

    def __call__(self, path):
        with self.lock:
            self.read[path] += 1
        if "bad" in path.name:
            raise ImageError("not an image", where=path)
        return torch.full((3, 2, 2), float(path.stem))


@pytest.fixture
def toy(monkeypatch):
    """Return (answerer, batches). Its answers are "question length/numbers of the images"; batches lists for each batch (the
    prompts' images, how many images were encoded)."""
    batches = []

    def answer(vlm, prompts, pixel_values, **options):
        shown = [[int(pixel_values[i].mean()) for i in prompt.images] for prompt in prompts]
        batches.append((shown, 0 if pixel_values is None else len(pixel_values)))
        return [f"{len(prompt.ids)}/{images}" for prompt, images in zip(prompts, shown, strict=True)]

    monkeypatch.setattr(model.answer, "generate", answer)
    vlm = nn.Module()
    vlm.projector = nn.Linear(1, 1)
    vlm.causal_lm = nn.Module()
    vlm.causal_lm.config = SimpleNamespace(max_position_embeddings=1000)
    return Answerer(vlm, Ids(), Chat(), Reader(), contextlib.nullcontext), batches


def question(length, *images):
    return Request("q" * length, [Path(f"{image}.png") for image in images])


def expected(request):
    return f"{len(request.turns)}/{[int(path.stem) for path in request.images]}"


def test_answers_come_in_the_order_of_the_requests(toy):
    answerer, _ = toy
    requests = [question(1 + 7 * i % 11, *range(i % 5, i % 5 + i % 3)) for i in range(100)]
    for given in (answerer.answer_all(requests, 4), list(answerer.stream(iter(requests), 4))):
        assert [answer.text for answer in given] == [expected(request) for request in requests]
        assert all(isinstance(answer, Answer) and answer.seconds >= 0 for answer in given)
    assert answerer.answer(requests) == [expected(request) for request in requests]
    assert answerer.answer_all([], 4) == answerer.answer([]) == []


def test_all_questions_about_an_image_are_answered_together(toy):
    answerer, batches = toy
    apart = [question(2 + i, image) for i in range(4) for image in range(40)]  # the same image every 40 requests
    answerer.answer_all(apart, 4)
    assert [encoded for _, encoded in batches] == [1] * 40
    assert set(answerer.read_pixels.read.values()) == {1}


def test_batches_hold_prompts_of_similar_lengths(toy):
    answerer, batches = toy
    requests = [question(1 + 13 * i % 32, i) for i in range(32)]
    answerer.answer_all(requests, 8)
    lengths = [sorted(1 + 13 * image % 32 for (image,) in shown) for shown, _ in batches]
    assert lengths == [list(range(start, start + 8)) for start in (1, 9, 17, 25)]


def test_every_prompt_is_encoded_once_and_an_image_of_several_batches_is_read_once(toy):
    answerer, batches = toy
    answerer.answer_all([question(length, 0) for length in range(1, 30)], 4)
    assert set(answerer.chat.encoded.values()) == {1} and len(answerer.chat.encoded) == 29
    assert answerer.read_pixels.read == {Path("0.png"): 1} and len(batches) == 8


def test_an_unreadable_image_fails_its_own_questions_only(toy):
    answerer, batches = toy
    requests = [
        question(2, 1),
        question(3, "bad"),
        question(5, 2, "bad"),
        question(4, 2),
        question(6, "bad"),
        question(1),
    ]
    given = list(answerer.stream(requests, 6))
    assert [isinstance(answer, ImageError) for answer in given] == [False, True, True, False, True, False]
    assert [answer.text for answer in given if isinstance(answer, Answer)] == ["2/[1]", "4/[2]", "1/[]"]
    assert "bad.png" in str(given[1]) and len(batches) == 1
    assert [type(answer) for answer in answerer.stream(requests[1:2], 4)] == [
        ImageError
    ]  # a batch without a readable image
    with pytest.raises(ImageError, match="bad.png"):
        answerer.answer_all(requests, 6)


def test_an_endless_stream_is_answered_in_bounded_memory(toy):
    answerer, batches = toy
    size, taken = 4, itertools.count()
    endless = (question(1, next(taken)) for _ in itertools.count())
    answers = answerer.stream(endless, size)
    assert next(answers).text == "1/[0]"
    assert len(batches) == 1 and next(taken) <= WINDOW * size
    list(itertools.islice(answers, 10 * size))
    assert len(answerer.read_pixels.read) <= (len(batches) + AHEAD) * size
    answers.close()


def test_the_next_images_are_read_while_the_model_answers(toy, monkeypatch):
    """The first batch is answered only after the images of the next ones are read. If reading and answering took turns, that
    wait would time out."""
    answerer, _ = toy
    read = [threading.Event() for _ in range(8)]
    reader, answer, overlapped = answerer.read_pixels, model.answer.generate, []

    def read_and_signal(path):
        pixels = reader(path)
        read[int(path.stem)].set()
        return pixels

    def answer_once_they_are_read(*arguments, **options):
        if not overlapped:
            overlapped.append(all(event.wait(10) for event in read[2 : 2 + 2 * AHEAD]))
        return answer(*arguments, **options)

    answerer.read_pixels = read_and_signal
    monkeypatch.setattr(model.answer, "generate", answer_once_they_are_read)
    assert len(list(answerer.stream([question(1, image) for image in range(8)], 2))) == 8
    assert overlapped == [True]


def test_closing_the_stream_stops_the_readers(toy, monkeypatch):
    """The reads of later batches block until the pool has been shut down: after that only the reads in progress finish."""
    answerer, _ = toy
    before, stopped, reader = threading.active_count(), threading.Event(), answerer.read_pixels

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            super().shutdown(wait=False, **options)
            stopped.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(model.answer, "ThreadPoolExecutor", Pool)
    answerer.read_pixels = lambda path: (int(path.stem) < 20 or stopped.wait(10), reader(path))[1]
    answers = answerer.stream([question(1, image) for image in range(400)], 20)
    next(answers)
    answers.close()
    assert threading.active_count() == before and len(reader.read) <= 20 + READERS


def test_any_other_error_is_raised(toy):
    answerer, _ = toy
    answerer.read_pixels = lambda path: 1 // 0
    with pytest.raises(ZeroDivisionError):
        list(answerer.stream([question(1, 1)], 1))


def test_prompts_beyond_the_positions_of_the_model_are_named_once(toy, capsys):
    answerer, _ = toy
    answerer.options["max_new_tokens"] = 10
    answerer.answer_all([question(990, 1), question(3)], 1)
    assert "note" not in capsys.readouterr().err
    answerer.answer_all([question(991, 1), question(995), question(3)], 1)
    (note,) = capsys.readouterr().err.splitlines()
    assert "tokens with 10 new ones (max_new_tokens) goes beyond the 1000 positions" in note
