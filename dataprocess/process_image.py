"""Raw annotations -> the QA file: `python -m dataprocess.process_image --config FILE [key=value ...]`.

Every raw record is either kept or refused with a reason; what was read is kept + refused, always. Beside the QA file
(`qa.jsonl`) stand `qa.report.json` with the counts and `qa.refused.jsonl` with one line per refused record. A second
run with the same settings, annotation files and images does nothing. Opens no image and knows no model.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from config import DEFAULT_CONFIG, Config, InputError, SourceConfig, choose, load_config, run_script
from dataprocess.images import ImageFolder, folder_from, modified_ns
from dataprocess.readers import FORMATS, Draft
from dataprocess.report import Tally, summary
from dataprocess.split import TRAIN, VALIDATION, Split
from dataset.json_stream import Item, NotJson, stream_json
from dataset.record import RecordError, parse_record

FORMAT_VERSION = 2  # raise it when the same raw files would give another QA file

_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def prepare(
    *,
    sources: Sequence[SourceConfig],
    qa_file: Path,
    validation_file: Path | None,
    validation_fraction: float,
    seed: int,
    max_refused: float,
) -> dict:
    """Write the QA file and the validation file from `sources`; return the report that stands beside `qa_file`.

    A source with split "auto" is divided by image: the share `validation_fraction` of all images (of all records, where
    there is no image), chosen by a seeded hash of the file name, is held out with everything said about it. Without a
    `validation_file` nothing is held out. No training record shows a held-out image, whichever source it comes from.

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
    fingerprint = _fingerprint(sources, outputs, validation_fraction, seed)
    report = _finished(report_file, fingerprint)
    if report and not _problem(report, max_refused, refused_path):
        return report

    files = {side: _Aside(path) for side, path in outputs.items()}
    refused_file, report_aside = _Aside(refused_path), _Aside(report_file)
    try:
        split = Split(seed, validation_fraction if validation_file else 0.0)
        tally = Tally(source.name for source in sources)
        for source in sorted(sources, key=lambda source: (VALIDATION, "auto", TRAIN).index(source.split)):
            _read_source(source, split, files, refused_file, tally)
        report = tally.report()
        for side, file in files.items():
            report[side] = {"file": str(file.path), "records": file.lines, "bytes": file.bytes}
            report["image_folders"].pop(file.folder, None)
        problem = _problem(report, max_refused, refused_path)
        report["fingerprint"] = None if problem else fingerprint
        report_aside.write(json.dumps(report, ensure_ascii=False, indent=2))
        report_file.unlink(missing_ok=True)  # if this is cut short, nothing claims that the files belong together
        for file in [refused_file, report_aside] if problem else [*files.values(), refused_file, report_aside]:
            file.publish()
    finally:
        for file in [*files.values(), refused_file, report_aside]:
            file.discard()
    if problem:
        raise InputError(problem)
    return report


def _check_source(source: SourceConfig, outputs: list[Path]) -> None:
    choose(FORMATS, source.format, f'source "{source.name}": format')
    if ":" in source.name:
        raise InputError(
            f'source "{source.name}": a name holds no ":"; it separates the name from the id in every record.'
        )
    if any(Path(source.annotations).resolve() == path.resolve() for path in outputs):
        raise InputError(
            f'source "{source.name}": annotations {source.annotations} would be overwritten; rename the QA file.'
        )


def _read_source(source: SourceConfig, split: Split, files: dict[str, _Aside], refused_file: _Aside, tally: Tally):
    folder = ImageFolder(source.images, source.name)
    names = _UniqueNames()
    for item in itertools.islice(stream_json(source.annotations), source.limit):
        try:
            draft = _read_item(item, source)
            found = [folder.find(path) for path in draft.images]
            wanted = draft.id or str(item.index)
            unique = names.propose(wanted)
            name = f"{source.name}:{unique}"
            side = split.side(source.split, found, name)
            paths = [folder_from(files[side].folder, image.folder, image.real_folder) + image.name for image in found]
            objects = _objects(draft, source, name, paths)
            for obj in objects:
                parse_record(obj, source.name)
        except RecordError as error:
            refused_file.write(_encode(_refusal(item, source, error)))
            tally.refuse(source.name, error.reason)
            continue
        for obj in objects:
            files[side].write(_encode(obj))
        names.take(wanted, unique)
        split.remember(side, found)
        tally.keep(source.name, {*draft.repairs, *(image.repair for image in found if image.repair)})
    if not tally.by_source[source.name]["read"]:
        raise InputError(f'source "{source.name}": {source.annotations} holds no record; give a file that does.')
    tally.image_folders = folder.modified | tally.image_folders


def _refusal(item: Item, source: SourceConfig, error: RecordError) -> dict:
    value = item.value if isinstance(item.value, dict) else {}
    return {
        "source": source.name,
        "file": str(source.annotations),
        **({"line": item.line} if item.line else {"index": item.index}),
        "id": value.get("id", value.get("image_id")),
        "reason": error.reason,
        "detail": error.detail,
    }


