"""Tokenizers of the Qwen family: loading, the image token, and encoding text that never becomes a special token.

The prompt format is not known here; it belongs to the conversation code. A tokenizer.json may come from a stranger: its
rules may take very long, fill the memory, or turn typed text into a special token. Each is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Metaspace
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import cached_file

from config import InputError, is_text, shortened
from config.files import refuse_pointers

STOP_TOKENS = ["<|im_end|>", "<|endoftext|>"]  # both end an answer
CHAT_TOKENS = ["<|im_start|>", *STOP_TOKENS]
IMAGE_TOKENS = ["<|image_pad|>", "<|extra_0|>"]  # the first one in the vocabulary is used

# How much longer a tokenizer's rules may make a text. Released ones need less than 70.
MAX_GROWTH = 256

# The special tokens of Qwen v1 in the order of their ids, which start after the vocabulary's (tokenization_qwen.py).
QWEN1_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


def load_tokenizer(path: str | Path, any_kind: bool = False) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local folder or hub name, with chat tokens, an image token and a padding token.

    any_kind: accept any fast tokenizer, for a language model that is trained from scratch. Missing chat tokens are added.
    It need not be a byte-level BPE, although with another kind some texts do not decode to themselves.

    `qwen.tiktoken` of a Qwen v1 folder is read directly; any other folder is read by AutoTokenizer, never with remote
    code. The image token is `<|image_pad|>` if the vocabulary has it, else `<|extra_0|>` (v1), else `<|image_pad|>` is
    added. AutoTokenizer gives the same ids for a folder written by `save_pretrained`.
    A byte-level tokenizer.json is used as it is written, also where transformers would give it the rules of a class, such as
    Qwen2Tokenizer beside `model_type: qwen2`. Qwen's rules normalise text to NFC.
    InputError if the path cannot be read or is not a Qwen tokenizer, or if its rules multiply text or turn the spelling of a
    special token into that token.
    """
    path = str(path)
    refuse_pointers(path)
    tokenizer: PreTrainedTokenizerBase
    vocabulary = None if _has(path, "tokenizer.json") else _has(path, "qwen.tiktoken")
    if vocabulary:
        tokenizer = _read_qwen1(vocabulary)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            if isinstance(tokenizer, PreTrainedTokenizerFast) and not _is_as_written(tokenizer, path):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        except BaseException as error:  # transformers and tokenizers raise nearly anything on damaged files
            if not (isinstance(error, Exception) or _is_panic(error)):
                raise
            reason = (str(error).splitlines() or [""])[0]
            advice = ' Set "model.from_scratch.vocab_size" to learn one from the run\'s data.' if any_kind else ""
            raise InputError(
                f"tokenizer {path}: cannot be read ({type(error).__name__}: {reason:.200}).{advice}"
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"tokenizer {path}: {type(tokenizer).__name__} is not a fast tokenizer; give a folder with tokenizer.json."
        )
    kind = type(tokenizer.backend_tokenizer.model).__name__
    if kind != "BPE" and not any_kind:  # others have an unknown token or may fail on a text
        raise InputError(f"tokenizer {path}: a {kind}, not a byte-level BPE like Qwen's; give a Qwen model's folder.")
    missing = [token for token in CHAT_TOKENS if not _knows(tokenizer, token)]
    if missing and not any_kind:
        raise InputError(
            f"tokenizer {path}: {', '.join(missing)} not in the vocabulary, but prompts need them (ChatML); give the folder "
            "of a Qwen model, or of another one with these tokens, such as SmolLM2-Instruct."
        )
    if missing:
        _add_special(tokenizer, missing)
    if not any(_knows(tokenizer, token) for token in IMAGE_TOKENS):
        _add_special(tokenizer, IMAGE_TOKENS[:1])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|endoftext|>"
    _refuse_growth(tokenizer, path)
    for token in _special_tokens(tokenizer, len(tokenizer)).values():
        encode_text(tokenizer, token)  # raises if it is not encoded as its characters
    return tokenizer


