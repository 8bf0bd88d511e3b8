"""Convert raw annotations to the QA file: `python -m dataprocess.process_image --config FILE [key=value ...]`, or without a
config one source, for example to score a model on it: `... --from FILE --output QA.jsonl [--images DIR] [key=value ...]`.

Every raw record is either kept or refused with a reason: read = kept + refused. Files written next to `qa.jsonl`:

    qa.report.json      the counts
    qa.refused.jsonl    one line per refused record
    qa.images.sqlite    which images were verified (only with data.verify_images)
    qa.images.zip       images that were stored inside the records (only if there are any)

A second run with the same settings, annotation files and images does nothing. This module knows nothing about models.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from config import (
    DEFAULT_CONFIG,
    Config,
    DataConfig,
    InputError,
    SourceConfig,
    load_config,
    nearest_path,
    printable,
    run_script,
)

if __name__ == "__main__":  # before the imports, so that a fault in them is a line too
    run_script("dataprocess.process_image.main")

from config.files import remove_partials
from config.rules import refuse_source_contradictions
from config.typed_yaml import Typed, apply_override, build
from dataprocess.containers import groups_of, notes_on, stamps
from dataprocess.convert import Converter
from dataprocess.detect import check_format
from dataprocess.image_paths import modified_ns
from dataprocess.image_store import ImageStore
from dataprocess.outputs import AsideFile, read_report, refuse_foreign, write_report
from dataprocess.report import Tally, summary
from dataprocess.split import TRAIN, VALIDATION, Split
from dataprocess.verify_images import ImageVerifier

FORMAT_VERSION = 4  # increase when the same raw files would give a different QA file
MISSING = "If they are data of others, download them first. Paths in a config are relative to the config file."
TOP_REASONS = 5  # reasons listed in the message about too many refusals


def prepare(
    data: DataConfig, *, seed: int, images_may_change: bool = False, copies: Iterable[str | os.PathLike] = ()
) -> dict:
    """Write the QA file and the validation file from `data.sources`. Returns the report, which is also in a file.

    A source with split "auto" is divided by image: the fraction `data.validation_fraction` of all images (of all
    records, for records without an image) is held out with every record about them. A seeded hash chooses them (see
    `Split`). Nothing is held out without a `data.validation_file`. No training record shows a held-out image, from any
    source. With `data.verify_images` every image is decoded once, and again only if its file has changed.

    Nothing is done if settings, annotation files and images are the same as in the last run. With `images_may_change`
    the images are not compared.

    copies: images that are known to be copies, byte for byte, of held-out images under other names; they are held out as
    well, see `Split`. They are found by the check of the data before training. With them the files are always made again,
    and a later run with the same settings keeps the result.

    Report: "read", "kept", "refused" (raw records), "by_source" (the same three), "by_reason", "repairs" (rule -> kept
    records that needed it), "train" and "validation" ({"file", "records", "bytes", "sha256"}), "image_folders" (folder
    -> modification time, so that a later run sees added and removed images; the output folders are left out, because
    this run changes them), "notes" (encodings other than UTF-8, splits in the names of files, files that are not read,
    copies; only if there are any), "annotations" (source -> its annotations), "copies" ({"images", "moved": records that are
    held out because of them}; only if there are any), "fingerprint" (null if the run was refused or killed; "outputs" then
    lists the files among "train" and "validation" that preparation wrote or was about to write).

    Only files that an earlier preparation of this data set wrote are replaced, which its report tells: one that a user wrote
    or changed, and one made from sources of which none is left, is refused before any work begins. Partial files that a
    killed preparation left are removed.

    Raises InputError for settings or files that cannot be used, and if more than the fraction `data.max_refused` of the
    raw records was refused. In that case the report and the list of refused records are written, but no QA file.
    """
    outputs, keys = {TRAIN: Path(data.qa_file)}, ["data.qa_file", "data.validation_file"]
    if data.validation_file:
        outputs[VALIDATION] = Path(data.validation_file)
    report_file, refused_path = outputs[TRAIN].with_suffix(".report.json"), outputs[TRAIN].with_suffix(".refused.jsonl")
    missing = missing_sources(data)
    if not all(os.path.exists(source.annotations) for source in data.sources):
        raise InputError("\n".join([*missing, MISSING]))
    for source in data.sources:
        _check_source(source, [*outputs.values(), report_file, refused_path])
    fingerprint = _fingerprint(data, seed, outputs)
    copied = {os.path.realpath(path) for path in copies}
    finished = None if copied else _finished(report_file, fingerprint)
    qa_files = list(zip(keys, outputs.values(), strict=False))
    annotations = {source.name: os.path.abspath(source.annotations) for source in data.sources}
    if finished is None:
        refuse_foreign(report_file, qa_files, refused_path, annotations=annotations)
    os.makedirs(outputs[TRAIN].parent, exist_ok=True)
    with contextlib.ExitStack() as stack:
        verifier = None
        if data.verify_images:
            verifier = stack.enter_context(ImageVerifier(outputs[TRAIN].with_suffix(".images.sqlite")))
        if finished and not _problem(finished, data.max_refused, refused_path):
            if images_may_change or not (_images_changed(finished) or (verifier and verifier.changed())):
                return finished
        if finished:
            refuse_foreign(report_file, qa_files, refused_path, annotations=annotations)
        if missing:  # images; a run that resumes may have their features in its cache
            raise InputError("\n".join([*missing, MISSING]))

        written = [*outputs.values(), refused_path, report_file]
        for folder in {path.parent for path in written}:
            remove_partials(folder, *(path.name for path in written))
        files = {side: stack.enter_context(AsideFile(path)) for side, path in outputs.items()}
        refused_file = stack.enter_context(AsideFile(refused_path))
        tally = Tally(source.name for source in data.sources)
        store = stack.enter_context(ImageStore(outputs[TRAIN].with_suffix(".images")))
        split = Split(seed, data.validation_fraction if data.validation_file else 0.0, copied)
        converter = Converter(
            files=files,
            refused=refused_file,
            split=split,
            tally=tally,
            store=store,
            verifier=verifier,
        )
        parts, notes = _parts(data)
        # `Split` needs the held-out sources first.
        for source, group in sorted(parts, key=lambda part: (VALIDATION, "auto", TRAIN).index(part[0].split)):
            converter.convert(source, group)
        if copied:
            notes.append(
                f"images held out because they are copies, byte for byte, of held-out images: {len(copied):,}; records "
                f"moved to the validation file with them: {split.moved:,} (of sources with split: train they are refused)"
            )
        report = tally.report() | {"annotations": annotations, "image_folders": converter.image_folders}
        report |= {"notes": notes} if notes else {}
        report |= {"copies": {"images": len(copied), "moved": split.moved}} if copied else {}
        for side, file in files.items():
            report[side] = {
                "file": str(file.path), "records": file.lines, "bytes": file.bytes, "sha256": file.sha256
            }  # fmt: skip
            report["image_folders"].pop(file.folder, None)
        problem = _problem(report, data.max_refused, refused_path)
        if store.is_used:
            if not problem:
                store.publish()
            report["image_folders"][store.folder] = modified_ns(store.folder)
        # A kill from here on leaves a report that does not count as finished, and says which files are ours.
        ours = [str(path) for path in outputs.values() if not problem or path.exists()]
        write_report(report_file, report | {"fingerprint": None, "outputs": ours})
        for file in [refused_file] if problem else [*files.values(), refused_file]:
            file.publish()
        if problem:
            raise InputError("\n  ".join([problem, *tally.examples_by_reason(TOP_REASONS)]))
        report["fingerprint"] = fingerprint
        write_report(report_file, report)
    return report


def missing_sources(data: DataConfig) -> list[str]:
    """Return a fault for each file and folder of the sources that does not exist, except in the demo's folder, where
    they are drawn."""
    faults = []
    for source in data.sources:
        for key, path in (("annotations", source.annotations), ("images", source.images)):
            is_drawn = data.demo_folder is not None and path is not None and path.is_relative_to(data.demo_folder)
            if path is not None and not is_drawn and not os.path.exists(path):
                faults.append(f'source "{source.name}": {key} {path} does not exist{nearest_path(path)}')
    return faults


def _check_source(source: SourceConfig, outputs: list[Path]) -> None:
    check_format(source)
    if ":" in source.name:
        raise InputError(
            f'source "{source.name}": a name must not contain ":", which separates it from the id in every record.'
        )
    if any(Path(source.annotations).resolve() == path.resolve() for path in outputs):
        raise InputError(
            f'source "{source.name}": annotations {source.annotations} would be overwritten; rename the QA file.'
        )


def _parts(data: DataConfig) -> tuple[list[tuple[SourceConfig, list[Path]]], list[str]]:
    """The sources with their files, divided where the names of the files say a split, and notes about them."""
    parts, notes = [], []
    for source in data.sources:
        groups, found = groups_of(source.annotations, source.split, has_validation=data.validation_file is not None)
        notes += [*found, *itertools.chain.from_iterable(notes_on(file) for group in groups for file in group.files)]
        for group in groups:
            parts.append((dataclasses.replace(source, split=group.split or source.split), group.files))
    return parts, notes


def _problem(report: dict, max_refused: float, refused_file: Path) -> str | None:
    """The reason why these records must not become a QA file, or None."""
    if report["refused"] > max_refused * report["read"]:
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in itertools.islice(report["by_reason"].items(), TOP_REASONS)
        )
        return (
            f"{report['refused']} of {report['read']} raw records were refused ({reasons}), but data.max_refused is "
            f"{max_refused:g}. Each is listed with its reason in {refused_file}; fix the annotations or the paths, or "
            "raise data.max_refused."
        )
    if not report[TRAIN]["records"]:
        where = f"{refused_file} and data.validation_fraction"
        return f"none of {report['read']} raw records is left to train on; see {where}."
    return None


def _fingerprint(data: DataConfig, seed: int, outputs: dict[str, Path]) -> str:
    """SHA-256 of everything that decides what is written, except the existence and the content of images."""
    fields = ("name", "format", "annotations", "images", "limit", "captions", "split")
    described = [
        [str(getattr(source, field)) for field in fields]
        + ([repr(source.columns)] if source.columns else [])
        + ([repr(source.prompts)] if source.prompts else [])
        for source in data.sources
    ]
    files = [str(path) for path in outputs.values()]
    holders = [stamps(source.annotations, source.images) for source in data.sources]
    decisive = [FORMAT_VERSION, described, holders, files, data.validation_fraction, seed, data.verify_images]
    return hashlib.sha256(json.dumps(decisive).encode("utf-8", "surrogatepass")).hexdigest()


def _finished(report_file: Path, fingerprint: str) -> dict | None:
    """The report of an earlier run with the same settings and annotation files, if its output files are unchanged."""
    report = read_report(report_file)
    if report is None or report["fingerprint"] != fingerprint:
        return None
    written = [report[side] for side in (TRAIN, VALIDATION) if side in report]
    whole = all(os.path.isfile(one["file"]) and os.path.getsize(one["file"]) == one["bytes"] for one in written)
    return report if whole else None


def _images_changed(report: dict) -> bool:
    """True if an image was added or removed after the report was written."""
    return any(modified_ns(folder) != before for folder, before in report["image_folders"].items())


def prepare_from_config(
    config: Config, images_may_change: bool = False, copies: Iterable[str | os.PathLike] = ()
) -> dict | None:
    """Draw the demo's raw data if the config asks for it and it is missing, then call `prepare`.

    Returns the report, or None if there are no sources and data.qa_file is used as it is.
    """
    data = config.data
    if data.demo_folder is not None:
        from demo.draw import is_complete, make_demo  # here because only the demo needs its imports

        if not is_complete(data.demo_folder):
            print(printable(f"drawing the demo's images into {data.demo_folder}"), flush=True)
            make_demo(data.demo_folder)
    if not data.sources:
        return None
    return prepare(data, seed=config.seed, images_may_change=images_may_change, copies=copies)


def convert_source(
    annotations: str, output: str, *, images: str | None = None, settings: Sequence[str] = (), option: str = "--from"
) -> tuple[Path, dict]:
    """Make a QA file of one source, without a config: every record that can be used, nothing held out.

    images: the folder of its images; by default that of `annotations`. settings: `key=value` for keys of a source, as in
    data.sources (`format=csv`, `columns.image=图片`), or with "data." for `data.max_refused` and `data.verify_images`. Paths
    are relative to the current folder. option: what names the source on the command line, for messages. Returns (the QA
    file, the report). Raises InputError like `prepare`.
    """
    path = Path(annotations).expanduser()
    if not path.exists():
        raise InputError(f"{option} {annotations}: no such file or folder.")
    folder = images or str(path if path.is_dir() else path.parent)
    name = path.resolve().stem.replace(":", "_") or "source"
    source = {"name": name, "annotations": Typed(annotations), "images": Typed(folder)}
    values = {"data": {"qa_file": Typed(output), "sources": [source]}}
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if not key.startswith("data."):
            setting = f"data.sources.0.{setting}"
        elif key not in ("data.max_refused", "data.verify_images"):
            raise InputError(f'"{key}" means nothing with {option}; data.max_refused and data.verify_images do.')
        apply_override(values, setting)
    data = build(DataConfig, values["data"], Path.cwd(), where="data")
    try:
        refuse_source_contradictions(data)
        return data.qa_file, prepare(data, seed=0)
    except InputError as error:
        advice = f"data.qa_file is --output here, the source is {option}, the folder of its images --images"
        keys = "keys: format=csv, columns.question=问题, and data.max_refused=0.1"
        raise InputError(f"{error}\n({advice}; {keys})") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the raw annotations in data.sources to the QA file.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the YAML file (default: config.yaml)")
    parser.add_argument("--from", dest="source", metavar="FILE", help="convert this file or folder, without a config")
    parser.add_argument("--output", metavar="FILE", help="with --from: the QA file to make, for example scoring.jsonl")
    parser.add_argument(
        "--images", metavar="DIR", help="with --from: the folder of its images (default: the file's own)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings to change, for example data.max_refused=0.1; with --from also those of the source: format=csv",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.source is None and (arguments.output or arguments.images):
        parser.error("--output and --images need --from; with a config, set data.qa_file and data.sources")
    if arguments.source is not None:
        if not arguments.output:
            parser.error("--from needs --output, the QA file to make, for example --output scoring.jsonl")
        qa_file, report = convert_source(
            arguments.source, arguments.output, images=arguments.images, settings=arguments.overrides
        )
        print(printable(f"{summary(report)}\nto score a model on it: sh test.sh --qa {qa_file}", lines=True))
        return
    config = load_config(arguments.config, arguments.overrides)
    for each in [stage.config for stage in config.train.stages] or [config]:
        made = prepare_from_config(each)
        text = summary(made) if made else f"data.sources is empty; {each.data.qa_file} is used as it is"
        print(printable(text, lines=True))
