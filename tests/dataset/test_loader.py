"""Which sample comes when, and how samples become batches. Run: python -m pytest tests/test_loader.py"""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import IGNORE_INDEX, InputError
from dataset.conversation import ChatFormat
from dataset.loader import (REPLACEMENTS, QADataset, make_loader, split_batch)
from dataset.batch import collate
from dataset.order import SampleOrder, micro_batches
from dataset.qa_file import QAFile
from visual.images import ImageError

PAD = 999


def order_of(weights, seed=0, kept=None) -> SampleOrder:
    return SampleOrder(np.arange(len(weights)) if kept is None else kept, seed, np.array(weights, dtype=float))


def epoch_of(order: SampleOrder, epoch: int) -> list[int]:
    samples = [order.at(epoch * order.epoch_length + i) for i in range(order.epoch_length)]
    assert {number for number, _ in samples} == {epoch}
    return [record for _, record in samples]


# --- the order of samples


def test_the_order_is_a_function_of_seed_epoch_and_position():
    whole = [order_of([1] * 10).at(i) for i in range(40)]
    backwards = order_of([1] * 10)
    assert [backwards.at(i) for i in reversed(range(40))] == whole[::-1]  # whatever was asked before
    assert order_of([1] * 10).at(23) == whole[23]
    np.random.seed(1)
    assert [order_of([1] * 10).at(i) for i in range(40)] == whole
    assert [order_of([1] * 10, seed=1).at(i) for i in range(40)] != whole
    assert len({tuple(epoch_of(order_of([1] * 10), epoch)) for epoch in range(4)}) == 4


@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=30), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_an_epoch_holds_every_kept_record_once(kept, seed, epoch):
    kept = sorted(kept)
    order = order_of([1] * len(kept), seed, kept)
    assert sorted(epoch_of(order, epoch)) == kept


def test_weights_say_how_often_a_record_comes_in_an_epoch():
    weights = [0.5] * 8 + [2] * 3 + [2.5] * 4 + [0] * 5 + [1]
    order = order_of(weights)
    assert order.epoch_length == 4 + 6 + 10 + 0 + 1
    halves = []
    for epoch in range(12):
        count = Counter(epoch_of(order, epoch))
        assert sorted(count[i] for i in range(8)) == [0] * 4 + [1] * 4
        assert [count[i] for i in range(8, 11)] == [2] * 3
        assert sorted(count[i] for i in range(11, 15)) == [2, 2, 3, 3]
        assert [count[i] for i in range(15, 21)] == [0] * 5 + [1]
        halves.append(frozenset(i for i in range(8) if count[i]))
    assert len(set(halves)) > 6 and set(chain(*halves)) == set(range(8))  # another half each time, and all in the end


def test_an_epoch_with_a_limit_goes_on_where_the_one_before_ended():
    whole, short = SampleOrder(np.arange(50), 3, np.ones(50)), SampleOrder(np.arange(50), 3, np.ones(50), limit=20)
    assert short.epoch_length == 20 and SampleOrder(np.arange(50), 3, np.ones(50), limit=80).epoch_length == 50
    assert [short.at(i) for i in range(200)] == [whole.at(i) for i in range(200)]
    epochs = [{short.at(20 * epoch + i)[1] for i in range(20)} for epoch in range(2)]
    assert len(epochs[0] | epochs[1]) == 40, "nothing twice before all was taken once"


def test_a_small_source_with_a_small_weight_is_not_lost():
    order = order_of([0.1, 0.1, 0.1, 1, 1])
    assert order.epoch_length == 3
    assert set(chain(*(epoch_of(order, epoch) for epoch in range(30)))) == set(range(5))


