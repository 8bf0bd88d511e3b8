"""Tokenizers of the Qwen family: loading them, the image token, and text that stays text.

No prompt format is known here: which role and which token comes where is the conversation code's matter.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import cached_file

from config import InputError

STOP_TOKENS = ["<|im_end|>", "<|endoftext|>"]  # both end an answer
CHAT_TOKENS = ["<|im_start|>", *STOP_TOKENS]
IMAGE_TOKENS = ["<|image_pad|>", "<|extra_0|>"]  # the first one that the vocabulary has

# The special tokens of Qwen v1, in the order of their ids, which follow the vocabulary's (tokenization_qwen.py).
QWEN1_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


def load_tokenizer(path: str, any_kind: bool = False) -> PreTrainedTokenizerFast:
    """A local folder or a hub name -> the tokenizer, with chat tokens, an image token and a padding token.

    any_kind: for a language model that is yet to learn what its tokens mean. Then any fast tokenizer will do: chat tokens
    that it lacks are added, and it may be no byte-level BPE, if only most texts come back from it as they were.

    A Qwen v1 folder holds `qwen.tiktoken`, which is read directly; any other is read by AutoTokenizer, never with
    remote code. The image token is `<|image_pad|>` where the vocabulary has it, else `<|extra_0|>` (v1), else
    `<|image_pad|>` is added. `save_pretrained` writes a folder that AutoTokenizer reads to the same ids.
    Text is normalised to NFC, as Qwen does. InputError if the path cannot be read or is no Qwen tokenizer.
    """
    path = str(path)
    vocabulary = None if _has(path, "tokenizer.json") else _has(path, "qwen.tiktoken")
    if vocabulary:
        tokenizer = _read_qwen1(vocabulary)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except Exception as error:  # on damaged files transformers and tokenizers raise nearly anything
            reason = (str(error).splitlines() or [""])[0]
            advice = ' Set "model.from_scratch.vocab_size" to learn one from the run\'s data.' if any_kind else ""
            raise InputError(
                f"tokenizer {path}: cannot be read ({type(error).__name__}: {reason:.200}).{advice}"
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"tokenizer {path}: {type(tokenizer).__name__} is no fast one; give a folder with tokenizer.json."
        )
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "BPE" and not any_kind:  # others have an unknown token, and may fail on a text
        raise InputError(f"tokenizer {path}: a {kind}, not a byte-level BPE as Qwen's; give a Qwen model's folder.")
    missing = [token for token in CHAT_TOKENS if not _knows(tokenizer, token)]
    if missing and not any_kind:
        raise InputError(f"tokenizer {path}: {', '.join(missing)} not in the vocabulary; give a Qwen model's folder.")
    if missing:
        _add_special(tokenizer, missing)
    if not any(_knows(tokenizer, token) for token in IMAGE_TOKENS):
        _add_special(tokenizer, IMAGE_TOKENS[:1])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def image_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that stands for one image feature, e.g. `<|image_pad|>`."""
    return next(token for token in IMAGE_TOKENS if _knows(tokenizer, token))


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of `image_token`."""
    return tokenizer.convert_tokens_to_ids(image_token(tokenizer))


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Text -> ids among which no added token is ever found: a written "<|im_end|>" or "<think>" becomes its characters."""
    # Some added tokens ("<think>", "<tool_call>") are not special, so `split_special_tokens` would let them through.
    # A tokenizer of the same parts has none at all. It shares the vocabulary, so it is made in microseconds.
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    bare.normalizer, bare.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    return bare.encode(text, add_special_tokens=False).ids


def _has(path: str, name: str) -> str | None:
    """Where `name` of a folder or a hub repository lies on this disk (it is downloaded if need be), or None."""
    try:
        return cached_file(path, name)
    except OSError:
        return None


def _add_special(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> None:
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)


def _knows(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    return tokenizer.backend_tokenizer.token_to_id(token) is not None


def _read_qwen1(path: str) -> Qwen2Tokenizer:
    """`qwen.tiktoken` (lines of base64 bytes and rank) -> the same tokenizer as a byte-level BPE with merges."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"{path} line {number}: expected a token in base64 and its rank; download it again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(
            f"{path}: ranks are not 0 to {len(ranks) - 1} once each; the file is damaged, download it again."
        )

    # tiktoken joins two neighbours if their bytes together are a token, the lowest rank first. As merges: every way to
    # cut a token in two tokens, in the order of the whole's rank.
    merges = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    letters = bytes_to_unicode()
    name = {rank: "".join(letters[byte] for byte in token) for token, rank in ranks.items()}
    # The special tokens must have their ids in the vocabulary before the tokenizer is made: it numbers those that it
    # does not find itself, in its own order.
    vocabulary = {written: rank for rank, written in name.items()}
    vocabulary |= {token: len(ranks) + i for i, token in enumerate(QWEN1_SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[(name[left], name[right]) for _, left, right in merges],
        extra_special_tokens=QWEN1_SPECIAL_TOKENS[1:],
    )
