"""Answer questions about images in batches.

Prompt encoding and image reading are passed in, so they are the ones used in training. While the model answers one batch,
threads read the images of the next ones.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.generate import Prompt, generate
from model.model import VisionLanguageModel
from visual.images import ImageError

WINDOW = 16  # batches' worth of requests that are sorted together: their prompts are in memory, their images are not
AHEAD = 2  # batches whose images are read while another batch is answered
READERS = 4  # threads that read images


class Request(NamedTuple):
    """One question.

    turns: (role, parts) pairs as `ChatFormat.encode_prompt` takes them; the last one is the user's.
    images: the files of the turns' image parts, in order.
    """

    turns: Sequence[tuple[str, Sequence]]
    images: Sequence[Path]


class PromptEncoder(Protocol):
    """The part of `ChatFormat` that an Answerer uses."""

    def encode_prompt(self, turns: Sequence[tuple[str, Sequence[Any]]]) -> list[int]: ...


def prompt_fits(
    chat: PromptEncoder, turns: Sequence[tuple[str, Sequence]], max_tokens: int | None, new_tokens: int
) -> bool:
    """Return whether the prompt of `turns` and `new_tokens` more fit into `max_tokens`; None: no limit."""
    return max_tokens is None or len(chat.encode_prompt(turns)) + new_tokens <= max_tokens


class Answer(NamedTuple):
    text: str  # without special tokens and surrounding blanks
    seconds: float  # its share of the batch's time


class _Encoded(NamedTuple):
    number: int  # position of the request in the stream
    ids: list[int]
    images: tuple[Path, ...]


_Batch = list[_Encoded]
_Reads = dict[Path, "Future[Tensor]"]


class Answerer:
    """Answers requests by greedy decoding or beam search.

    In float32 the tokens of an answer do not depend on the other requests of its batch. In half precision, rounding may
    decide between two tokens that are almost equally likely.

    chat: its `encode_prompt` turns a request's turns into ids.
    read_pixels: image file -> [3,H,W]; called from several threads.
    autocast: returns the context in which the model runs.
    max_tokens: of a prompt and its answer, beyond which the model fails; None: no limit.
    options: transformers' generation options (max_new_tokens, num_beams, ...).
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: PromptEncoder,
        read_pixels: Callable[[Path], Tensor],
        autocast: Callable[[], AbstractContextManager],
        max_tokens: int | None = None,
        **options: Any,
    ):
        self.model, self.tokenizer, self.chat, self.read_pixels = model, tokenizer, chat, read_pixels
        self.autocast, self.max_tokens = autocast, max_tokens
        self.options = {"do_sample": False, **options}
        self._is_noted = False

    def fits(self, turns: Sequence[tuple[str, Sequence]]) -> bool:
        """Return whether the prompt of `turns` and the longest answer fit into `max_tokens`."""
        return prompt_fits(self.chat, turns, self.max_tokens, new_tokens=self.options.get("max_new_tokens", 0))

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """Answer all requests as one batch and return the texts. Raises ImageError if an image cannot be read."""
        return [answer.text for answer in self.answer_all(requests, max(1, len(requests)))]

    def answer_all(self, requests: Sequence[Request], batch_size: int, progress: Callable = iter) -> list[Answer]:
        """Answer all requests and return the answers in the order of the requests.

        Requests about the same images are answered together, wherever they are in the list. progress: wraps the sequence
        that the loop iterates over, for example tqdm. Raises ImageError if an image cannot be read.
        """
        first: dict[tuple, int] = {}
        order = sorted(range(len(requests)), key=lambda i: first.setdefault(tuple(requests[i].images), i))
        answers: dict[int, Answer] = {}
        ordered = (requests[i] for i in order)
        for i, answer in zip(progress(order), self.stream(ordered, batch_size), strict=True):
            if isinstance(answer, ImageError):
                raise answer
            answers[i] = answer
        return [answers[i] for i in range(len(requests))]

    def stream(self, requests: Iterable[Request], batch_size: int) -> Iterator[Answer | ImageError]:
        """Yield the answers in the order of the requests, each as soon as it and all earlier ones are ready.

        Yields an ImageError instead of an answer if an image of the request cannot be read. Holds neither all requests
        nor all images in memory.
        """
        done: dict[int, Answer | ImageError] = {}
        following = 0
        for batch, reads in self._read_ahead(self._batches(requests, batch_size)):
            done |= self._answer_batch(batch, reads)
            while following in done:
                yield done.pop(following)
                following += 1

    def _batches(self, requests: Iterable[Request], size: int) -> Iterator[_Batch]:
        """Yield batches in which requests about the same images are neighbours. Images are sorted by their longest prompt,
        so that a batch has little padding."""
        numbered = enumerate(requests)
        while window := list(itertools.islice(numbered, WINDOW * size)):
            by_images: dict[tuple[Path, ...], _Batch] = defaultdict(list)
            for number, request in window:
                images = tuple(request.images)
                by_images[images].append(_Encoded(number, self.chat.encode_prompt(request.turns), images))
            groups = [sorted(group, key=lambda request: len(request.ids)) for group in by_images.values()]
            groups.sort(key=lambda group: len(group[-1].ids))
            ordered = [request for group in groups for request in group]
            yield from (ordered[start : start + size] for start in range(0, len(ordered), size))

    def _read_ahead(self, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, _Reads]]:
        """Yield each batch with the pending or finished reads of its images. An image of two consecutive batches is read
        once."""
        pool = ThreadPoolExecutor(READERS)
        try:
            waiting: deque[tuple[_Batch, _Reads]] = deque()
            reads: _Reads = {}
            for batch in batches:
                images = dict.fromkeys(image for request in batch for image in request.images)
                reads = {image: reads.get(image) or pool.submit(self.read_pixels, image) for image in images}
                waiting.append((batch, reads))
                if len(waiting) > AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)

    def _answer_batch(self, batch: _Batch, reads: _Reads) -> dict[int, Answer | ImageError]:
        """Return request number -> its answer, or the error of an image of it."""
        started = time.perf_counter()
        pixels: dict[Path, Tensor] = {}
        unreadable: dict[Path, ImageError] = {}
        for image, read in reads.items():
            try:
                pixels[image] = read.result()
            except ImageError as error:
                unreadable[image] = error
        errors = {request.number: unreadable[i] for request in batch for i in request.images if i in unreadable}
        readable = [request for request in batch if request.number not in errors]
        texts = self._texts(readable, pixels) if readable else []
        seconds = (time.perf_counter() - started) / max(1, len(readable))
        answers = {request.number: Answer(text, seconds) for request, text in zip(readable, texts, strict=True)}
        return {**errors, **answers}

    def _note_long(self, length: int) -> None:
        """Print one note, the first time that a prompt of `length` tokens with its answer goes beyond the positions that the
        language model was made for. Qwen v1 raises InputError instead."""
        positions = self.model.causal_lm.config.max_position_embeddings
        new_tokens = self.options.get("max_new_tokens", 0)
        if not self._is_noted and length + new_tokens > positions:
            self._is_noted = True
            print(
                f"note: a prompt of {length} tokens with {new_tokens} new ones (max_new_tokens) goes beyond the {positions} "
                "positions that the language model was made for (max_position_embeddings); such answers may be poor",
                file=sys.stderr,
                flush=True,
            )

    def _texts(self, batch: _Batch, pixels: dict[Path, Tensor]) -> list[str]:
        index = {image: i for i, image in enumerate(pixels)}
        prompts = [Prompt(request.ids, [index[image] for image in request.images]) for request in batch]
        self._note_long(max(len(request.ids) for request in batch))
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
