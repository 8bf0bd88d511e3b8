"""Augmentation: what each strength does, and that a view depends on what identifies it and on nothing else.

Run: python -m pytest tests/dataset/test_augment.py
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from config import AugmentConfig
from dataset import augment
from dataset.augment import Augmenter, View, border_colour
from dataset.batch import collate
from dataset.loader import QADataset, make_loader
from dataset.order import micro_batches, pack, packed_rows
from tests.dataset.test_loader import PAD, dataset_of, order_of, record, write_qa
from tests.toy_batches import are_same
from visual.images import read_image

ALL = AugmentConfig(crop=0.3, rotate=15, color=0.2, blur=1.0)
SIDE = 16
KEYS = [(epoch, record) for epoch in range(4) for record in range(25)]


def noise(seed: int = 0, width: int = 48, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def views_of(image: Image.Image, count: int = 100, side: int = SIDE, **strengths) -> list[Image.Image]:
    augmenter = Augmenter(AugmentConfig(**strengths), 0, side)
    return [augmenter.view(key, 0)(image) for key in KEYS[:count]]


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode == "RGB" and a.tobytes() == b.tobytes()


# --- the strengths


def test_no_strength_changes_nothing():
    image = noise()
    assert all(same(image, view) for view in views_of(image, 5))


def test_crop_is_the_largest_fraction_of_the_area_that_is_cut_away():
    """Pixels say where they come from: red is the column, green the row."""
    rows, columns = np.mgrid[:200, :250]
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    removed, corners = [], set()
    for view in views_of(image, side=200, crop=0.3):
        pixels = np.asarray(view)
        left, top = map(int, pixels[0, 0, :2])
        assert np.array_equal(pixels, np.asarray(image)[top : top + view.height, left : left + view.width])
        assert view.width / view.height == pytest.approx(1.25, rel=0.02)
        removed.append(1 - view.width * view.height / (200 * 250))
        corners.add((left > (250 - view.width) / 2, top > (200 - view.height) / 2))
    assert 0 <= min(removed) < 0.02 and 0.28 < max(removed) < 0.31 and np.mean(removed) == pytest.approx(0.15, abs=0.03)
    assert len(corners) == 4, "the kept part is anywhere"


def test_rotate_is_the_largest_angle_and_corners_get_the_colour_of_the_border():
    """The angle is that of a bar that lies flat, by its axis."""
    drawing = np.full((101, 101, 3), (250, 240, 230), np.uint8)
    drawing[48:53, 20:81] = (0, 0, 200)
    image, angles = Image.fromarray(drawing), []
    assert border_colour(image) == (250, 240, 230)
    for view in views_of(image, side=101, rotate=15):
        pixels = np.asarray(view)
        rows, columns = np.nonzero(pixels[..., 0] < 128)
        angles.append(np.degrees(np.arctan(np.polyfit(columns, -rows.astype(float), 1)[0])))
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (np.abs(corners.astype(int) - (250, 240, 230)) <= 1).all()
    assert -15.5 < min(angles) < -13 and 13 < max(angles) < 15.5 and abs(np.mean(angles)) < 2.5


def test_color_is_the_largest_relative_change_of_brightness_contrast_and_saturation():
    """Of a plain grey image only the brightness changes. Spread divided by the mean does not depend on the brightness."""
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    levels = [np.asarray(view).mean() for view in views_of(grey, color=0.2)]
    assert 79 < min(levels) < 83 and 117 < max(levels) < 121
    image = Image.fromarray(np.repeat(np.array([[[60, 60, 60], [140, 140, 140]]], np.uint8), 4, 0))
    contrasts = [np.ptp(np.asarray(view)[..., 0]) / np.asarray(view).mean() for view in views_of(image, color=0.2)]
    assert 0.8 * 0.79 < min(contrasts) < 0.8 * 0.85 and 0.8 * 1.15 < max(contrasts) < 0.8 * 1.21
    colour = Image.new("RGB", (8, 8), (140, 100, 100))
    spreads = [np.ptp(np.asarray(view)[0, 0]) / np.asarray(view)[0, 0, 1] for view in views_of(colour, color=0.2)]
    assert min(spreads) < 0.4 * 0.85 and max(spreads) > 0.4 * 1.15


@pytest.mark.parametrize("scale", [1, 3])
def test_blur_is_a_radius_in_pixels_of_the_encoders_input(scale):
    """An edge of an image three times as large is three times as wide, so the encoder sees the same."""
    pixels = np.zeros((64 * scale, 64 * scale, 3), np.uint8)
    pixels[:, 32 * scale :] = 255
    widths = []
    for view in views_of(Image.fromarray(pixels), 40, side=64, blur=2.0):
        steps = np.diff(np.asarray(view)[0, :, 0].astype(float))
        at = np.arange(len(steps))
        centre = (at * steps).sum() / steps.sum()
        widths.append(np.sqrt(((at - centre) ** 2 * steps).sum() / steps.sum()) / scale)
    assert min(widths) < 0.5 and 1.8 < max(widths) < 2.2


def test_a_large_image_is_reduced_to_what_the_encoder_can_see():
    views = views_of(noise(width=600, height=400), 10, crop=0.3, rotate=15, color=0.2, blur=1.0)
    assert all(SIDE <= min(view.size) <= 4 * SIDE for view in views)
    assert all(min(view.size) == 2 * SIDE for view in views_of(noise(width=6 * SIDE, height=4 * SIDE), 3, rotate=1))


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (2, 3)])
def test_the_smallest_images_have_views(size):
    strong = {"crop": 0.9, "rotate": 180, "color": 0.9, "blur": 32}
    for view in views_of(noise(0, *size), 20, **strong):
        assert view.mode == "RGB" and 1 <= view.width <= size[0] and 1 <= view.height <= size[1]


# --- what a view depends on


def test_a_new_view_is_a_function_of_seed_epoch_record_and_place():
    image, seen = noise(), {}
    for seed in range(2):
        for key in KEYS[:30]:
            for place in range(2):
                seen[seed, key, place] = Augmenter(ALL, seed, SIDE).view(key, place)(image).tobytes()
    assert len(set(seen.values())) == len(seen), "no two are equal"
    np.random.seed(1), torch.manual_seed(1)
    for (seed, (epoch, number), place), pixels in reversed(seen.items()):
        key = np.int64(epoch), np.int64(number)
        assert Augmenter(ALL, seed, SIDE).view(key, place)(image).tobytes() == pixels


def test_epochs_take_the_fixed_views_of_a_record_in_turn():
    augmenter, image = Augmenter(dataclasses.replace(ALL, views=5), 3, SIDE), noise()
    firsts = []
    for number in range(30):
        views = [augmenter.view((epoch, number), 0) for epoch in range(10)]
        numbers = [view.identity[0] for view in views]
        assert sorted(numbers[:5]) == list(range(5)) and numbers[5:] == numbers[:5]
        assert all((b - a) % 5 == 1 for a, b in zip(numbers, numbers[1:], strict=False))
        firsts.append(numbers[0])
    assert set(firsts) == set(range(5)), "records do not start at the same view"
    assert len({view(image).tobytes() for view in views}) == 5
    assert len({augmenter.view((0, 0), place).identity for place in range(30)}) == 5


def test_a_fixed_view_is_a_function_of_seed_image_and_number():
    settings = dataclasses.replace(ALL, views=4)

    def pixels(image: Image.Image, number: int, seed: int = 0) -> bytes:
        return View(Augmenter(settings, seed, SIDE), (number,))(image).tobytes()

    cases = [(image, number, seed) for image in (0, 1) for number in range(4) for seed in (0, 1)]
    assert len({pixels(noise(image), number, seed) for image, number, seed in cases}) == len(cases)
    settings = dataclasses.replace(ALL, views=64)
    assert pixels(noise(), 2) == View(Augmenter(dataclasses.replace(ALL, views=4), 0, SIDE), (2,))(noise()).tobytes()
    # images do not share their crops and angles
    flat = [View(Augmenter(settings, 0, SIDE), (0,))(Image.new("RGB", (40, 40 + i))).size[0] for i in range(20)]
    assert len(set(flat)) > 3


def test_the_key_of_a_view_has_everything_that_its_pixels_depend_on(monkeypatch):
    settings = dataclasses.replace(ALL, views=4)

    def key(seed: int = 0, side: int = SIDE, number: int = 1, **changes) -> bytes:
        return View(Augmenter(dataclasses.replace(settings, **changes), seed, side), (number,)).key

    others = [key(seed=1), key(side=32), key(number=2), key(crop=0.2), key(rotate=10), key(color=0.1), key(blur=0.5)]
    monkeypatch.setattr(augment, "RULES", augment.RULES + 1)
    others.append(key())
    monkeypatch.undo()
    assert len({key(), *others}) == len(others) + 1
    assert key() == key(views=64) == key(rotate=15.0), "how many views there are does not change a view"
    fields = {field.name for field in dataclasses.fields(AugmentConfig)}
    assert fields == {*settings.strengths, "views"}, "a new strength must be part of the key"


def test_stored_features_of_views_stay_valid():
    """If this fails, keys or pixels of views have changed: increase RULES, then update these values."""
    view = View(Augmenter(dataclasses.replace(ALL, views=4), 0, SIDE), (1,))
    assert view.key.hex() == "9431f946801d5c97ec7939ada91969f5"
    assert view(Image.new("RGB", (400, 300), "red")).size == (47, 35)


# --- samples


class ReadPixels:
    """Reads an image file, or a view of it, as pixels. A class, so that workers can unpickle it."""

    def __call__(self, path, view=None):
        image = read_image(path)
        resized = (image if view is None else view(image)).resize((SIDE, SIDE))
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()


def image_dataset(folder, settings: AugmentConfig | None = ALL, **options) -> QADataset:
    """Return a dataset of five records, one of them with three images, the first and the last the same."""
    for i in range(1, 5):
        noise(i).save(folder / f"{i}.png")
    rows = [
        record("a", [1]),
        record("text", []),
        record("three", [2, 3, 2], "longer"),
        record("b", [4]),
        record("c", [1]),
    ]
    dataset = dataset_of(write_qa(folder, rows), **options)
    dataset.read_pixels = ReadPixels()
    dataset.augmenter = None if settings is None else Augmenter(settings, dataset.seed, SIDE)
    return dataset


@pytest.mark.parametrize("views", [None, 3])
def test_samples_do_not_depend_on_workers_batches_packing_or_where_a_run_starts(tmp_path, views):
    """They are the samples that are read one by one, in another process and order."""
    dataset, order = image_dataset(tmp_path, dataclasses.replace(ALL, views=views)), order_of([1] * 5)
    alone = {key: dataset[key] for key in reversed([order.at(position) for position in range(18)])}

    def check(batches: list, expected: list[list], **options) -> None:
        found = list(make_loader(dataset, iter(batches), PAD, **options))
        packed = options.get("packed", False)
        assert are_same(found, [collate([alone[key] for key in keys], PAD, packed) for keys in expected])

    for workers in (0, 1, 2):
        for size, accumulation in ((6, 1), (2, 3)):
            batches = list(micro_batches(order, range(3), batch_size=size, accumulation=accumulation))
            check(batches, batches, num_workers=workers)
        resumed = list(micro_batches(order, range(2, 3), batch_size=2, accumulation=3))
        check(resumed, batches[-3:], num_workers=workers)
        rows = list(packed_rows(order, range(3), samples_per_step=6, rows=2))
        lengths = [[len(alone[key].input_ids) for key in row.keys] for row in rows]
        members = [[row.keys[i] for i in pack(sizes, 2)[row.row]] for row, sizes in zip(rows, lengths, strict=True)]
        check(rows, members, num_workers=workers, packed=True)


def test_epochs_and_records_and_places_have_different_views_of_an_image(tmp_path):
    dataset = image_dataset(tmp_path)
    of_image_1 = [dataset[epoch, index].pixel_values[0] for epoch in range(3) for index in (0, 4)]
    first, _, third = dataset[0, 2].pixel_values
    images = [*of_image_1, first, third]
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_a_replacement_has_its_own_view(tmp_path):
    dataset = image_dataset(tmp_path, skip_bad_images=True)
    (tmp_path / "4.png").unlink()
    taken = {record.id: i for i, record in enumerate(dataset.qa[i] for i in range(5))}
    for epoch in range(8):
        replaced = dataset[epoch, 3]
        assert replaced.replaced and are_same(
            [dataclasses.replace(replaced, replaced=None)], [dataset[epoch, taken[replaced.id]]]
        )


def test_without_augmentation_samples_have_the_old_pixels(tmp_path):
    off = image_dataset(tmp_path, None)
    off.read_pixels = lambda path: ReadPixels()(path)  # knows no views
    dataset = copy.copy(off)
    dataset.read_pixels, dataset.augmenter = ReadPixels(), Augmenter(ALL, 0, SIDE)
    plain = dataset.without_augmentation()
    for key in ((0, 2), (3, 0)):
        assert are_same([plain[key]], [off[key]]) and not are_same([dataset[key]], [off[key]])
    resized = np.asarray(Image.open(tmp_path / "1.png").resize((SIDE, SIDE)))
    assert np.array_equal(plain[0, 0].pixel_values[0].permute(1, 2, 0).numpy(), resized)
    assert dataset.augmenter is not None
