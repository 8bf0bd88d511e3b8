"""Convert one source's raw records to QA records. Each is kept on a side of the split or refused with a reason."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import orjson
from tqdm import tqdm

from config import InputError, SourceConfig, printable
from dataprocess.columns import with_own_names
from dataprocess.containers import stream_records
from dataprocess.detect import reader_for
from dataprocess.image_paths import Found, ImageFolder, Listings, folder_from
from dataprocess.image_store import ImageStore
from dataprocess.marks import repair_marks
from dataprocess.outputs import AsideFile, UniqueNames
from dataprocess.report import Refusal, Tally
from dataprocess.rows import Draft
from dataprocess.split import TRAIN, Split
from dataprocess.verify_images import ImageVerifier
from dataset.json_stream import Item, NotJson
from dataset.record import RecordError, check_record

BATCH = 512  # records whose images are verified together; the first batch also decides the format
SMALL_BATCH = 64  # without verification: few enough to stay in the CPU's cache until they are written


class _Candidate(NamedTuple):
    """A raw record in progress: the QA records to write, or the error that refuses it."""

    item: Item
    wanted: str  # its id within the source, before it is made unique
    images: list[Found]
    objects: list[dict]  # QA records as JSON objects; image paths are relative to the training file
    repairs: Sequence[str]
    error: RecordError | None


_candidate = partial(tuple.__new__, _Candidate)  # takes a tuple of the six fields; half the cost of the constructor


class Converter:
    """Converts sources: kept records go to `files`, refused ones to `refused`.

    files: side of the split -> the QA file of that side.
    split: chooses the side of each record.
    tally: counts the records.
    store: takes images that are stored inside the records.
    verifier: decodes the images of every record that is otherwise good. With None, images only have to exist.
    """

    def __init__(
        self,
        *,
        files: dict[str, AsideFile],
        refused: AsideFile,
        split: Split,
        tally: Tally,
        store: ImageStore,
        verifier: ImageVerifier | None,
    ):
        self.files, self.refused = files, refused
        self.split, self.tally = split, tally
        self.store, self.verifier = store, verifier
        self._folders: dict[Path | None, ImageFolder] = {}
        self._names: dict[str, UniqueNames] = {}  # by source
        self._listings = Listings()  # shared, because listing a folder is slow and sources share folders

    def convert(self, source: SourceConfig, files: Sequence[Path]) -> None:
        """Convert every record in `files` of a source. Raises InputError if its files or settings cannot be used."""
        folder, read = self._folder_of(source), None
        names = self._names.setdefault(source.name, UniqueNames())
        chunks = stream_records(
            source.annotations,
            source.images,
            files=files,
            limit=source.limit,
            first_size=BATCH,
            size=BATCH if self.verifier else SMALL_BATCH,
        )
        # `disable=None` shows the bar only if stderr is a terminal.
        progress = tqdm(desc=printable(source.name), unit=" records", delay=2, leave=False, disable=None)
        with progress, _garbage_collection_paused():
            for file, first, items in chunks:
                if source.columns:
                    items = with_own_names(
                        items, source.columns, f'source "{source.name}": {file}', is_first=read is None
                    )
                read = read or reader_for(source, file, items)
                candidates = self._candidates(items, first=first, read=read, source=source, folder=folder)
                if self.verifier:
                    candidates = self._verified(candidates, self.verifier)
                self._write(candidates, source=source, file=file, names=names)
                progress.update(len(items))
        if read is None:
            raise InputError(
                f'source "{source.name}": {source.annotations} contains no records; give a file that does.'
            )

    @property
    def image_folders(self) -> dict[str, int | None]:
        """Each folder that was searched for an image -> its modification time (ns), or None if it does not exist."""
        return {path: time for folder in self._folders.values() for path, time in folder.modified.items()}

    def _folder_of(self, source: SourceConfig) -> ImageFolder:
        root = source.images or (source.annotations if source.annotations.is_dir() else None)
        if root not in self._folders:
            self._folders[root] = ImageFolder(root, source=source.name, store=self.store, listings=self._listings)
        return self._folders[root]

    def _candidates(
        self,
        items: list[Item],
        *,
        first: int,
        read: Callable[[dict, int], Draft],
        source: SourceConfig,
        folder: ImageFolder,
    ) -> list[_Candidate]:
        """Read and check the items, except for the content of their images and the split.

        first: how many records of the source come before this file.
        """
        candidates: list[_Candidate] = []
        qa_folder, find = self.files[TRAIN].folder, folder.find
        source_name, captions = source.name, source.captions
        for item in items:
            index, _, _, value = item
            try:
                if value.__class__ is not dict:
                    raise _not_an_object(value)
                name, paths, conversations, kind, repairs, is_valid = read(value, first + index)
                images = [find(paths[0])] if len(paths) == 1 else [find(path) for path in paths]
                wanted = name or str(first + index)
                obj = {
                    "id": f"{source_name}:{wanted}",
                    "image": _paths(images, qa_folder),
                    "conversations": conversations[0],
                    "source": source_name,
                }
                if not images:
                    del obj["image"]
                if kind:
                    obj["type"] = kind
                if not is_valid or kind or images[0].repair or not (obj["id"] + obj["image"]).isascii():
                    repairs = _checked(obj, images, repairs)
                objects = [obj] if len(conversations) == 1 else _with_captions(obj, conversations, captions)
                self.store.write_placed()
            except RecordError as error:
                self.store.forget_placed()
                candidates.append(_candidate((item, "", [], [], (), _without_traceback(error))))
            else:
                candidates.append(_candidate((item, wanted, images, objects, repairs, None)))
        return candidates

    def _verified(self, candidates: list[_Candidate], verifier: ImageVerifier) -> list[_Candidate]:
        """Add the digests of the images; refuse a record if one of its images cannot be decoded."""
        verdicts = iter(verifier.verify([image.real for one in candidates for image in one.images]))
        verified = []
        for one in candidates:
            pairs = [(image, next(verdicts)) for image in one.images]
            bad = next((pair for pair in pairs if pair[1].reason), None)
            if bad:
                image, verdict = bad
                error = RecordError(verdict.reason, f"{os.path.join(image.folder, image.name)}: {verdict.detail}")
                one = one._replace(images=[], objects=[], error=error)
            elif pairs:
                one = one._replace(images=[image._replace(digest=verdict.digest) for image, verdict in pairs])
            verified.append(one)
        return verified

    def _write(self, candidates: list[_Candidate], *, source: SourceConfig, file: Path, names: UniqueNames) -> None:
        """Write the candidates, in their order, to the file of their side or to the refused records."""
        # One buffer per side: each line of orjson keeps a buffer alive that is several times larger than the line.
        lines = {side: bytearray() for side in self.files}
        refused = []
        for item, wanted, images, objects, repairs, error in candidates:
            if error is None:
                # Without an image the id decides the side. Such a record is never refused, so its id is not wasted.
                unique = None if images else names.take(wanted)
                try:
                    side = self.split.side(source.split, images, unique and f"{source.name}:{unique}")
                except RecordError as caught:
                    error = _without_traceback(caught)
            if error is not None:
                refused.append(
                    Refusal(
                        source=source.name,
                        file=str(file),
                        line=item.line,
                        position=item.index,
                        id=_raw_id(item.value),
                        reason=error.reason,
                        detail=error.detail,
                    )
                )
                continue
            unique = unique or names.take(wanted)
            if unique != wanted:
                _rename(objects, f"{source.name}:{wanted}", f"{source.name}:{unique}")
            if side != TRAIN:
                self.split.hold_out(images)
                if images:
                    for obj in objects:
                        obj["image"] = _paths(images, self.files[side].folder)
            for obj in objects:
                lines[side] += orjson.dumps(obj, None, orjson.OPT_APPEND_NEWLINE)
            if repairs:
                self.tally.repairs.update(set(repairs))
        self.tally.keep(source.name, len(candidates) - len(refused))
        self.tally.refuse(refused)
        self.refused.write([refusal.to_line() for refusal in refused])
        for side, written in lines.items():
            self.files[side].write_terminated(written)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause the search for reference cycles, which takes a quarter of the time: records contain no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _without_traceback(error: RecordError) -> RecordError:
    """Drop the traceback: its frames reference the batch that holds the error, and the cycle collector is paused."""
    return RecordError(error.reason, error.detail)


def _not_an_object(value: object) -> RecordError:
    if isinstance(value, NotJson):
        return RecordError("not_json", value)
    return RecordError("wrong_type", f"a raw record is a JSON object, not {type(value).__name__}.")


def _paths(images: list[Found], qa_folder: str) -> str | list[str]:
    """The "image" of a record in a QA file in the folder `qa_folder`."""
    if len(images) == 1:
        folder, real_folder, name, *_ = images[0]
        return folder_from(qa_folder, folder, real_folder) + name
    return [folder_from(qa_folder, image.folder, image.real_folder) + image.name for image in images]


def _checked(obj: dict, images: list[Found], repairs: Sequence[str]) -> Sequence[str]:
    """Check `obj` as a QA record and repair its image marks if possible. Returns `repairs` and the rules used here.

    Raises RecordError if it cannot be a QA record.
    """
    for *_, repair, _ in images:
        if repair:
            repairs = [*repairs, repair]
    try:
        check_record(obj)
    except RecordError as error:
        repaired = repair_marks(obj["conversations"], len(images))
        if error.reason != "marks_and_pictures_disagree" or repaired is None:
            raise
        obj["conversations"] = repaired[0]
        check_record(obj)
        repairs = [*repairs, *repaired[1]]
    return repairs


def _with_captions(obj: dict, conversations: list, captions: str) -> list[dict]:
    """The QA records of an image with several captions, made from `obj`, which has the first one.

    The other conversations need no check of their own: the reader makes sure that only the captions differ.
    """
    if captions == "one_per_epoch":
        obj["alternatives"] = conversations[1:]
        return [obj]
    return [obj | {"id": f"{obj['id']}/{k}", "conversations": turns} for k, turns in enumerate(conversations, start=1)]


def _rename(objects: list[dict], old: str, new: str) -> None:
    for obj in objects:
        obj["id"] = new + obj["id"][len(old) :]


def _raw_id(value: object) -> str | int | None:
    """The id of a raw record, or the name of its image, so that a person can find the record."""
    if not isinstance(value, dict):
        return None
    for key in ("id", "image_id", "image", "picture", "text_file"):
        if isinstance(name := value.get(key), (str, int)):
            return name
    return value["image"].get("id") if isinstance(value.get("image"), dict) else None
