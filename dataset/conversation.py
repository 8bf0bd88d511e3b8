"""Convert the turns of a conversation to token ids and labels.

This is the only prompt code: training, validation and answering share it. The format is Qwen's ChatML (`make_context`
of Qwen-7B-Chat):

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n[image tokens]\\nWhat is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n

A text outside of a conversation becomes `The text.<|endoftext|>`, with labels on all tokens, as in pretraining.

Each segment of text is tokenised separately, with special tokens disallowed, and this module inserts the special ids
between the segments. So user text can never become a special token, and the labels are known by construction, without a
search in the ids. This module knows no tokenizer class and opens no image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from config import IGNORE_INDEX, InputError
from dataset.record import IMAGE, Image, Part, Turn, parts_of


@dataclass(frozen=True)
class Encoded:
    """One encoded conversation of L tokens."""

    input_ids: list[int]  # [L]
    labels: list[int]  # [L], not shifted: labels[t] is input_ids[t] or IGNORE_INDEX
    num_images: int

    @property
    def num_targets(self) -> int:
        """Number of tokens in the loss. A label at position 0 does not count, because no logits precede it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class TooLong(InputError):
    """A conversation that `max_length` would cut before the end of an image."""

    reason = "longer_than_max_length"


class NothingSupervised(TooLong):
    """A conversation that `max_length` would leave without an answer, or without one after the last image."""

    reason = "nothing_supervised"


def question_parts(question: str, num_images: int) -> list[Part]:
    """Return the parts of a typed question about `num_images` images, as in the training data: images, newline, text.

    The question is literal text: an `<image>` in it remains seven characters.
    """
    return [IMAGE] * num_images + ["\n" + question if num_images else question]


class ChatFormat:
    """ChatML for one tokenizer, one encoder and one projector.

    encode_text: text -> ids, with special tokens disallowed.
    num_image_tokens: how many times `image_token_id` is repeated for one image.
    system_prompt: inserted before conversations without a system turn; None for no system segment.
    """

    def __init__(
        self,
        encode_text: Callable[[str], list[int]],
        im_start_id: int,
        im_end_id: int,
        end_of_text_id: int,
        image_token_id: int,
        num_image_tokens: int,
        system_prompt: str | None,
    ):
        self.encode_text = encode_text
        self.im_end_id, self.end_of_text_id = im_end_id, end_of_text_id
        self.image_tokens = [image_token_id] * num_image_tokens
        self.newline = encode_text("\n")
        self.head = {role: [im_start_id, *encode_text(role), *self.newline] for role in ("system", "user", "assistant")}
        self.system_prompt = system_prompt

    def encode(self, turns: Sequence[Turn], max_length: int | None = None) -> Encoded:
        """Encode a whole conversation for training.

        Labels cover exactly the answers that are targets and the `<|im_end|>` after each of them, or all of a text turn.
        `max_length` cuts text from the end, never an image. Raises TooLong if an image would be cut, or NothingSupervised,
        a TooLong, if no label would remain.
        """
        ids: list[int] = []
        labels: list[int] = []
        num_images = last_image_end = 0

        def put(tokens: list[int], supervised: bool = False) -> None:
            ids.extend(tokens)
            labels.extend(tokens if supervised else [IGNORE_INDEX] * len(tokens))

        for turn in self._with_system(turns):
            if turn.role == "text":
                assert isinstance(turn.content, str)  # only a user turn may have parts
                put([*self.encode_text(turn.content), self.end_of_text_id], supervised=True)
                continue
            is_answer = turn.role == "assistant" and turn.is_target
            put(self.head[turn.role])
            for part in parts_of(turn):
                if isinstance(part, Image):
                    put(self.image_tokens)
                    num_images, last_image_end = num_images + 1, len(ids)
                else:
                    put(self.encode_text(part), is_answer)
            put([self.im_end_id], is_answer)
            put(self.newline)
        if max_length is not None and len(ids) > max_length:
            length = self._cut(labels, max_length, last_image_end)
            ids, labels = ids[:length], labels[:length]
        return Encoded(ids, labels, num_images)

    def certainly_fits(self, turns: Sequence[Turn], max_length: int | None) -> bool:
        """Return whether `encode` cannot need more than max_length tokens, determined without tokenising.

        A token covers at least one byte of text, and the tokenizer's normalisation (NFC) turns one byte into at most
        three. False does not mean that the conversation is too long.
        """
        if max_length is None:
            return True
        length = 0
        for turn in self._with_system(turns):
            length += len(self.head.get(turn.role, ())) + 1 + len(self.newline)
            for part in parts_of(turn):
                if isinstance(part, Image):
                    length += len(self.image_tokens)
                else:
                    length += len(part) if part.isascii() else 3 * len(part.encode())
        return length <= max_length

    def encode_prompt(self, turns: Sequence[tuple[str, Sequence[Part]]]) -> list[int]:
        """Return the ids of the prompt, after which the model's answer begins.

        turns: (role, parts) pairs, the last one of role user; otherwise ValueError.
        """
        if not turns or turns[-1][0] != "user":
            raise ValueError("a prompt must end with a user turn")
        ids: list[int] = []
        if self.system_prompt is not None and turns[0][0] != "system":
            turns = [("system", [self.system_prompt]), *turns]
        for role, parts in turns:
            ids += self.head[role]
            for part in parts:
                ids += self.image_tokens if isinstance(part, Image) else self.encode_text(part)
            ids += [self.im_end_id, *self.newline]
        return ids + self.head["assistant"]

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        if self.system_prompt is None or turns[0].role in ("system", "text"):
            return turns
        return [Turn("system", self.system_prompt), *turns]

    @staticmethod
    def _cut(labels: list[int], max_length: int, last_image_end: int) -> int:
        """Return the length to keep: at most max_length, ending with a label, with every image inside."""
        if last_image_end > max_length:
            raise TooLong(
                f"{len(labels)} tokens, and an image ends at token {last_image_end}, beyond max_length {max_length}"
            )
        length = max_length
        while length and labels[length - 1] == IGNORE_INDEX:  # drop a question without an answer
            length -= 1
        if length <= last_image_end:
            raise NothingSupervised(
                f"{len(labels)} tokens; max_length {max_length} leaves no answer, or none after the last image"
            )
        return length
