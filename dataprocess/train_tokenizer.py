"""Learn a tokenizer from QA files, for a language model from scratch.

    python -m dataprocess.train_tokenizer --config recipes/from-scratch.yaml
    python -m dataprocess.train_tokenizer --qa FILE [--qa FILE]... --vocab-size 32000 --output FOLDER

The tokenizer is a byte-level BPE like Qwen's, so any text can be encoded and decoded without loss. --config learns the
tokenizer that the config names (model.from_scratch.tokenizer, vocab_size) from the training files of the run or of all
its stages; `sh train.sh` does this itself if the folder does not exist. This module knows nothing about models and uses
no model library.
"""

from __future__ import annotations

import argparse
import errno
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from config import Config, InputError, load_config, printable, run_script

if __name__ == "__main__":  # before the imports, so that a fault in them is a line too
    run_script("dataprocess.train_tokenizer.main")

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from config.files import open_regular, partial_folder, remove_partials
from dataprocess.process_image import prepare_from_config
from dataset.json_stream import NotJson, stream_json
from dataset.record import parse_record, parts_of

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")  # the last ids, as in Qwen's
BYTES = 256
# Bytes of QA files to learn from. Learning takes up to about 75 times the text's memory if "words" are whole clauses,
# as in Chinese.
SAMPLE_BYTES = 64 * 2**20
LEARNED_FROM = "learned_from.json"  # in the tokenizer's folder: the files and settings it was made from

# Splits a text before merging, as Qwen2 does (tokenization_qwen2.py): words with the space before them, single digits,
# runs of other characters, line ends.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(qa_files: Sequence[Path], vocab_size: int, output: Path) -> int:
    """Learn a tokenizer of at most `vocab_size` tokens, with the special ones, and write it to the folder `output`.

    It learns from all turns of all records, or of a seeded sample of records if the files have more than SAMPLE_BYTES
    together. The same files give the same tokenizer. The folder is written completely or not at all. Returns the number
    of tokens. Raises InputError if the files cannot be read, or the folder already exists or cannot be written.
    """
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size is {vocab_size}; {BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens need {smallest}."
        )
    if output.exists():
        raise InputError(f"{output}: already exists; remove it, or give another folder.")
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
    """Yield the texts of the records, one record at a time."""
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
    """Write a folder that transformers' AutoTokenizer can read."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }
    remove_partials(output.parent, output.name)
    try:
        with partial_folder(output) as partial:
            tokenizer.save(str(partial / "tokenizer.json"))
            for name, values in (("tokenizer_config.json", settings), (LEARNED_FROM, learned_from)):
                (partial / name).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            partial.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and _made_of(output) == learned_from:
            return  # another run has written the same tokenizer in the meantime
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); give a new folder on a disk with free space."
        ) from None


def _made_of(folder: Path) -> dict:
    """The files and settings that a tokenizer was made from; empty if this program did not make it."""
    try:
        with open_regular(folder / LEARNED_FROM) as file:
            found = json.loads(file.read().decode())
    except (InputError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_missing(folder: str, vocab_size: int | None) -> bool:
    """True if the tokenizer of a config is still to be learned. Raises InputError if the folder has another one."""
    if vocab_size is None:
        return False
    if not Path(folder).exists():
        return True
    found = _made_of(Path(folder)).get("vocab_size")
    if found != vocab_size:
        what = f"was learned with vocab_size {found}" if found else "was not made by dataprocess.train_tokenizer"
        raise InputError(
            f'{folder}: this tokenizer {what}, but "model.from_scratch.vocab_size" is {vocab_size}. Set it to null to '
            "use the tokenizer as it is, or name another folder."
        )
    return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Learn a tokenizer from QA files.")
    parser.add_argument("--config", help="a config with model.from_scratch: the tokenizer that it names")
    parser.add_argument("--qa", action="append", type=Path, help="a QA file; may be given several times")
    parser.add_argument("--vocab-size", type=int, help="number of tokens, including the special ones")
    parser.add_argument("--output", type=Path, help="the folder to create")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, with --config")
    arguments = parser.parse_intermixed_args(argv)
    by_hand = (arguments.qa, arguments.vocab_size, arguments.output)
    if arguments.config is None and None not in by_hand:
        size = train_tokenizer(arguments.qa, arguments.vocab_size, arguments.output)
        print(printable(f"{arguments.output}: {size:,} tokens"))
        return 0
    if arguments.config is None or any(value is not None for value in by_hand):
        raise InputError("give either --config FILE, or all of --qa, --vocab-size and --output.")
    config = load_config(arguments.config, arguments.overrides)
    new = config.model.from_scratch
    if new is None or new.vocab_size is None:
        raise InputError(
            f'{arguments.config}: "model.from_scratch.vocab_size" is not set, so no tokenizer is to be learned; set it.'
        )
    learned = learn_if_missing([stage.config for stage in config.train.stages] or [config])
    if learned is None:
        raise InputError(f"{new.tokenizer}: already exists; remove it to learn it again.")
    print(printable(f"{new.tokenizer}: {learned:,} tokens"))
    return 0


def learn_if_missing(configs: Sequence[Config]) -> int | None:
    """Learn the tokenizer of a run if the config asks for it and it is missing, from the training files of all stages.

    configs: one per stage. Returns the number of tokens, or None if there was nothing to do.
    """
    new = configs[0].model.from_scratch
    if new is None or new.vocab_size is None or not is_missing(new.tokenizer, new.vocab_size):
        return None
    for config in configs:
        prepare_from_config(config)
    qa_files = list(dict.fromkeys(config.data.qa_file for config in configs))
    return train_tokenizer(qa_files, new.vocab_size, Path(new.tokenizer))
