"""Prepare and check a run's data before training: make the QA files, look at every record, and report what is wrong in
terms of the config and the run. The checks themselves are in `dataset.checks`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from accelerate import PartialState

import qwen
from config import RATE_KEYS, Config, InputError
from config.files import open_regular
from dataprocess.process_image import prepare_from_config
from dataprocess.report import summary
from dataset.checks.findings import Findings, Rows
from dataset.checks.records import Checked, check_file, check_leakage
from dataset.checks.report import describe, notes, refused_rows
from dataset.checks.sample import check_images, check_labels
from dataset.conversation import ChatFormat
from dataset.qa_file import QAFile
from evaluation.score import questions_of
from model.answer import prompt_fits
from model.build import Processors
from model.checkpoint_folder import verify_folder
from training.processes import on_main, print_main
from training.run import chat_format, max_length, open_processors

# records whose images are decoded and whose labels are read back: at every start, and with --check
START_SAMPLE, CHECK_SAMPLE = 64, 2000
MAX_ROW_BYTES = 2**20  # of a row in a list of refused records, which shortens what it quotes


def prepare_data(config: Config, *, resumes: bool, check: bool) -> None:
    """Make the QA files from their sources: on the main process, while the others wait.

    resumes: the run has begun, so its records stay those it began with. check: also print the records that were refused.
    """
    try:
        with PartialState().main_process_first():
            report = prepare_from_config(config, images_may_change=resumes)
        if report is not None:
            print_main(summary(report))
    finally:  # the list of refused records exists even if they were too many
        if check and config.data.sources:
            print_main(refused_rows(config.data.qa_file.with_suffix(".refused.jsonl")), end="")


def look_ahead(config: Config, starts_over: bool = False) -> None:
    """Check a later stage's data before an earlier stage trains. Raises InputError for faults; notes are printed later.

    starts_over: the stage begins again, although its folder may hold checkpoints.
    """
    resumes = not starts_over and any(config.output_dir.glob("checkpoint-*"))
    prepare_data(config, resumes=resumes, check=False)
    findings, processors = Findings(config.output_dir / "findings.jsonl"), None
    with findings.collect():
        processors = open_processors(config)

    def look() -> None:
        check_data(config, processors, findings, quiet=True, resumes=resumes)
        findings.save()
        findings.stop()

    on_main(look)


def check_checkpoints(output_dir: Path, findings: Findings) -> None:
    """Compare every checkpoint of a run with its hashes."""
    for folder in sorted([*output_dir.glob("checkpoint-*"), *output_dir.glob("final")]):
        with findings.collect():
            verify_folder(folder)
            print_main(f"{folder}: intact")


def check_data(
    config: Config,
    processors: Processors | None,
    findings: Findings,
    *,
    thorough: bool = False,
    quiet: bool = False,
    resumes: bool = False,
) -> dict[Path, np.ndarray]:
    """Check every record of the training and the validation file, and add what is wrong to `findings`.

    processors: None if they could not be opened; then token lengths are not checked. thorough: take larger samples and print
    what the files hold. quiet: print no notes. resumes: the run has begun, so its records stay those it began with.
    Otherwise, training images that are copies of held-out ones are held out too, by preparing the data once more. Returns
    for each file the records that are left out because data.max_length leaves no use for them; they are counted, and listed
    in a file of the run.
    """
    copies: set[str] = set()
    while True:
        found = Findings(findings.listing)
        left_out, lines, leaks = _check_files(config, processors, found, thorough=thorough, resumes=resumes)
        if resumes or not config.data.sources or leaks <= copies:
            break
        copies |= leaks  # to hold them out may bring further images to the validation file
        with findings.collect():
            report = prepare_from_config(config, copies=copies)
            if report is not None and not quiet:
                print_main(summary(report))
            continue
        return left_out  # too many records are refused then
    findings.extend(found)
    for line in [] if quiet else lines:
        print_main(line)
    return left_out


def _check_files(
    config: Config, processors: Processors | None, findings: Findings, *, thorough: bool, resumes: bool
) -> tuple[dict[Path, np.ndarray], list[str], set[str]]:
    """Check the files once. Returns (for each file, the records left out; notes; the training images that are held out
    too)."""
    data, chat, limit = config.data, None, config.data.max_length
    positions = None if config.model.language_model is None else qwen.trained_length(config.model.language_model)
    if processors is not None:
        limit = max_length(config, processors)
        with findings.collect():
            chat = chat_format(config, processors)
    held_out, left_out, leaks = None, {}, set()
    said = [
        f"note: {note}"
        for note in (*_idle_rates(config), *_beyond_positions(config, positions), *_many_workers(config))
    ]
    for path in [data.validation_file, data.qa_file]:  # held-out first: training images are looked up among its images
        if path is None:
            continue
        is_held_out = path != data.qa_file
        if not path.exists():
            advice = (
                'set "data.validation_file" to null to do without'
                if is_held_out
                else 'set "data.qa_file", or list "data.sources" to make it'
            )
            findings.faults.append(f"{path}: no such {'' if is_held_out else 'QA '}file; {advice}.")
            continue
        checked = check_file(
            path,
            chat=chat,
            max_length=limit,
            sample_size=CHECK_SAMPLE if thorough else START_SAMPLE,
            seed=config.seed,
            is_held_out=is_held_out,
            held_out=held_out,
        )
        if is_held_out and checked.read == 0 and data.sources:
            checked.fault = _nothing_held_out(config)
        lines = _check_sample(config, checked, processors, chat=chat, thorough=thorough)
        if held_out is not None:
            check_leakage(checked, held_out)
            leaks = checked.leaks
        if is_held_out:
            held_out = checked
        lines += _add_findings(config, checked, findings)
        lines += [f"note: {note}" for note in notes(checked, data.max_refused, thorough)]
        left_out[path], more = _leave_out(config, checked, findings, limit=limit)
        if is_held_out and chat is not None and processors is not None and not checked.fault:
            more += _note_long_questions(
                config,
                path,
                chat,
                left_out=left_out[path],
                positions=processors.max_tokens or positions,
                is_limit=processors.max_tokens is not None,
            )
        if not is_held_out and not checked.fault:
            more += _unused_parts(config, checked, findings, resumes=resumes)
        said += lines + more
    return left_out, said, leaks


def _check_sample(
    config: Config, checked: Checked, processors: Processors | None, chat: ChatFormat | None, thorough: bool
) -> list[str]:
    """Decode the images and read back the labels of a sample. Returns the description of the file if `thorough`."""
    limit = config.data.max_length if processors is None else max_length(config, processors)
    num_images = check_images(checked)
    lengths = None
    if chat is not None and processors is not None:
        lengths = check_labels(checked, chat, processors.decode, max_length=limit)
    return [describe(checked, lengths, num_images, max_length=limit) + "\n"] if thorough else []


def _add_findings(config: Config, checked: Checked, findings: Findings) -> list[str]:
    """Add a file's faults to `findings`. Returns notes about records whose images cannot be read."""
    if checked.fault:
        findings.faults.append(checked.fault)
    findings.rows.extend(checked.wrong)
    if not checked.bad_images:
        return []
    name = checked.path.name
    if config.data.on_bad_image == "stop":
        findings.rows.extend(checked.bad_images)
        return [f"note: {name}: data.on_bad_image=skip would replace records with unreadable images by others"]
    listing = config.output_dir / f"{checked.path.stem}.bad_images.jsonl"
    _write_list(listing, checked.bad_images, findings)
    return [f"note: {name}: {len(checked.bad_images)} records with unreadable images are replaced by others: {listing}"]