def image_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that is replaced by an image feature, e.g. `<|image_pad|>`."""
    return next(token for token in IMAGE_TOKENS if _knows(tokenizer, token))


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of `image_token`."""
    index = tokenizer.convert_tokens_to_ids(image_token(tokenizer))
    assert isinstance(index, int)
    return index


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode text without added tokens: "<|im_end|>" or "<think>" in the text is encoded as its characters.

    InputError: the text has unpaired surrogates; the tokenizer's rules turn it into a special token, or fail on it.
    """
    # `split_special_tokens` is not enough: some added tokens ("<think>", "<tool_call>") are not special. A tokenizer built
    # from the same parts has no added tokens. It shares the vocabulary, so building it takes microseconds.
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    bare.normalizer, bare.pre_tokenizer = backend.normalizer, _inside_a_prompt(backend.pre_tokenizer)
    try:
        ids = bare.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        if not is_text(text):
            raise InputError(f"the text {shortened(text)!r} is not UTF-8 (it has unpaired surrogates).") from None
        if type(error) is not Exception and not _is_panic(error):  # the library's errors have no class of their own
            raise
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: fails on the text {text[:40]!r} ({str(error):.200}); use the "
            "tokenizer of a released model."
        ) from None
    special = _special_tokens(tokenizer, len(tokenizer))
    if not special.keys().isdisjoint(ids):
        found = next(special[index] for index in ids if index in special)
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: turns the text {text[:40]!r} into the special token {found!r:.40}, which "
            "no text may become; use the tokenizer of a released model."
        )
    return ids


@functools.lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerFast, size: int) -> dict[int, str]:
    """Return id -> token of the tokens that no text may become: the special ones, except the one that stands for unknown
    characters. size: of the tokenizer with all added tokens, because it can grow."""
    backend = tokenizer.backend_tokenizer
    special = {index: token.content for index, token in backend.get_added_tokens_decoder().items() if token.special}
    unknown = {str(tokenizer.unk_token), getattr(backend.model, "unk_token", None)}
    special = {index: token for index, token in special.items() if token not in unknown}
    for token in (*CHAT_TOKENS, *IMAGE_TOKENS):  # never the unknown token
        if (index := backend.token_to_id(token)) is not None:
            special[index] = token
    return special


def _is_as_written(tokenizer: PreTrainedTokenizerFast, path: str) -> bool:
    """Return whether a tokenizer has the rules, the vocabulary and the added tokens of the folder's tokenizer.json.

    Classes of transformers take the vocabulary from the file and the rules from their own code. True for a folder without
    the file, and for a file that is not byte-level: sentencepiece's rules are written in several ways.
    """
    file = _has(path, "tokenizer.json")
    if file is None:
        return True
    with open(file, encoding="utf-8") as opened:
        values = json.load(opened)
    model, added = values["model"], values.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE":
        return True
    rules = Tokenizer.from_str(json.dumps(values | {"added_tokens": [], "model": model | {"vocab": {}, "merges": []}}))
    backend = tokenizer.backend_tokenizer
    if "ByteLevel" not in _rule(rules.pre_tokenizer):
        return True
    settings = (
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
        "dropout",
    )
    return (
        _rule(rules.normalizer) == _rule(backend.normalizer)
        and _rule(rules.pre_tokenizer) == _rule(backend.pre_tokenizer)
        and all((getattr(rules.model, name) or None) == (getattr(backend.model, name) or None) for name in settings)
        and backend.get_vocab(with_added_tokens=False) == model["vocab"]
        and all(backend.token_to_id(token["content"]) == token["id"] for token in added)
    )


def _rule(part: Any) -> str:
    """Return a rule of a tokenizer as text, without trim_offsets, which changes no id."""
    return "" if part is None else re.sub('"trim_offsets":(true|false),?', "", part.__getstate__().decode())


def _refuse_growth(tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Raise InputError if the rules of the tokenizer can make a text more than MAX_GROWTH times as long."""
    backend = tokenizer.backend_tokenizer
    rules = [part.__getstate__() for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    for parts in (rules, [] if backend.decoder is None else [backend.decoder.__getstate__()]):
        growth = math.prod(_growth(json.loads(part)) for part in parts)
        if growth > MAX_GROWTH:
            raise InputError(
                f"tokenizer {path}: its rules (normalizer, pre_tokenizer, decoder) make a text up to {growth:,.0f} times as "
                f"long, more than {MAX_GROWTH}; use the tokenizer of a released model."
            )


def _growth(rule: dict) -> float:
    """Return at most how many times as long a rule of tokenizer.json makes a text, without Unicode's own forms."""
    kind = rule.get("type")
    if kind == "Sequence":
        steps = [step for name in ("normalizers", "pretokenizers", "decoders") for step in rule.get(name, [])]
        return math.prod(map(_growth, steps))
    if kind == "Replace":
        literal = rule["pattern"].get("String")
        if literal:
            return max(1.0, len(rule["content"]) / len(literal))
        return 1.0 + len(rule["content"])  # a regular expression may match between any two characters
    if kind == "Prepend":
        return 1.0 + len(rule["prepend"])
    if kind == "Precompiled":  # a trie's size (4 bytes), the trie, and the replacements, each with a NUL at its end
        table = base64.b64decode(rule["precompiled_charsmap"])
        start = 4 + int.from_bytes(table[:4], "little")
        return max(1.0, max(map(len, table[start:].split(b"\0"))))
    return 2.0 if kind in ("ByteLevel", "Metaspace") else 1.0


def _inside_a_prompt(rule: Any) -> Any:
    """Return the pre-tokenizer for text that does not begin its input: a prompt begins with a chat token. Sentencepiece's
    Metaspace would put a space before it."""
    if isinstance(rule, Metaspace) and rule.prepend_scheme == "first":
        return Metaspace(rule.replacement, prepend_scheme="never", split=rule.split)
    return rule


def _is_panic(error: BaseException) -> bool:
    """Return whether `error` is a panic of the tokenizers library, whose class has a name but cannot be imported."""
    return type(error).__name__ == "PanicException"


def _has(path: str, name: str) -> str | None:
    """The local path of file `name` in a folder or hub repository, downloaded if necessary, or None if not found."""
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
    """Convert `qwen.tiktoken` (lines of base64 bytes and rank) to an equal byte-level BPE with merges."""
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

    # tiktoken joins two neighbours if their concatenation is a token, lowest rank first. Written as merges, this is every
    # split of a token into two tokens, ordered by the rank of the whole token.
    merges = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    letters = bytes_to_unicode()
    name = {rank: "".join(letters[byte] for byte in token) for token, rank in ranks.items()}
    # The vocabulary must contain the special tokens with their ids: the tokenizer numbers missing ones in its own order.
    vocabulary = {written: rank for rank, written in name.items()}
    vocabulary |= {token: len(ranks) + i for i, token in enumerate(QWEN1_SPECIAL_TOKENS)}
    pairs: list[Any] = [(name[left], name[right]) for _, left, right in merges]  # annotated as list[str] in the library
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=pairs,
        extra_special_tokens=QWEN1_SPECIAL_TOKENS[1:],
    )
