"""A trained model and questions about pictures -> answers, in batches with the KV cache. The same prompt code and the same
image reading as in training: both are handed in."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Request(NamedTuple):
    """One question. turns: (role, parts) pairs as `ChatFormat.encode_prompt` takes them, ending with the user's;
    images: what their image parts stand for, in order: files, or pixels [3,H,W] that `read_pixels` made."""

    turns: Sequence[tuple[str, Sequence]]
    images: Sequence[Path | Tensor]


class Answer(NamedTuple):
    text: str
    seconds: float  # its share of the batch's time


class Answerer:
    """answer(requests) -> texts, one batch at a time.

    read_pixels: image file -> [3,H,W]; autocast: makes the context to compute in; options: transformers' generation
    options (max_new_tokens, num_beams, ...). Greedy or beam search: the same question gives the same answer.
    """

    def __init__(self, model, tokenizer, chat, read_pixels: Callable[[Path], Tensor], autocast: Callable, **options):
        self.model, self.tokenizer, self.chat, self.read_pixels = model, tokenizer, chat, read_pixels
        self.autocast = autocast
        self.options = {"do_sample": False, **options}

    def prompt_length(self, request: Request) -> int:
        """Tokens before the answer: batches of like lengths waste no padding."""
        return len(self.chat.encode_prompt(request.turns))

    def answer_all(self, requests: Sequence[Request], batch_size: int, progress: Callable = iter) -> list[Answer]:
        """The answers to any number of requests, in their order; asked in batches of prompts of like length.
        progress: wraps the batches, for example tqdm."""
        order = sorted(range(len(requests)), key=lambda i: self.prompt_length(requests[i]))
        answers: list[Answer] = [Answer("", 0.0)] * len(requests)
        for batch in progress([order[start : start + batch_size] for start in range(0, len(order), batch_size)]):
            started = time.perf_counter()
            texts = self.answer([requests[i] for i in batch])
            seconds = (time.perf_counter() - started) / len(batch)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = Answer(text, seconds)
        return answers

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> list[str]:
        """The answers: text, no special tokens, no blanks around. Raises ImageError where a picture cannot be read."""
        read = functools.cache(self.read_pixels)  # several questions about one picture read it once
        images = [image if isinstance(image, Tensor) else read(image) for r in requests for image in r.images]
        prompts = [self.chat.encode_prompt(request.turns) for request in requests]
        length = max(map(len, prompts))
        input_ids = torch.full((len(prompts), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):  # padded on the left: the answers all begin at the same column
            input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, length - len(prompt) :] = 1
        device = next(self.model.projector.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                ids = self.model.generate(
                    input_ids.to(device),
                    attention_mask.to(device),
                    torch.stack(images).to(device) if images else None,
                    **self.options,
                )
        finally:
            self.model.train(was_training)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
