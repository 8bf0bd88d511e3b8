"""A trained model and questions about pictures -> answers, in batches. The same prompt code and the same image reading as in
training: both are handed in. While the model answers one batch, threads read the pictures of the next ones."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.generate import Prompt, generate
from visual.images import ImageError

WINDOW = 16  # batches' worth of requests that are put in order together: prompts in memory, no pictures
AHEAD = 2  # batches whose pictures are read while another one is answered
READERS = 4  # threads that read pictures


class Request(NamedTuple):
    """One question. turns: (role, parts) pairs as `ChatFormat.encode_prompt` takes them, ending with the user's;
    images: the files that their image parts stand for, in order."""

    turns: Sequence[tuple[str, Sequence]]
    images: Sequence[Path]


class Answer(NamedTuple):
    text: str  # no special tokens, no blanks around
    seconds: float  # its share of the batch's time


class _Asked(NamedTuple):
    number: int  # of the request
    ids: list[int]
    images: tuple[Path, ...]


_Batch = list[_Asked]
_Reads = dict[Path, "Future[Tensor]"]


class Answerer:
    """Answers requests, greedily or by beam search. In float32 an answer's tokens do not depend on what is asked with it; in
    half precision rounding may decide between two that are almost equally likely.

    read_pixels: image file -> [3,H,W], from any thread; autocast: makes the context to compute in; options:
    transformers' generation options (max_new_tokens, num_beams, ...).
    """

    def __init__(self, model, tokenizer, chat, read_pixels: Callable[[Path], Tensor], autocast: Callable, **options):
        self.model, self.tokenizer, self.chat, self.read_pixels = model, tokenizer, chat, read_pixels
        self.autocast = autocast
        self.options = {"do_sample": False, **options}

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """The answers' texts, asked as one batch. Raises ImageError where a picture cannot be read."""
        return [answer.text for answer in self.answer_all(requests, max(1, len(requests)))]

    def answer_all(self, requests: Sequence[Request], batch_size: int, progress: Callable = iter) -> list[Answer]:
        """The answers in the order of the requests; asked picture by picture, wherever the requests about one stand.
        progress: wraps the sequence that is gone through, for example tqdm. Raises ImageError as `answer` does."""
        first: dict[tuple, int] = {}
        order = sorted(range(len(requests)), key=lambda i: first.setdefault(tuple(requests[i].images), i))
        answers: dict[int, Answer] = {}
        asked = (requests[i] for i in order)
        for i, answer in zip(progress(order), self.stream(asked, batch_size), strict=True):
            if isinstance(answer, ImageError):
                raise answer
            answers[i] = answer
        return [answers[i] for i in range(len(requests))]

    def stream(self, requests: Iterable[Request], batch_size: int) -> Iterator[Answer | ImageError]:
        """The answers in the order of the requests, each as soon as it and those before it are there; an ImageError in
        place of an answer whose picture cannot be read. Neither all requests nor all pictures are held in memory."""
        done: dict[int, Answer | ImageError] = {}
        following = 0
        for batch, reads in self._read_ahead(self._batches(requests, batch_size)):
            done |= self._answer_batch(batch, reads)
            while following in done:
                yield done.pop(following)
                following += 1

    def _batches(self, requests: Iterable[Request], size: int) -> Iterator[_Batch]:
        """The requests about one picture one after the other, the pictures by their longest prompt: little padding."""
        numbered = enumerate(requests)
        while window := list(itertools.islice(numbered, WINDOW * size)):
            about: dict[tuple[Path, ...], _Batch] = defaultdict(list)
            for number, request in window:
                images = tuple(request.images)
                about[images].append(_Asked(number, self.chat.encode_prompt(request.turns), images))
            groups = [sorted(group, key=lambda asked: len(asked.ids)) for group in about.values()]
            groups.sort(key=lambda group: len(group[-1].ids))
            ordered = [asked for group in groups for asked in group]
            yield from (ordered[start : start + size] for start in range(0, len(ordered), size))

    def _read_ahead(self, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, _Reads]]:
        """Each batch with its pictures: read, or being read. A picture that two neighbours show is read once."""
        pool = ThreadPoolExecutor(READERS)
        try:
            waiting: deque[tuple[_Batch, _Reads]] = deque()
            reads: _Reads = {}
            for batch in batches:
                images = dict.fromkeys(image for asked in batch for image in asked.images)
                reads = {image: reads.get(image) or pool.submit(self.read_pixels, image) for image in images}
                waiting.append((batch, reads))
                if len(waiting) > AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer_batch(self, batch: _Batch, reads: _Reads) -> dict[int, Answer | ImageError]:
        """Number of the request -> its answer."""
        started = time.perf_counter()
        pixels: dict[Path, Tensor] = {}
        unreadable: dict[Path, ImageError] = {}
        for image, read in reads.items():
            try:
                pixels[image] = read.result()
            except ImageError as error:
                unreadable[image] = error
        refused = {asked.number: unreadable[image] for asked in batch for image in asked.images if image in unreadable}
        readable = [asked for asked in batch if asked.number not in refused]
        texts = self._texts(readable, pixels) if readable else []
        seconds = (time.perf_counter() - started) / max(1, len(readable))
        return refused | {asked.number: Answer(text, seconds) for asked, text in zip(readable, texts, strict=True)}

    def _texts(self, batch: _Batch, pixels: dict[Path, Tensor]) -> list[str]:
        place = {image: i for i, image in enumerate(pixels)}
        prompts = [Prompt(asked.ids, [place[image] for image in asked.images]) for asked in batch]
        device = next(self.model.projector.parameters()).device
        pixel_values = torch.stack(list(pixels.values())).to(device) if pixels else None
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                ids = generate(self.model, prompts, pixel_values, **self.options)
        finally:
            self.model.train(was_training)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
