"""The data and the model's processors, brought together before anything is trained: the QA files are made, and is every
record what training takes it for? `dataset.check` finds out, this says so in the terms of a config and a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from assemble import chat_format, open_processors
from config import Config
from dataprocess.process_image import prepare_from_config
from dataprocess.report import summary
from dataset.check import Checked, check_file, check_leakage
from dataset.check_report import describe, notes, refused_rows
from dataset.check_sample import check_labels, check_pictures
from dataset.findings import Findings
from model.build import Processors
from model.folder import verify_folder
from resume import on_main

# records whose pictures are decoded and whose labels are read back: at every start, and with --check
START_SAMPLE, CHECK_SAMPLE = 64, 2000


def prepare_data(config: Config, goes_on: bool, check: bool, say) -> None:
    """The QA file from its sources, by the main process, before the others go on."""
    try:
        with PartialState().main_process_first():
            report = prepare_from_config(config, images_may_change=goes_on)
        if report is not None:
            say(summary(report))
    finally:  # the list of refused records stands there whether they were too many or not
        if check and config.data.sources:
            say(refused_rows(config.data.qa_file.with_suffix(".refused.jsonl")), end="")


def look_ahead(config: Config, say) -> None:
    """InputError for what is wrong with the data of a stage, long before its turn. What is merely worth knowing is said
    then."""
    prepare_data(config, any(config.output_dir.glob("checkpoint-*")), False, say)
    findings, processors = Findings(config.output_dir / "findings.jsonl"), None
    with findings.collect():
        processors = open_processors(config)

    def look() -> None:
        check_data(config, processors, findings, False, lambda _: None)
        findings.save()
        findings.stop()

    on_main(look)


def check_folders(output_dir: Path, findings: Findings, say) -> None:
    """Compare every checkpoint of a run with its hashes."""
    for folder in sorted([*output_dir.glob("checkpoint-*"), *output_dir.glob("final")]):
        with findings.collect():
            verify_folder(folder)
            say(f"{folder}: whole")


def check_data(
    config: Config, processors: Processors | None, findings: Findings, thorough: bool, say: Callable[[str], None]
) -> dict[Path, np.ndarray]:
    """Look at every record of the training and the validation file; what is wrong goes to `findings`. Returns for each file
    the records that are left out because max_length leaves no use for them: they are counted, and listed in a file of the
    run. processors: None where they could not be opened; then nothing is said about tokens. thorough: take larger samples
    and say what the files hold."""
    data = config.data
    chat = None
    if processors is not None:
        with findings.collect():
            chat = chat_format(config, processors)
    options = {"chat": chat, "max_length": data.max_length, "seed": config.seed}
    options["sample_size"] = CHECK_SAMPLE if thorough else START_SAMPLE
    held_out, left_out = None, {}
    for path in [data.validation_file, data.qa_file]:  # the training data are looked up in what is held out
        if path is None:
            continue
        if not path.exists():
            findings.faults.append(
                f'{path}: no such QA file; set "data.qa_file", or list "data.sources" to make it.'
                if path == data.qa_file
                else f'{path}: no such file; set "data.validation_file" to null to do without.'
            )
            continue
        progress = functools.partial(tqdm, desc=f"checking {path.name}", unit=" records", delay=2, leave=False)
        is_held_out = path != data.qa_file
        checked = check_file(path, **options, is_held_out=is_held_out, held_out=held_out, progress=progress)
        pictures = check_pictures(checked)
        lengths = None
        if chat is not None:
            decode = functools.partial(
                processors.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            lengths = check_labels(checked, chat, decode, data.max_length)
        if held_out is not None:
            check_leakage(checked, held_out)
        if is_held_out:
            held_out = checked
        if checked.fault:
            findings.faults.append(checked.fault)
        findings.rows.extend(checked.wrong)
        if data.on_bad_image == "stop":
            findings.rows.extend(checked.bad_images)
            if checked.bad_images:
                say(
                    f"note: {path.name}: with data.on_bad_image=skip others take the place of records with bad pictures"
                )
        elif checked.bad_images:
            listing = config.output_dir / f"{path.stem}.bad_images.jsonl"
            checked.bad_images.write(listing)
            say(
                f"note: {path.name}: records with bad pictures, {len(checked.bad_images)}, are replaced by others: {listing}"
            )
        if thorough:
            say(describe(checked, lengths, pictures, data.max_length) + "\n")
        for note in notes(checked, data.max_refused, thorough):
            say(f"note: {note}")
        left_out[path] = leave_out(config, checked, findings, say)
    return left_out


def leave_out(config: Config, checked: Checked, findings: Findings, say: Callable[[str], None]) -> np.ndarray:
    """The records that max_length leaves no use for: listed in a file of the run, and a finding where they are too many."""
    path, count = checked.path, len(checked.unfit)
    same_folder = config.output_dir == path.parent  # where the list of what preparing refused stands
    listing = config.output_dir / f"{path.stem}{'.run' if same_folder else ''}.refused.jsonl"
    if count == 0:
        listing.unlink(missing_ok=True)  # of an earlier start
    elif count > config.data.max_refused * checked.read or count == checked.read:
        findings.faults.append(
            f'{path}: {count} of {checked.read} records cannot be used, more than "data.max_refused" '
            f"({config.data.max_refused:g}) allows. Raise data.max_length or data.max_refused."
        )
        findings.rows.extend(checked.unfit)
    else:
        checked.unfit.write(listing)
        say(f"note: {path.name}: {count} records are longer than data.max_length allows and are left out: {listing}")
    return np.array(checked.unfit_records, np.int64)
