"""A tokenizer learned from QA files, for a language model from scratch.

    python -m dataprocess.train_tokenizer --config configs/from-scratch.yaml
    python -m dataprocess.train_tokenizer --qa FILE [--qa FILE]... --vocab-size 32000 --output FOLDER

Byte-level BPE as Qwen's: any text can be written in it and comes back as it was. With --config it is the one that the
config names (model.from_scratch.tokenizer, vocab_size), learned from the training files of the run or of all its stages;
`sh train.sh` does that by itself where the folder is not there yet. Knows no model and no model library.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from config import Config, InputError, load_config, run_script
from dataprocess.process_image import prepare_from_config
from dataset.json_stream import NotJson, stream_json
from dataset.record import parse_record, parts_of

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")  # the last ids, as in Qwen's
BYTES = 256
# of QA files: learning takes up to some 75 times the text's memory where "words" are whole clauses, as in Chinese
SAMPLE_BYTES = 64 * 2**20
LEARNED_FROM = "learned_from.json"  # beside the tokenizer: what it was made of

# How a text is cut before anything is merged, as Qwen2 does: words with the blank before them, each digit alone, runs of
# other signs, line ends. (tokenization_qwen2.py)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(qa_files: Sequence[Path], vocab_size: int, output: Path) -> int:
    """Learn a tokenizer of at most `vocab_size` tokens, the special ones among them, from all turns of all records, or of a
    seeded choice of records where the files are larger than SAMPLE_BYTES together; and write the folder `output`: whole or
    not at all. Returns how many tokens it has. The same files give the same tokenizer. Raises InputError where the files
    cannot be read, or the folder is there already or cannot be written."""
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size is {vocab_size}; {BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens need {smallest}."
        )
    if output.exists():
        raise InputError(f"{output}: is there already; remove it, or give another folder.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(qa_files), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    learned_from = {
        "vocab_size": vocab_size,
        "qa_files": [str(path) for path in qa_files],
        "sample_bytes": SAMPLE_BYTES,
    }
    _write(tokenizer, learned_from, output)
    return tokenizer.get_vocab_size()


def _texts(qa_files: Sequence[Path]) -> Iterator[str]:
    """What is said in the records, read one at a time."""
    for path in qa_files:
        if not path.exists():
            raise InputError(f"{path}: no such QA file; prepare the data first (python -m dataprocess.process_image).")
    share = SAMPLE_BYTES / max(1, sum(path.stat().st_size for path in qa_files))
    chance = random.Random(0)
    for path in qa_files:
        for item in stream_json(path):
            if share < 1 and chance.random() >= share:
                continue
            place = f"{path} {f'line {item.line}' if item.line else f'item {item.index}'}"
            if isinstance(item.value, NotJson):
                raise InputError(f"{place}: {item.value}")
            record = parse_record(item.value, place)
            for turns in (record.conversations, *record.alternatives):
                for turn in turns:
                    yield from (part for part in parts_of(turn) if isinstance(part, str))


def _write(tokenizer: Tokenizer, learned_from: dict, output: Path) -> None:
    """A folder that transformers' AutoTokenizer reads."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        tokenizer.save(str(partial / "tokenizer.json"))
        for name, values in (("tokenizer_config.json", settings), (LEARNED_FROM, learned_from)):
            (partial / name).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        partial.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and _made_of(output) == learned_from:
            return  # another run has learned the same meanwhile
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); give a folder that is not there yet, where there is room."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _made_of(folder: Path) -> dict:
    """What a tokenizer's folder says that it was learned from; nothing where this program did not make it."""
    try:
        found = json.loads((folder / LEARNED_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_missing(folder: str, vocab_size: int | None) -> bool:
    """Whether the tokenizer that a config names has yet to be learned. InputError where another one is there already."""
    if vocab_size is None:
        return False
    if not Path(folder).exists():
        return True
    found = _made_of(Path(folder)).get("vocab_size")
    if found != vocab_size:
        what = f"was learned with vocab_size {found}" if found else "was not made by dataprocess.train_tokenizer"
        raise InputError(
            f'{folder}: this tokenizer {what}, but "model.from_scratch.vocab_size" is {vocab_size}. Set it to null to use '
            "the tokenizer as it is, or name another folder."
        )
    return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Learn a tokenizer from QA files.")
    parser.add_argument("--config", help="a config with model.from_scratch: the tokenizer that it names")
    parser.add_argument("--qa", action="append", type=Path, help="a QA file; may be given several times")
    parser.add_argument("--vocab-size", type=int, help="how many tokens it will have")
    parser.add_argument("--output", type=Path, help="the folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, with --config")
    arguments = parser.parse_intermixed_args(argv)
    by_hand = (arguments.qa, arguments.vocab_size, arguments.output)
    if arguments.config is None and None not in by_hand:
        size = train_tokenizer(arguments.qa, arguments.vocab_size, arguments.output)
        print(f"{arguments.output}: {size:,} tokens")
        return 0
    if arguments.config is None or any(value is not None for value in by_hand):
        raise InputError("give either --config FILE, or all of --qa, --vocab-size and --output.")
    config = load_config(arguments.config, arguments.overrides)
    new = config.model.from_scratch
    if new is None or new.vocab_size is None:
        raise InputError(
            f'{arguments.config}: "model.from_scratch.vocab_size" is not set, so the config learns no tokenizer; set it.'
        )
    size = learn_if_missing([stage.config for stage in config.train.stages] or [config])
    if size is None:
        raise InputError(f"{new.tokenizer}: is there already; remove it to learn it anew.")
    print(f"{new.tokenizer}: {size:,} tokens")
    return 0


def learn_if_missing(configs: Sequence[Config]) -> int | None:
    """Learn the tokenizer that the configs of a run's stages name, from the training files of all of them, if it is to be
    learned and is not there yet. Returns how many tokens it has, None where there was nothing to do."""
    new = configs[0].model.from_scratch
    if new is None or not is_missing(new.tokenizer, new.vocab_size):
        return None
    for config in configs:
        prepare_from_config(config)
    qa_files = list(dict.fromkeys(config.data.qa_file for config in configs))
    return train_tokenizer(qa_files, new.vocab_size, Path(new.tokenizer))


if __name__ == "__main__":
    run_script(main)