def test_nothing_to_take_is_an_input_error():
    with pytest.raises(InputError, match="weight"):
        order_of([0, 0])


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 4), st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)]), st.integers(0, 5)
)
def test_a_step_takes_the_same_samples_whoever_computes_them(records, size, shape, start):
    accumulation, world = shape
    order, steps = order_of([1] * records, seed=3), range(start, start + 3)
    samples = size * accumulation
    by_rank = [list(micro_batches(order, steps, size, accumulation, rank, world)) for rank in range(world)]
    for i, step in enumerate(steps):
        each = accumulation // world
        dealt = [by_rank[micro % world][i * each + micro // world] for micro in range(accumulation)]
        assert list(chain(*dealt)) == [order.at(step * samples + j) for j in range(samples)]
    one = list(chain(*micro_batches(order, steps, samples, 1, 0, 1)))
    assert sorted(chain(*chain(*by_rank))) == sorted(one)


def test_starting_in_the_middle_gives_the_tail_of_the_whole():
    whole = list(micro_batches(order_of([1, 2, 0.5, 1, 1]), range(9), 2, 4, 1, 2))
    assert list(micro_batches(order_of([1, 2, 0.5, 1, 1]), range(5, 9), 2, 4, 1, 2)) == whole[5 * 2 :]


# --- batches


class Pixels:
    """Reads "7.png" as an image of sevens; "gone.png" is missing. (A class: it must reach the workers.)"""

    def __call__(self, path):
        if path.stem == "gone":
            raise ImageError(f"{path}: no such file.")
        return torch.full((3, 2, 2), float(path.stem))


def write_qa(folder, records) -> QAFile:
    path = folder / "qa.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return QAFile(path)


def record(name: str, images: list, answer: str = "yes", **more) -> dict:
    talk = [{"role": "user", "content": "<image>" * len(images) + "Q"}, {"role": "assistant", "content": answer}]
    return {"id": name, "image": [f"{i}.png" for i in images], "conversations": talk, **more}


def dataset_of(qa: QAFile, max_length=None, seed=0, **options) -> QADataset:
    chat = ChatFormat(lambda text: list(text.encode()), 256, 257, 259, 258, 2, None)
    return QADataset(qa, chat, Pixels(), max_length, seed, **options)


MIXED = [
    record("one", [1]), record("text", [], "a longer answer"), record("three", [2, 3, 2]), record("more text", []),
    record("last", [4], "no"),
]  # fmt: skip


def load(dataset: QADataset, batches, num_workers=0) -> list[dict]:
    return list(make_loader(dataset, iter(batches), PAD, num_workers, False))


def same(a: list[dict], b: list[dict]) -> bool:
    def equal(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x) for x, y in zip(a, b, strict=True)
    )


def test_a_batch_is_padded_on_the_right_and_says_so(tmp_path):
    dataset = dataset_of(write_qa(tmp_path, MIXED))
    (batch,) = load(dataset, [[(0, i) for i in range(5)]])
    assert batch.ids == ["one", "text", "three", "more text", "last"]
    samples = [dataset[0, i] for i in range(5)]
    longest = max(len(sample.input_ids) for sample in samples)
    for name, padding in (("input_ids", PAD), ("labels", IGNORE_INDEX)):
        expected = [sample[name].tolist() + [padding] * (longest - len(sample[name])) for sample in samples]
        assert batch[name].tolist() == expected and batch[name].dtype == torch.long
    assert batch.attention_mask.tolist() == [[int(i != PAD) for i in row] for row in batch.input_ids.tolist()]


def test_every_image_stands_at_its_own_row_whatever_rows_surround_it(tmp_path):
    """Rows without an image or with several must not shift the others': the image tokens in reading order and the images
    are two lists of the same length that belong together."""
    dataset = dataset_of(write_qa(tmp_path, MIXED))
    images = {"one": [1], "text": [], "three": [2, 3, 2], "more text": [], "last": [4]}
    for rows in ([0, 1, 2, 3, 4], [1, 4, 3, 2, 0], [3, 0], [2], [4, 1]):
        (batch,) = load(dataset, [[(0, i) for i in rows]])
        per_row = ((batch.input_ids == 258).sum(1) // 2).tolist()
        assert per_row == [len(images[name]) for name in batch.ids]
        expected = [i for name in batch.ids for i in images[name]]
        assert batch.pixel_values.shape == (len(expected), 3, 2, 2)
        assert batch.pixel_values[:, 0, 0, 0].tolist() == expected


def test_a_batch_of_text_has_no_pixels(tmp_path):
    (batch,) = load(dataset_of(write_qa(tmp_path, MIXED)), [[(0, 1), (0, 3)]])
    assert batch.pixel_values is None
    assert collate([dataset_of(QAFile(tmp_path / "qa.jsonl"))[0, 1]], PAD)["input_ids"].shape[0] == 1


def test_batches_do_not_depend_on_workers_and_leave_the_global_generator_alone(tmp_path):
    dataset = dataset_of(write_qa(tmp_path, MIXED))
    batches = list(micro_batches(order_of([1] * 5), range(4), 2, 2, 0, 1))
    before = torch.get_rng_state()
    runs = [load(dataset, batches, num_workers) for num_workers in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(run) for run in runs] == [8, 8, 8] and same(runs[0], runs[1]) and same(runs[0], runs[2])
    names = [record["id"] for record in MIXED]
    assert [batch.ids for batch in runs[2]] == [[names[i] for _, i in batch] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_is_missing_stops_the_run_with_the_records_id(tmp_path, num_workers):
    dataset = dataset_of(write_qa(tmp_path, [record("good", [1]), record("bad", ["gone"])]))
    loader = make_loader(dataset, [[(0, 0)], [(0, 1)]], PAD, num_workers, False)
    assert next(loader)["ids"] == ["good"]
    with pytest.raises(InputError) as caught:
        next(loader)
    qa, image = tmp_path / "qa.jsonl", tmp_path / "gone.png"
    advice = " With data.on_bad_image=skip another record takes its place."
    assert str(caught.value) == f'{qa} ("bad"): {image}: no such file.{advice}'  # and no traceback of a worker


def test_the_epoch_chooses_among_alternatives(tmp_path):
    talks = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}] for answer in "abc"]
    dataset = dataset_of(write_qa(tmp_path, [{"id": "r", "conversations": talks[0], "alternatives": talks[1:]}]))
    answers = [dataset[epoch, 0]["labels"].tolist() for epoch in range(6)]
    spoken = ["".join(chr(i) for i in labels if 0 < i < 256) for labels in answers]
    assert sorted(spoken[:3]) == sorted(spoken[3:]) == ["a", "b", "c"]