def _leave_out(config: Config, checked: Checked, findings: Findings, limit: int) -> tuple[np.ndarray, list[str]]:
    """Find the records of which `limit` tokens leave no use: list them in a file of the run, or add a finding if they are
    too many. Returns (these records, notes)."""
    allows = (
        "data.max_length allows" if limit == config.data.max_length else f"the language model takes ({limit} tokens)"
    )
    path, count = checked.path, len(checked.unfit)
    records = np.array(checked.unfit_records, np.int64)
    listing = config.output_dir / f"{path.stem}.refused.jsonl"
    # Data preparation has its list of refused records beside the QA files.
    prepared = [one.with_suffix(".refused.jsonl").resolve() for one in (path, config.data.qa_file)]
    if listing.resolve() in prepared:
        listing = config.output_dir / f"{path.stem}.run.refused.jsonl"
    if count == 0:
        if _is_list(listing):
            listing.unlink(missing_ok=True)  # from an earlier start
        return records, []
    if count > config.data.max_refused * checked.read or count == checked.read:
        findings.faults.append(
            f'{path}: {count} of {checked.read} records cannot be used, more than "data.max_refused" '
            f"({config.data.max_refused:g}) allows. Raise data.max_length or data.max_refused."
        )
        findings.rows.extend(checked.unfit)
        return records, []
    _write_list(listing, checked.unfit, findings)
    return records, [f"note: {path.name}: {count} records are longer than {allows} and are left out: {listing}"]


def _write_list(listing: Path, rows: Rows, findings: Findings) -> None:
    """Write rows to a file of the run, or add a finding if a file of that name is somebody else's."""
    if os.path.lexists(listing) and not _is_list(listing):
        findings.faults.append(f"{listing}: exists, and was not written by a check of the data; move it elsewhere.")
    else:
        rows.write(listing)