def _read_item(item: Item, source: SourceConfig) -> Draft:
    if isinstance(item.value, NotJson):
        raise RecordError("not_json", item.value)
    if not isinstance(item.value, dict):
        raise RecordError("wrong_type", f"a raw record is a JSON object, not {type(item.value).__name__}.")
    return FORMATS[source.format](item.value, item.index)


def _objects(draft: Draft, source: SourceConfig, name: str, paths: list[str]) -> list[dict]:
    """The QA records of a draft, as JSON objects."""
    image = {"image": paths if len(paths) > 1 else paths[0]} if paths else {}
    origin = {"source": source.name} | ({"type": draft.type} if draft.type else {})
    if source.captions == "one_per_epoch":
        first, *others = draft.conversations
        more = {"alternatives": others} if others else {}
        return [{"id": name, **image, "conversations": first, **origin, **more}]
    if source.format == "ai_challenger":
        return [
            {"id": f"{name}/{number}", **image, "conversations": turns, **origin}
            for number, turns in enumerate(draft.conversations, start=1)
        ]
    return [{"id": name, **image, "conversations": draft.conversations[0], **origin}]


class _UniqueNames:
    """Makes the ids of one source unique: the second "a" that is kept becomes "a#2". Remembers a hash of each name, not
    the name; two names that share one would cost a needless "#2", nothing else."""

    def __init__(self):
        self._uses: dict[int, int] = {}

    def propose(self, name: str) -> str:
        number = self._uses.get(hash(name), 0) + 1
        unique = name
        while number > 1 and hash(unique := f"{name}#{number}") in self._uses:
            number += 1
        return unique

    def take(self, name: str, unique: str) -> None:
        """Use what was proposed for `name`."""
        for key in {hash(name), hash(unique)}:
            self._uses[key] = self._uses.get(key, 0) + 1


class _Aside:
    """A text file that takes its name only when it is whole: written beside it, then renamed."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = os.path.abspath(path.parent)
        self.lines = 0
        self.bytes = 0
        os.makedirs(self.folder, exist_ok=True)
        self._aside = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = open(self._aside, "wb")

    def write(self, line: str) -> None:
        # Half a surrogate pair has no UTF-8; the escape that takes its place is what JSON writes for it.
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        self._file.write(data)
        self.lines += 1
        self.bytes += len(data)

    def publish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self.path)

    def discard(self) -> None:
        """Remove what was not published."""
        self._file.close()
        self._aside.unlink(missing_ok=True)


def _problem(report: dict, max_refused: float, refused_file: Path) -> str | None:
    """Why these records may not become a QA file."""
    if report["refused"] > max_refused * report["read"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in itertools.islice(report["by_reason"].items(), 5))
        return (
            f"{report['refused']} of {report['read']} raw records were refused ({reasons}), but data.max_refused is "
            f"{max_refused:g}. Each stands with its reason in {refused_file}; mend the annotations or the paths, or "
            "raise data.max_refused."
        )
    if not report[TRAIN]["records"]:
        return f"none of {report['read']} raw records is left to train on; see {refused_file} and data.validation_fraction."
    return None


def _fingerprint(sources: Sequence[SourceConfig], outputs: dict[str, Path], fraction: float, seed: int) -> str:
    """Of all that decides what is written, except which images exist."""
    fields = ("name", "format", "annotations", "images", "limit", "captions", "split")
    described = [[str(getattr(source, field)) for field in fields] for source in sources]
    stamps = []
    for source in sources:
        state = _stat(source)
        stamps.append([state.st_size, state.st_mtime_ns])
    files = [str(path) for path in outputs.values()]
    text = json.dumps([FORMAT_VERSION, described, stamps, files, fraction, seed])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _stat(source: SourceConfig) -> os.stat_result:
    try:
        return os.stat(source.annotations)
    except OSError as error:
        raise InputError(
            f'source "{source.name}": annotations {source.annotations}: {error.strerror}; download them first.'
        ) from None


def _finished(report_file: Path, fingerprint: str) -> dict | None:
    """The report of an earlier run that would be repeated exactly, if its files are still what it wrote."""
    try:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or report.get("fingerprint") != fingerprint:
        return None
    written = [report[side] for side in (TRAIN, VALIDATION) if side in report]
    whole = all(os.path.isfile(one["file"]) and os.path.getsize(one["file"]) == one["bytes"] for one in written)
    unchanged = all(modified_ns(folder) == before for folder, before in report["image_folders"].items())
    return report if whole and unchanged else None


def prepare_from_config(config: Config) -> dict | None:
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
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Raw annotations -> the QA file, as data.sources of the config says.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the YAML file (default: config.yaml)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, for example data.max_refused=0.1"
    )
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    report = prepare_from_config(config)
    print(summary(report) if report else f"data.sources is empty; {config.data.qa_file} is used as it is")


if __name__ == "__main__":
    run_script(main)