def test_a_record_that_does_not_fit_is_an_error_with_its_id(tmp_path):
    dataset = dataset_of(write_qa(tmp_path, [record("fits", [1]), record("image too far", [1] * 40)]), 50)
    assert len(dataset[0, 0]["input_ids"]) <= 50
    with pytest.raises(InputError, match='"image too far"'):
        dataset[0, 1]


# --- a batch in pieces


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 3], [2], [4, 1, 2, 0]])
def test_the_pieces_of_a_batch_hold_its_rows_as_if_they_had_been_made_alone(tmp_path, pieces, rows):
    """Rows with no picture, one and three among them: each keeps its own, and no piece is wider than its longest row."""
    dataset = dataset_of(write_qa(tmp_path, MIXED))
    samples = [dataset[0, i] for i in rows]
    found = list(split_batch(collate(samples, PAD), pieces, PAD))
    assert len(found) <= pieces and len(found) >= min(pieces, len(rows)) / 2
    assert max(len(piece["ids"]) for piece in found) == -(-len(rows) // pieces)
    first = 0
    for piece in found:
        last = first + len(piece["ids"])
        assert same([piece], [collate(samples[first:last], PAD)])
        first = last
    assert first == len(rows)


# --- pictures that cannot be read, replaced


def replaced_dataset(folder, seed=0, gone=(1, 4), records=12, kept=None) -> QADataset:
    rows = [record(f"r{i}", ["gone" if i in gone else i]) for i in range(records)]
    return dataset_of(write_qa(folder, rows), seed=seed, kept=kept, skip_bad_images=True)


def test_what_takes_a_records_place_is_a_function_of_seed_epoch_and_record(tmp_path):
    dataset = replaced_dataset(tmp_path)
    taken = {(epoch, i): dataset[epoch, i]["id"] for epoch in range(30) for i in (1, 4)}
    again = replaced_dataset(tmp_path)
    assert {place: again[place]["id"] for place in reversed(taken)} == taken  # whatever was asked before
    assert not {"r1", "r4"} & set(taken.values()) and len(set(taken.values())) > 5
    assert {place: replaced_dataset(tmp_path, seed=1)[place]["id"] for place in taken} != taken
    assert any(taken[epoch, 1] != taken[epoch, 4] for epoch in range(30))


def test_it_is_said_whose_place_was_taken_and_why(tmp_path):
    dataset = replaced_dataset(tmp_path)
    batch = collate([dataset[0, i] for i in (0, 1, 2, 4)], PAD)
    qa, image = tmp_path / "qa.jsonl", tmp_path / "gone.png"
    assert batch.replaced == [f'{qa} ("r{i}"): {image}: no such file.' for i in (1, 4)]
    assert [batch.ids[0], batch.ids[2]] == ["r0", "r2"]
    for row, name in enumerate(batch.ids):  # its own picture stands with it
        assert batch.pixel_values[row, 0, 0, 0] == int(name[1:])
    assert list(split_batch(batch, 2, PAD))[0]["replaced"] == [], "counted once, with the whole batch"


def test_only_records_that_may_be_used_take_a_place(tmp_path):
    """A record that max_length leaves no use for does not come back this way."""
    kept = np.array([1, 2, 3, 4])
    dataset = replaced_dataset(tmp_path, kept=kept)
    assert {dataset[epoch, i]["id"] for epoch in range(40) for i in (1, 4)} == {"r2", "r3"}


def test_replacing_ends_where_nothing_can_be_read(tmp_path):
    dataset = replaced_dataset(tmp_path, gone=range(12))
    with pytest.raises(InputError, match=f'"r3".*gone.png.*{REPLACEMENTS - 1} others .* cannot be read either'):
        dataset[0, 3]


def test_only_pictures_are_a_reason_to_replace_a_record(tmp_path):
    """A record that does not fit stops the run: it was to be left out before."""
    dataset = dataset_of(write_qa(tmp_path, [record("wide", [1] * 40), record("good", [1])]), 50, skip_bad_images=True)
    with pytest.raises(InputError, match='"wide"'):
        dataset[0, 0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_replace_as_the_process_itself_does(tmp_path, num_workers):
    dataset = replaced_dataset(tmp_path)
    batches = list(micro_batches(order_of([1] * 12), range(6), 2, 2, 0, 1))
    alone = load(dataset, batches)
    assert same(alone, load(dataset, batches, num_workers))
    assert sum(len(batch.replaced) for batch in alone) == 4  # two epochs with two such records each
