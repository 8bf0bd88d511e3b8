"""Show what the model gets: the first samples of the training order, as one HTML page. Opens no weights.

    python -m dataset.show --config config.yaml [--stage NAME] [--count 24] [--output FILE.html] [key=value ...]

Samples are read, encoded, ordered and packed (or padded) by the code that training uses, on one process. Each image is
reconstructed from its pixel_values, and so augmented if `data.augment` is set. This is a script: like those at the root, it
reads the whole config.
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

from config import DEFAULT_CONFIG, AugmentConfig, Config, InputError, load_config, printable, run_script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Show what the model gets: images, tokens and labels, as a page.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the YAML file (default: config.yaml)")
    parser.add_argument("--stage", metavar="NAME", help="the stage to show (default: the last)")
    parser.add_argument("--count", type=int, default=24, help="samples to show (default: 24)")
    parser.add_argument("--output", type=Path, help="the page (default: show.html in output_dir)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys, for example data.max_length=512"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.count < 1:
        raise InputError(f"--count is {arguments.count}; show at least 1 sample.")
    return arguments


def check_arguments() -> None:
    """Parse the command line and the config. Raises InputError for what is wrong in them."""
    arguments = parse_arguments(None)
    load_config(arguments.config, arguments.overrides)


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("dataset.show.main", check_arguments)

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from config.files import publish
from dataprocess.process_image import prepare_from_config
from dataset.batch import Batch
from dataset.checks.records import check_file
from dataset.loader import QADataset, make_loader
from dataset.open import sample_order
from dataset.order import PackedRow, micro_batches, pack, packed_rows
from dataset.show_page import Row, Vocabulary, write_page, write_row
from model.build import Processors
from model.hub import check_hub
from qwen import image_token_id
from training.run import chat_format, max_length, open_processors, open_qa_file
from training.speed import packing
from training.stages import stage_index


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.stage is not None:
        config = config.train.stages[stage_index(config.train.stages, arguments.stage)].config
    check_hub(config.model)
    prepare_from_config(config)
    page = show(config, str(arguments.config), arguments.count)
    output = arguments.output or config.output_dir / "show.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        data = page.encode("utf-8", "backslashreplace")  # a path need not be valid text
        if arguments.output:
            output.write_bytes(data)
        else:  # output_dir may be a stranger's
            publish(output, data)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); name another file with --output.") from None
    print(printable(str(output)))
    return 0


def show(config: Config, config_name: str, count: int) -> str:
    """Return the page of the first `count` samples that a run of `config` trains on, by micro-batch. Packed rows are shown
    whole, so there may be a few more."""
    processors = open_processors(config)
    path, limit = config.data.qa_file, max_length(config, processors)
    chat = chat_format(config, processors)
    left_out = check_file(path, chat=chat, max_length=limit, sample_size=0, seed=config.seed).unfit_records
    dataset = open_qa_file(config, processors, path, left_out=left_out, is_training=True)
    if not len(dataset.kept):
        raise InputError(f'{path}: no record fits into "data.max_length" ({limit}); allow more.')
    train = config.train
    size, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    epoch_limit = None if train.steps_per_epoch is None else train.steps_per_epoch * size * accumulation
    order = sample_order(dataset, config.data, seed=config.seed, epoch_limit=epoch_limit)
    words = vocabulary(processors)
    steps, packed = range(-(-count // (size * accumulation))), packing(config).is_on
    micros: list[list[tuple[int, int]] | PackedRow] = []
    if packed:
        micros += packed_rows(order, steps, samples_per_step=size * accumulation, rows=accumulation)
    else:
        micros += micro_batches(order, steps, batch_size=size, accumulation=accumulation)
    loader = make_loader(dataset, micros, processors.tokenizer.pad_token_id, packed=packed)
    counts: Counter = Counter()
    batches, shown = [], 0
    for number, (micro, batch) in enumerate(zip(micros, loader, strict=True), start=1):
        rows = rows_of(batch, keys_of(micro, dataset), dataset, processors=processors, words=words)[: count - shown]
        for row in rows:
            counts.update(row.kinds(words.image_token_id))
        samples = sum(len(row.names) for row in rows)
        remark = describe(batch) + (f"; {samples} of the samples are shown" if samples < batch.num_samples else "")
        batches.append((f"Micro-batch {number}", remark, [write_row(row, words) for row in rows]))
        shown += samples
        if shown >= count:
            break
    side, new = processors.image_processor.image_size, config.model.from_scratch
    about = {
        "config": config_name,
        "encoder": f"{config.model.vision_tower} ({side} × {side} pixels, {processors.num_image_tokens} tokens an image)",
        "language model": str(config.model.language_model)
        if new is None
        else f"{new.architecture} from scratch; tokenizer {new.tokenizer}",
        "max_length": f"{limit:,} tokens"
        + (f"; left out as they do not fit: {len(left_out):,} of {len(dataset):,} records" if left_out else ""),
        "augmentation": describe_augmentation(config.data.augment),
        "samples": f"the first {shown:,} that training reads, of {order.epoch_length:,} an epoch; seed {config.seed}",
    }
    return write_page("What the model gets", about, counts, batches=batches)


def vocabulary(processors: Processors) -> Vocabulary:
    """Return how the tokenizer's ids are shown.

    Byte-level BPE writes each byte of the text as one letter. Other kinds, which a language model from scratch may
    have, write characters, and a single byte as <0x0A>.
    """
    tokenizer = processors.tokenizer
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def token_bytes(token: int) -> bytes:
        text = tokenizer.convert_ids_to_tokens(token)
        assert isinstance(text, str)
        if is_byte_level:
            return bytes(byte_of[letter] for letter in text)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    own = tokenizer.get_vocab().keys() - {str(added) for added in tokenizer.added_tokens_decoder.values()}
    is_byte_level = set("".join(own)) <= byte_of.keys()
    return Vocabulary(
        token_bytes=token_bytes,
        special={token: str(added) for token, added in tokenizer.added_tokens_decoder.items()},
        image_token_id=image_token_id(tokenizer),
        num_image_tokens=processors.num_image_tokens,
    )


def keys_of(micro: list[tuple[int, int]] | PackedRow, dataset: QADataset) -> list[tuple[int, int]]:
    """Return the (epoch, record) pairs of a micro-batch, in its order."""
    if not isinstance(micro, PackedRow):
        return micro
    lengths = [len(dataset.encode(key)[1].input_ids) for key in micro.keys]
    return [micro.keys[place] for place in pack(lengths, micro.rows)[micro.row]]


def describe_augmentation(augment: AugmentConfig | None) -> str:
    """Say how the images on the page are changed."""
    if augment is None:
        return "none"
    strengths = ", ".join(f"{name} {strength:g}" for name, strength in augment.strengths.items() if strength)
    views = "new in each epoch" if augment.views is None else f"{augment.views:,} views of each image"
    return f"{strengths}; {views}; the images are shown as changed"


def describe(batch: Batch) -> str:
    samples, tokens, images = batch.num_samples, batch.input_ids.shape[1], len(batch.is_cached)
    size = f"{samples} samples in {tokens} tokens" if batch.is_packed else f"{samples} samples × {tokens} tokens"
    return f"{size}, {images} images"


def rows_of(
    batch: Batch, keys: list[tuple[int, int]], dataset: QADataset, processors: Processors, words: Vocabulary
) -> list[Row]:
    """Return the rows of a batch that `make_loader` made of `keys`, each with the images of its image tokens."""
    input_ids, labels, lengths, pixels = batch.input_ids, batch.labels, batch.lengths, batch.pixel_values
    images = torch.empty(0) if pixels is None else processors.image_processor.denormalise(pixels)
    names = []
    for name, (epoch, index) in zip(batch.ids, keys, strict=True):
        record = dataset.qa[index]
        about = (("source", record.source), ("type", record.type), ("epoch", epoch + 1))
        names.append((name, " · ".join(f"{key} {value}" for key, value in about if value)))
    if lengths is not None:  # positions restart in every document; documents after the samples are filler
        positions = torch.cat([torch.arange(length) for length in lengths])
        is_read = torch.arange(len(positions)) < sum(lengths[: len(names)])
        return [
            Row(input_ids[0], labels[0], is_read.long(), position_ids=positions, images=images.numpy(), names=names)
        ]
    positions = torch.arange(input_ids.shape[1])  # padding is on the right: positions start at 0 in every row
    assert batch.attention_mask is not None
    tensors = zip(input_ids, labels, batch.attention_mask, strict=True)
    return [
        Row(*row, positions, shown.numpy(), [name])
        for row, shown, name in zip(tensors, images.split(batch.images_in_sample), names, strict=True)
    ]
