"""The workload of `benchmarks.data`: raw annotations as LLaVA and AI Challenger publish them, their images, a QA file.

Everything is made from a seed. The images are empty: no measurement opens them, except for those of `write_small_images`,
which are in files, in a zip and in a tar. Imports only the standard library.
"""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

SEED = 1
MISSING_EVERY = 1000  # one record of so many names an image that does not exist, as in every real collection


class Source(NamedTuple):
    """A file of raw annotations and the folder of its images."""

    name: str
    share: int  # raw records, of 418,000
    pairs: tuple[int, int]  # of a question and an answer; fewest and most
    sentences: tuple[int, int]  # in an answer

    def annotations(self, folder: Path) -> Path:
        return folder / "raw" / f"{self.name}.json"

    def images(self, folder: Path) -> Path:
        return folder / "images" / (self.name if self.name in ("mix", "captions") else "train2017")


SOURCES = (
    Source("detail", 23_000, (1, 1), (6, 10)),
    Source("reasoning", 77_000, (1, 1), (7, 13)),
    Source("conversation", 58_000, (2, 6), (1, 3)),
    Source("mix", 50_000, (1, 7), (1, 3)),
    Source("captions", 210_000, (5, 5), (1, 1)),
)
# Places of the same small images, below the folder of the workload.
IMAGE_PLACES = {"files": "small/train", "zip": "small/train.zip", "tar": "small/train.tar"}
ALL_RECORDS = sum(source.share for source in SOURCES)
MIX_FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K")
TEXT_ONLY = 0.06  # of the mix
WORDS = (
    "a the this one two several red blue green wooden small large old café naïve dog cat man woman child bench table "
    "street river boat kitchen window bicycle ball hat umbrella sign train plate stands sits runs holds watches carries "
    'near under behind beside and with while because suggests perhaps clearly towards "stop" people\'s'
).split()
PLAIN_WORDS = [word for word in WORDS if word.isascii() and word.isalpha()]
CHINESE = (
    ("一个穿着红色衣服的女人", "两个戴着帽子的男人", "一群孩子", "一只棕色的狗", "球场上一个运动员"),
    ("在河边的长椅上", "在宽阔的马路上", "在明亮的房间里", "在绿油油的草地上", "在人来人往的商场里"),
    ("看着远处", "拿着一把雨伞", "开心地笑着", "跑向他的朋友", "和旁边的人说话"),
)


def write_annotations(folder: Path, records: int, qa_records: int) -> None:
    """Write raw annotations with their images and a QA file, unless `folder` holds them already."""
    stamp = folder / "workload.json"
    wanted = json.dumps({"version": 1, "records": records, "qa_records": qa_records})
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    chance = random.Random(SEED)
    sentences = [" ".join(chance.choices(WORDS, k=chance.randint(6, 16))).capitalize() + ". " for _ in range(4096)]
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        count = max(1, source.share * records // ALL_RECORDS)
        images = [_image_name(source.name, i) for i in range(count)]
        for image in images:
            path = source.images(folder) / image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if source.name == "captions":
            rows = [_caption_row(chance, i, name) for i, name in enumerate(images)]
        else:
            rows = [_llava_row(chance, source, i, chance.choice(images), sentences) for i in range(count)]
        for row in rows[MISSING_EVERY // 2 :: MISSING_EVERY]:
            row["image_id" if "image_id" in row else "image"] = "not_there.jpg"
        indent = None if source.name == "captions" else 2  # as published
        source.annotations(folder).write_text(json.dumps(rows, indent=indent))
    with open(folder / "qa.jsonl", "w", encoding="utf-8") as file:
        for i in range(qa_records):
            file.write(json.dumps(_qa_record(chance, i, sentences), ensure_ascii=False) + "\n")
    stamp.write_text(wanted)


def _image_name(source: str, number: int) -> str:
    if source == "captions":
        return f"{number * 2_654_435_761 % 2**64:040x}.jpg"
    if source == "mix":
        return f"{MIX_FOLDERS[number % len(MIX_FOLDERS)]}/{number:012d}.jpg"
    return f"{number * 7:012d}.jpg"


def _llava_row(chance: random.Random, source: Source, number: int, image: str, sentences: list[str]) -> dict:
    turns = []
    for _ in range(chance.randint(*source.pairs)):
        turns.append({"from": "human", "value": chance.choice(sentences)[:-2] + "?"})
        turns.append({"from": "gpt", "value": "".join(chance.choices(sentences, k=chance.randint(*source.sentences)))})
    if source.name == "mix" and chance.random() < TEXT_ONLY:
        return {"id": f"text_{number}", "conversations": turns}
    question = turns[0]["value"]
    turns[0]["value"] = question + "\n<image>" if source.name == "detail" else "<image>\n" + question
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def _caption_row(chance: random.Random, number: int, image: str) -> dict:
    captions = ["".join(map(chance.choice, CHINESE)) for _ in range(5)]
    return {"url": f"http://pictures.example/{number:08d}.jpg", "image_id": image, "caption": captions}


def _qa_record(chance: random.Random, number: int, sentences: list[str]) -> dict:
    turns = []
    for _ in range(chance.randint(1, 3)):
        turns.append({"role": "user", "content": chance.choice(sentences)})
        turns.append({"role": "assistant", "content": "".join(chance.choices(sentences, k=chance.randint(1, 3)))})
    turns[0]["content"] = "<image>\n" + turns[0]["content"]
    source = SOURCES[number % len(SOURCES)].name
    return {"id": f"{source}:{number}", "image": f"images/{number:012d}.jpg", "conversations": turns, "source": source}


def write_small_images(folder: Path, count: int) -> None:
    """Write PNGs of 32 x 32 pixels and a few hundred bytes to each of IMAGE_PLACES, with a question about each, unless
    `folder` holds them already."""
    stamp, wanted = folder / "small.json", json.dumps({"version": 1, "images": count})
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    chance = random.Random(SEED)
    files = folder / IMAGE_PLACES["files"]
    files.mkdir(parents=True, exist_ok=True)
    with (
        zipfile.ZipFile(folder / IMAGE_PLACES["zip"], "w") as archive,
        tarfile.open(folder / IMAGE_PLACES["tar"], "w") as tape,
        open(folder / "small.jsonl", "w", encoding="utf-8") as questions,
    ):
        for i in range(count):
            name, data = _small_name(i), _small_image(chance)
            (files / name).write_bytes(data)
            archive.writestr(f"train/{name}", data)
            member = tarfile.TarInfo(f"train/{name}")
            member.size = len(data)
            tape.addfile(member, io.BytesIO(data))
            tape.getmembers().clear()  # it would keep an object of each
            row = {"image": name, "question": "Which colours?", "answer": f"Those of {i}."}
            questions.write(json.dumps(row) + "\n")
    stamp.write_text(wanted)


def small_image_paths(folder: Path, kind: str, count: int) -> list[str]:
    """Return the paths of the small images in one of IMAGE_PLACES."""
    place = f"{folder / IMAGE_PLACES[kind]}/" + ("" if kind == "files" else "train/")
    return [place + _small_name(i) for i in range(count)]


def _small_name(number: int) -> str:
    return f"{number * 7:012d}.png"


def _small_image(chance: random.Random, side: int = 32, tile: int = 4) -> bytes:
    """An image of tiles in random colours, as PNG."""
    rows = bytearray()
    for _ in range(side // tile):
        line = b"\0" + b"".join(chance.randbytes(3) * tile for _ in range(side // tile))
        rows += line * tile
    head = struct.pack(">LLBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data)) for kind, data in chunks
    )
