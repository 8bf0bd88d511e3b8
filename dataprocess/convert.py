"""One source's raw records -> QA records, each kept on a side of the split or refused with a reason."""

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

from config import InputError, SourceConfig
from dataprocess.containers import stream_records
from dataprocess.detect import reader_for
from dataprocess.images import Found, ImageFolder, Listings, PictureStore, folder_from
from dataprocess.marks import repair_marks
from dataprocess.outputs import AsideFile, UniqueNames
from dataprocess.readers import Draft
from dataprocess.report import Refusal, Tally
from dataprocess.split import TRAIN, Split
from dataprocess.verify import ImageVerifier
from dataset.json_stream import Item, NotJson
from dataset.record import RecordError, check_record

BATCH = 512  # records whose images are verified together, and by the first of which a format is told
SMALL_BATCH = 64  # where no image is verified: so few stay in the CPU's cache until they are written


class _Candidate(NamedTuple):
    """A raw record on its way: what will be written of it, or why nothing will."""

    item: Item
    wanted: str  # its id within the source
    images: list[Found]
    objects: list[dict]  # QA records as JSON objects, with image paths as the training file needs them
    repairs: Sequence[str]
    error: RecordError | None


_candidate = partial(tuple.__new__, _Candidate)  # from a tuple of the six, at half the price