def _is_list(path: Path) -> bool:
    """Return whether a file is a list that `Rows.write` wrote, or empty: its first line has a reason."""
    try:
        with open_regular(path) as file:
            line = file.readline(MAX_ROW_BYTES)
        row = json.loads(line) if line else {"reason": ""}
    except (InputError, OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "reason" in row


def _idle_rates(config: Config) -> list[str]:
    """Return a note for each part that trains with a learning rate of 0."""
    found = []
    for (part, kind), key in RATE_KEYS.items():
        if getattr(config.train.trainable, part).kind == kind and getattr(config.train, key) == 0:
            found.append(
                f"train.{key} is 0, so what trains of the {part.replace('_', ' ')} will not change; give it a positive "
                f"rate, or set train.trainable.{part} to frozen and train.{key} to null"
            )
    return found


def _many_workers(config: Config) -> list[str]:
    """Return a note if more processes read images than there are processors for this one."""
    given, count = config.train.num_workers, os.cpu_count() or 1
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    if given <= count:
        return []
    return [
        f"train.num_workers is {given}, but {count} processor{'' if count == 1 else 's'} can be used here; more workers "
        "than processors take memory and read no faster"
    ]


def _beyond_positions(config: Config, positions: int | None) -> list[str]:
    """Return a note if data.max_length is more than the positions that the language model was made for."""
    if positions is None or config.data.max_length <= positions:
        return []
    return [
        f"data.max_length is {config.data.max_length}, but the language model was made for {positions} positions "
        f"(max_position_embeddings or seq_length in its config.json); set it to {positions} or less"
    ]


def _nothing_held_out(config: Config) -> str:
    """Return the fault of a validation file that preparation left empty."""
    data = config.data
    if any(source.split != "train" for source in data.sources):
        why = f"too few images for data.validation_fraction ({data.validation_fraction:g}); raise it, for example to "
        why += "0.2" if data.validation_fraction < 0.2 else "0.5"
    else:
        why = "every source has split: train; set it to auto or validation for one of them"
    return (
        f"{data.validation_file}: contains no records: {why}, or set data.validation_file and train.eval_steps to null to "
        "do without."
    )


def _unused_parts(config: Config, checked: Checked, findings: Findings, resumes: bool) -> list[str]:
    """Add a finding if a part that sees only images would train on none. Returns notes: the same for a run that has begun,
    and sources that are not used."""
    weights = {source.name: source.weight for source in config.data.sources}
    used = {name: count for name, count in checked.sources.items() if weights.get(name, 1.0) > 0}
    said = [
        f'note: source "{name}" has weight 0 in data.sources, so its {count.records:,} records are not trained on'
        for name, count in checked.sources.items()
        if name not in used
    ]
    parts = [part for part in ("vision_tower", "projector") if getattr(config.train.trainable, part) != "frozen"]
    if not parts or not checked.read or any(count.usable_images for count in used.values()):
        return said
    keys = " and ".join(f"train.trainable.{part}" for part in parts)
    message = (
        f"{checked.path}: no record that is trained on has a usable image, so {' and '.join(parts).replace('_', ' ')} would "
        f"train on nothing. Add records with images, or set {keys} to frozen and the learning rate to null (a projector "
        "with random weights also needs train.freeze_random: [projector])."
    )
    if resumes:
        return [*said, f"note: {message}"]
    findings.faults.append(message)
    return said


def _note_long_questions(
    config: Config, path: Path, chat: ChatFormat, left_out: np.ndarray, *, positions: int | None, is_limit: bool
) -> list[str]:
    """Return a note about the held-out questions that, with their answers, need more than the language model's `positions`.

    is_limit: the model cannot be asked them, because it fails beyond; otherwise it answers worse.
    """
    if positions is None:
        return []
    qa, new_tokens = QAFile(path), config.test.max_new_tokens
    room = positions - new_tokens - len(chat.head["assistant"])
    records = np.setdiff1d(np.arange(len(qa)), left_out).tolist()
    # without tokenising the many that are short
    doubtful = [record for record in records if not chat.certainly_fits(qa[record].conversations, room)]
    long = [
        question
        for question in questions_of(qa, doubtful)
        if not prompt_fits(chat, question.turns, positions, new_tokens=new_tokens)
    ]
    if not long:
        return []
    found = (
        f"note: {path.name}: {len(long)} of {len(questions_of(qa, records))} questions do not fit into the {positions} "
    )
    if is_limit:
        ends = (
            f"tokens that the language model takes, with test.max_new_tokens ({new_tokens}); scores and samples leave them "
            "out"
        )
    else:
        ends = (
            f"positions that the language model was made for, with test.max_new_tokens ({new_tokens}), so their answers may "
            "be poor; shorten them, or lower test.max_new_tokens"
        )
    return [found + ends]
