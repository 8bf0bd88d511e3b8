"""Raw annotations -> the QA file: `python -m dataprocess.process_image --config FILE [key=value ...]`.

Every raw record is either kept or refused with a reason; what was read is kept + refused, always. Beside the QA file
(`qa.jsonl`) stand `qa.report.json` with the counts and `qa.refused.jsonl` with one line per refused record, and, where
they are needed, `qa.images.sqlite` (which images were verified) and `qa.images/` (images that lay inside the records).
A second run with the same settings, annotation files and images does nothing. Knows no model.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from config import DEFAULT_CONFIG, Config, InputError, SourceConfig, load_config, run_script
from dataprocess.containers import stamps
from dataprocess.detect import check_format
from dataprocess.images import PictureStore, modified_ns
from dataprocess.outputs import AsideFile
from dataprocess.report import Tally, summary
from dataprocess.sorting import Sorter
from dataprocess.split import TRAIN, VALIDATION, Split
from dataprocess.verify import ImageVerifier

FORMAT_VERSION = 3  # raise it when the same raw files would give another QA file
TOP_REASONS = 5  # that the message of too many refusals names


def prepare(
    *,
    sources: Sequence[SourceConfig],
    qa_file: Path,
    validation_file: Path | None,
    validation_fraction: float,
    seed: int,
    max_refused: float,
    verify_images: bool,
    images_may_change: bool = False,
) -> dict:
    """Write the QA file and the validation file from `sources`; return the report that stands beside `qa_file`.

    A source with split "auto" is divided by image: the share `validation_fraction` of all images (of all records, where
    there is no image), chosen by a seeded hash (see `Split`), is held out with everything said about it. Without a
    `validation_file` nothing is held out. No training record shows a held-out image, whichever source it comes from.
    With `verify_images` every image is decoded once, and again only when its file has changed.

    Where settings, annotation files and images are as they were, nothing is done; with `images_may_change` the images may
    be others.

    Report: "read", "kept", "refused" (raw records), "by_source" (the same three), "by_reason", "repairs" (rule -> kept
    records that needed it), "train" and "validation" ({"file", "records", "bytes"}), "image_folders" (folder ->
    modification time, by which a later run sees that images came or went; without the folders written to, where it would
    see our own files), "fingerprint" (null when the run was refused).

    Raises InputError for settings or files that cannot be used, and when more than the fraction `max_refused` of the raw
    records was refused: then the report and the list of refused records are written, but no QA file.
    """
    outputs = {TRAIN: Path(qa_file)} | ({VALIDATION: Path(validation_file)} if validation_file else {})
    report_file, refused_path = outputs[TRAIN].with_suffix(".report.json"), outputs[TRAIN].with_suffix(".refused.jsonl")
    for source in sources:
        _check_source(source, [*outputs.values(), report_file, refused_path])
    fingerprint = _fingerprint(sources, outputs, validation_fraction, seed, verify_images)
    os.makedirs(outputs[TRAIN].parent, exist_ok=True)
    with contextlib.ExitStack() as stack:
        verifier = None
        if verify_images:
            verifier = stack.enter_context(ImageVerifier(outputs[TRAIN].with_suffix(".images.sqlite")))
        report = _finished(report_file, fingerprint)
        if report and not _problem(report, max_refused, refused_path):
            if images_may_change or not (_images_changed(report) or (verifier and verifier.changed())):
                return report

        files = {side: stack.enter_context(AsideFile(path)) for side, path in outputs.items()}
        refused_file, report_aside = (stack.enter_context(AsideFile(path)) for path in (refused_path, report_file))
        split = Split(seed, validation_fraction if validation_file else 0.0)
        tally = Tally(source.name for source in sources)
        store = PictureStore(outputs[TRAIN].with_suffix(".images"))
        sorter = Sorter(files, refused_file, split, tally, store, verifier)
        for source in sorted(sources, key=lambda source: (VALIDATION, "auto", TRAIN).index(source.split)):
            sorter.read(source)
        report = tally.report() | {"image_folders": sorter.image_folders}
        for side, file in files.items():
            report[side] = {"file": str(file.path), "records": file.lines, "bytes": file.bytes}
            report["image_folders"].pop(file.folder, None)
        if store.is_used:
            report["image_folders"][store.folder] = modified_ns(store.folder)
        problem = _problem(report, max_refused, refused_path)
        report["fingerprint"] = None if problem else fingerprint
        report_aside.write([json.dumps(report, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")])
        report_file.unlink(missing_ok=True)  # if this is cut short, nothing claims that the files belong together
        for file in [refused_file, report_aside] if problem else [*files.values(), refused_file, report_aside]:
            file.publish()
    if problem:
        raise InputError("\n  ".join([problem, *tally.examples_by_reason(TOP_REASONS)]))
    return report


def _check_source(source: SourceConfig, outputs: list[Path]) -> None:
    check_format(source)
    if ":" in source.name:
        raise InputError(
            f'source "{source.name}": a name holds no ":"; it separates the name from the id in every record.'
        )
    if any(Path(source.annotations).resolve() == path.resolve() for path in outputs):
        raise InputError(
            f'source "{source.name}": annotations {source.annotations} would be overwritten; rename the QA file.'
        )


def _problem(report: dict, max_refused: float, refused_file: Path) -> str | None:
    """Why these records may not become a QA file."""
    if report["refused"] > max_refused * report["read"]:
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in itertools.islice(report["by_reason"].items(), TOP_REASONS)
        )
        return (
            f"{report['refused']} of {report['read']} raw records were refused ({reasons}), but data.max_refused is "
            f"{max_refused:g}. Each stands with its reason in {refused_file}; mend the annotations or the paths, or "
            "raise data.max_refused."
        )
    if not report[TRAIN]["records"]:
        return f"none of {report['read']} raw records is left to train on; see {refused_file} and data.validation_fraction."
    return None


def _fingerprint(
    sources: Sequence[SourceConfig], outputs: dict[str, Path], fraction: float, seed: int, verify_images: bool
) -> str:
    """Of all that decides what is written, except which images exist and what is in them."""
    fields = ("name", "format", "annotations", "images", "limit", "captions", "split")
    described = [[str(getattr(source, field)) for field in fields] for source in sources]
    files = [str(path) for path in outputs.values()]
    holders = [stamps(source.annotations, source.images) for source in sources]
    text = json.dumps([FORMAT_VERSION, described, holders, files, fraction, seed, verify_images])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _finished(report_file: Path, fingerprint: str) -> dict | None:
    """The report of an earlier run with the same settings and annotation files, if its files are still what it wrote."""
    try:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or report.get("fingerprint") != fingerprint:
        return None
    written = [report[side] for side in (TRAIN, VALIDATION) if side in report]
    whole = all(os.path.isfile(one["file"]) and os.path.getsize(one["file"]) == one["bytes"] for one in written)
    return report if whole else None


def _images_changed(report: dict) -> bool:
    """Whether an image has come or gone since."""
    return any(modified_ns(folder) != before for folder, before in report["image_folders"].items())


def prepare_from_config(config: Config, images_may_change: bool = False) -> dict | None:
    """What the config's `data` section says: the demo's raw data if it is wanted and missing, then `prepare`. Returns the
    report, or None where there are no sources and data.qa_file is used as it is."""
    data = config.data
    if data.demo_folder is not None:
        from dataprocess.make_demo import is_complete, make_demo  # only the demo needs what it imports

        if not is_complete(data.demo_folder):
            print(f"drawing the demo's pictures into {data.demo_folder}", flush=True)
            make_demo(data.demo_folder)
    if not data.sources:
        return None
    return prepare(
        sources=data.sources,
        qa_file=data.qa_file,
        validation_file=data.validation_file,
        validation_fraction=data.validation_fraction,
        seed=config.seed,
        max_refused=data.max_refused,
        verify_images=data.verify_images,
        images_may_change=images_may_change,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Raw annotations -> the QA file, as data.sources of the config says.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the YAML file (default: config.yaml)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, for example data.max_refused=0.1"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    for each in [stage.config for stage in config.train.stages] or [config]:
        report = prepare_from_config(each)
        print(summary(report) if report else f"data.sources is empty; {each.data.qa_file} is used as it is")


if __name__ == "__main__":
    run_script(main)