class Sorter:
    """Reads sources into `files`, one for each side, and what cannot be kept into `refused`.

    verifier: decodes the images of every record that is good otherwise; None: it is enough that they exist.
    """

    def __init__(
        self,
        files: dict[str, AsideFile],
        refused: AsideFile,
        split: Split,
        tally: Tally,
        store: PictureStore,
        verifier: ImageVerifier | None,
    ):
        self._files, self._refused, self._tally = files, refused, tally
        self._split, self._store, self._verifier = split, store, verifier
        self._folders: dict[Path | None, ImageFolder] = {}
        self._listings = Listings()  # takes time, and sources share folders

    def read(self, source: SourceConfig) -> None:
        """Sort every record of a source. Raises InputError where its files or its settings cannot be used."""
        folder, names, read = self._folder_of(source), UniqueNames(), None
        progress = tqdm(desc=source.name, unit=" records", delay=2, leave=False, disable=None)  # on a terminal's stderr
        with progress, _no_cycles():
            size = BATCH if self._verifier else SMALL_BATCH
            for file, first, items in stream_records(source.annotations, source.images, source.limit, BATCH, size):
                read = read or reader_for(source, file, items)
                candidates = self._candidates(items, first, read, source, folder)
                if self._verifier:
                    candidates = self._verified(candidates)
                self._sort(candidates, source, file, names)
                progress.update(len(items))
        if read is None:
            raise InputError(f'source "{source.name}": {source.annotations} holds no record; give a file that does.')

    @property
    def image_folders(self) -> dict[str, int | None]:
        """Each folder in which an image was looked for -> its modification time."""
        return {path: time for folder in self._folders.values() for path, time in folder.modified.items()}

    def _folder_of(self, source: SourceConfig) -> ImageFolder:
        root = source.images or (source.annotations if source.annotations.is_dir() else None)
        if root not in self._folders:
            self._folders[root] = ImageFolder(root, source.name, self._store, self._listings)
        return self._folders[root]

    def _candidates(
        self,
        items: list[Item],
        first: int,
        read: Callable[[dict, int], Draft],
        source: SourceConfig,
        folder: ImageFolder,
    ) -> list[_Candidate]:
        """What the items are, apart from their images' content and the split. `first`: the number of the file's first."""
        candidates, qa_folder, find = [], self._files[TRAIN].folder, folder.find
        source_name, captions = source.name, source.captions
        for item in items:
            index, _, _, value = item
            try:
                if value.__class__ is not dict:
                    raise _no_object(value)
                name, pictures, conversations, kind, repairs = read(value, first + index)
                images = [find(pictures[0])] if len(pictures) == 1 else [find(picture) for picture in pictures]
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
                repairs = _checked(obj, images, repairs)
                objects = [obj] if len(conversations) == 1 else _with_captions(obj, conversations, captions)
                self._store.write_placed()
            except RecordError as error:
                self._store.forget_placed()
                candidates.append(_candidate((item, "", [], [], (), _bare(error))))
            else:
                candidates.append(_candidate((item, wanted, images, objects, repairs, None)))
        return candidates

    def _verified(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """The candidates with their images' digests; an image that cannot be decoded refuses its record."""
        verdicts = iter(self._verifier.verify([image.real for one in candidates for image in one.images]))
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

    def _sort(self, candidates: list[_Candidate], source: SourceConfig, file: Path, names: UniqueNames) -> None:
        """Write the candidates, in their order, to the side where each belongs, or to the refused ones."""
        # One buffer a side: a line by itself keeps the several times larger memory in which orjson wrote it.
        lines = {side: bytearray() for side in self._files}
        refused = []
        for item, wanted, images, objects, repairs, error in candidates:
            if error is None:
                unique = None if images else names.take(wanted)  # without an image the id decides; it is never refused
                try:
                    side = self._split.side(source.split, images, unique and f"{source.name}:{unique}")
                except RecordError as caught:
                    error = _bare(caught)
            if error is not None:
                place = (item.line, item.index, _raw_id(item.value))
                refused.append(Refusal(source.name, str(file), *place, error.reason, error.detail))
                continue
            unique = unique or names.take(wanted)
            if unique != wanted:
                _rename(objects, f"{source.name}:{wanted}", f"{source.name}:{unique}")
            if side != TRAIN:
                self._split.hold_out(images)
                if images:
                    for obj in objects:
                        obj["image"] = _paths(images, self._files[side].folder)
            for obj in objects:
                lines[side] += orjson.dumps(obj, None, orjson.OPT_APPEND_NEWLINE)
            if repairs:
                self._tally.repairs.update(set(repairs))
        self._tally.keep(source.name, len(candidates) - len(refused))
        self._tally.refuse(refused)
        self._refused.write([refusal.to_line() for refusal in refused])
        for side, written in lines.items():
            self._files[side].write_ended(written)


@contextmanager
def _no_cycles() -> Iterator[None]:
    """Without the search for objects that refer to each other in a circle, which takes a fourth of the time: records, of
    which there are thousands at a time, never do."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _bare(error: RecordError) -> RecordError:
    """Without the traceback, whose frames hold this batch, the error among it: a circle, and nobody looks for those."""
    return RecordError(error.reason, error.detail)


def _no_object(value: object) -> RecordError:
    if isinstance(value, NotJson):
        return RecordError("not_json", value)
    return RecordError("wrong_type", f"a raw record is a JSON object, not {type(value).__name__}.")


def _paths(images: list[Found], qa_folder: str) -> str | list[str]:
    """The "image" of a record in a QA file of that folder."""
    if len(images) == 1:
        folder, real_folder, name, *_ = images[0]
        return folder_from(qa_folder, folder, real_folder) + name
    return [folder_from(qa_folder, image.folder, image.real_folder) + image.name for image in images]


def _checked(obj: dict, images: list[Found], repairs: Sequence[str]) -> Sequence[str]:
    """The repairs that were needed to make a QA record of `obj`: `repairs` and more. RecordError where it cannot be one."""
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
    """The QA records of a picture with several captions, from the one for the first. The reader has seen to the rest: they
    differ in the caption alone."""
    if captions == "one_per_epoch":
        obj["alternatives"] = conversations[1:]
        return [obj]
    return [obj | {"id": f"{obj['id']}/{k}", "conversations": turns} for k, turns in enumerate(conversations, start=1)]


def _rename(objects: list[dict], old: str, new: str) -> None:
    for obj in objects:
        obj["id"] = new + obj["id"][len(old) :]


def _raw_id(value: object) -> str | int | None:
    """The id of a raw record, or what names its picture: for a person to find it by."""
    if not isinstance(value, dict):
        return None
    for key in ("id", "image_id", "image", "picture", "text_file"):
        if isinstance(name := value.get(key), (str, int)):
            return name
    return value["image"].get("id") if isinstance(value.get("image"), dict) else None
