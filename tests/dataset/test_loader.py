"""The order of samples, and how the loader makes batches of them. Run: python -m pytest tests/dataset/test_loader.py"""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import IGNORE_INDEX, InputError
from dataset.batch import Batch, collate
from dataset.conversation import ChatFormat
from dataset.loader import MAX_REPLACEMENTS, QADataset, make_loader
from dataset.order import PackedRow, SampleOrder, micro_batches, pack, packed_rows
from dataset.qa_file import QAFile
from tests.toy_batches import are_same
from visual.images import ImageError

PAD = 999
IMAGE = 258  # the id of the image token


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
    assert [backwards.at(i) for i in reversed(range(40))] == whole[::-1]  # independent of earlier calls
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


def test_a_weight_is_how_often_a_record_is_used_in_an_epoch():
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
    assert len(set(halves)) > 6 and set(chain(*halves)) == set(range(8))  # a new half each time, all of them in the end


def test_a_limited_epoch_continues_where_the_last_one_ended():
    whole, short = SampleOrder(np.arange(50), 3, np.ones(50)), SampleOrder(np.arange(50), 3, np.ones(50), limit=20)
    assert short.epoch_length == 20 and SampleOrder(np.arange(50), 3, np.ones(50), limit=80).epoch_length == 50
    assert [short.at(i) for i in range(200)] == [whole.at(i) for i in range(200)]
    epochs = [{short.at(20 * epoch + i)[1] for i in range(20)} for epoch in range(2)]
    assert len(epochs[0] | epochs[1]) == 40, "no record twice before all were used once"


def test_a_small_source_with_a_small_weight_is_used():
    order = order_of([0.1, 0.1, 0.1, 1, 1])
    assert order.epoch_length == 3
    assert set(chain(*(epoch_of(order, epoch) for epoch in range(30)))) == set(range(5))


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(InputError, match="weight"):
        order_of([0, 0])


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 4), st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)]), st.integers(0, 5)
)
def test_a_step_takes_the_same_samples_on_any_number_of_processes(records, size, shape, start):
    accumulation, world = shape
    order, steps = order_of([1] * records, seed=3), range(start, start + 3)
    samples = size * accumulation
    by_rank = [
        list(micro_batches(order, steps, batch_size=size, accumulation=accumulation, rank=rank, world_size=world))
        for rank in range(world)
    ]
    for i, step in enumerate(steps):
        each = accumulation // world
        dealt = [by_rank[micro % world][i * each + micro // world] for micro in range(accumulation)]
        assert list(chain(*dealt)) == [order.at(step * samples + j) for j in range(samples)]
    one = list(chain(*micro_batches(order, steps, batch_size=samples, accumulation=1)))
    assert sorted(chain(*chain(*by_rank))) == sorted(one)


def test_starting_in_the_middle_gives_the_tail_of_the_whole():
    def rank_1(steps: range) -> list:
        order = order_of([1, 2, 0.5, 1, 1])
        return list(micro_batches(order, steps, batch_size=2, accumulation=4, rank=1, world_size=2))

    assert rank_1(range(5, 9)) == rank_1(range(9))[5 * 2 :]


# --- batches


class Pixels:
    """Reads "7.png" as an image of sevens; "gone.png" does not exist. A class, so that workers can unpickle it."""

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
    chat = ChatFormat(
        encode_text=lambda text: list(text.encode()),
        im_start_id=256,
        im_end_id=257,
        end_of_text_id=259,
        image_token_id=IMAGE,
        num_image_tokens=2,
        system_prompt=None,
    )
    return QADataset(qa, chat, Pixels(), max_length=max_length, seed=seed, **options)


MIXED = [
    record("one", [1]), record("text", [], "a longer answer"), record("three", [2, 3, 2]), record("more text", []),
    record("last", [4], "no"),
]  # fmt: skip


def load(dataset: QADataset, batches, num_workers=0) -> list[Batch]:
    return list(make_loader(dataset, iter(batches), PAD, num_workers=num_workers))


def test_a_batch_is_padded_on_the_right(tmp_path):
    dataset = dataset_of(write_qa(tmp_path, MIXED))
    (batch,) = load(dataset, [[(0, i) for i in range(5)]])
    assert batch.ids == ["one", "text", "three", "more text", "last"] and not batch.is_packed
    samples = [dataset[0, i] for i in range(5)]
    longest = max(len(sample.input_ids) for sample in samples)
    for name, padding in (("input_ids", PAD), ("labels", IGNORE_INDEX)):
        rows = [vars(sample)[name].tolist() for sample in samples]
        found = vars(batch)[name]
        assert found.tolist() == [row + [padding] * (longest - len(row)) for row in rows]
        assert found.dtype == torch.long
    assert batch.attention_mask.tolist() == [[int(i != PAD) for i in row] for row in batch.input_ids.tolist()]


def test_every_image_belongs_to_its_own_row_whatever_the_other_rows_are(tmp_path):
    """A row without images or with several must not shift those of the others: image tokens in reading order and images
    are two lists of the same length that correspond."""
    dataset = dataset_of(write_qa(tmp_path, MIXED))
    images = {"one": [1], "text": [], "three": [2, 3, 2], "more text": [], "last": [4]}
    for rows in ([0, 1, 2, 3, 4], [1, 4, 3, 2, 0], [3, 0], [2], [4, 1]):
        (batch,) = load(dataset, [[(0, i) for i in rows]])
        per_row = ((batch.input_ids == IMAGE).sum(1) // 2).tolist()
        assert per_row == batch.images_in_sample == [len(images[name]) for name in batch.ids]
        expected = [i for name in batch.ids for i in images[name]]
        assert batch.pixel_values.shape == (len(expected), 3, 2, 2)
        assert batch.pixel_values[:, 0, 0, 0].tolist() == expected


def test_a_batch_of_text_has_no_pixels(tmp_path):
    (batch,) = load(dataset_of(write_qa(tmp_path, MIXED)), [[(0, 1), (0, 3)]])
    assert batch.pixel_values is None
    assert collate([dataset_of(QAFile(tmp_path / "qa.jsonl"))[0, 1]], PAD).input_ids.shape[0] == 1


def test_batches_do_not_depend_on_workers_and_the_global_generator_is_not_used(tmp_path):
    dataset = dataset_of(write_qa(tmp_path, MIXED))
    batches = list(micro_batches(order_of([1] * 5), range(4), batch_size=2, accumulation=2))
    before = torch.get_rng_state()
    runs = [load(dataset, batches, num_workers) for num_workers in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(runs[0]) == 8 and are_same(runs[0], runs[1]) and are_same(runs[0], runs[2])
    names = [record["id"] for record in MIXED]
    assert [batch.ids for batch in runs[2]] == [[names[i] for _, i in batch] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_packed_rows_do_not_depend_on_workers_and_each_text_is_encoded_once(tmp_path, monkeypatch, num_workers):
    """The rows of a step need the lengths of all its samples, whichever worker makes a row."""
    dataset, log = dataset_of(write_qa(tmp_path, MIXED)), tmp_path / "encoded"
    rows = list(packed_rows(order_of([1] * 5), range(3), samples_per_step=6, rows=4))
    lengths = [[len(dataset.encode(key)[1].input_ids) for key in row.keys] for row in rows]
    members = [[row.keys[i] for i in pack(sizes, 4)[row.row]] for row, sizes in zip(rows, lengths, strict=True)]
    expected = [collate([dataset[key] for key in row], PAD, packed=True) for row in members]
    encode = QADataset.encode

    def logged(self, key):
        with open(log, "a") as file:  # by any process
            file.write(f"{key}\n")
        return encode(self, key)

    monkeypatch.setattr(QADataset, "encode", logged)
    found = list(make_loader(dataset, iter(rows), PAD, num_workers=num_workers, packed=True))
    assert are_same(found, expected)
    keys = [key for row in rows[::4] for key in row.keys]
    assert Counter(log.read_text().splitlines()) == Counter(map(str, keys)) and len(keys) == 18


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_record_that_does_not_fit_stops_a_packed_run_at_its_step(tmp_path, num_workers):
    dataset = dataset_of(write_qa(tmp_path, [record("a", [1]), record("b", [2]), record("far", [1] * 40)]), 50)
    rows = [PackedRow([(0, i), (0, j)], 2, row) for i, j in ((0, 1), (1, 2)) for row in range(2)]
    loader = make_loader(dataset, rows, PAD, num_workers=num_workers, packed=True)
    assert [next(loader).ids for _ in range(2)] == [["a"], ["b"]]
    with pytest.raises(InputError, match='"far"'):
        next(loader)
    assert list(make_loader(dataset, iter(()), PAD, num_workers=num_workers)) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_image_stops_the_run_with_the_records_id(tmp_path, num_workers):
    dataset = dataset_of(write_qa(tmp_path, [record("good", [1]), record("bad", ["gone"])]))
    loader = make_loader(dataset, [[(0, 0)], [(0, 1)]], PAD, num_workers=num_workers)
    assert next(loader).ids == ["good"]
    with pytest.raises(InputError) as caught:
        next(loader)
    qa, image = tmp_path / "qa.jsonl", tmp_path / "gone.png"
    advice = " data.on_bad_image=skip would replace this record by another one."
    assert str(caught.value) == f'{qa} ("bad"): {image}: no such file.{advice}'  # without a worker's traceback


def test_the_epoch_chooses_among_alternatives(tmp_path):
    talks = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}] for answer in "abc"]
    dataset = dataset_of(write_qa(tmp_path, [{"id": "r", "conversations": talks[0], "alternatives": talks[1:]}]))
    answers = [dataset[epoch, 0].labels.tolist() for epoch in range(6)]
    texts = ["".join(chr(i) for i in labels if 0 < i < 256) for labels in answers]
    assert sorted(texts[:3]) == sorted(texts[3:]) == ["a", "b", "c"]


def test_a_record_that_does_not_fit_is_an_error_with_its_id(tmp_path):
    dataset = dataset_of(write_qa(tmp_path, [record("fits", [1]), record("image too far", [1] * 40)]), 50)
    assert len(dataset[0, 0].input_ids) <= 50
    with pytest.raises(InputError, match='"image too far"'):
        dataset[0, 1]


# --- records whose images cannot be read are replaced


def replaced_dataset(folder, seed=0, gone=(1, 4), records=12, kept=None) -> QADataset:
    rows = [record(f"r{i}", ["gone" if i in gone else i]) for i in range(records)]
    return dataset_of(write_qa(folder, rows), seed=seed, kept=kept, skip_bad_images=True)


def test_the_replacement_is_a_function_of_seed_epoch_and_record(tmp_path):
    dataset = replaced_dataset(tmp_path)
    taken = {(epoch, i): dataset[epoch, i].id for epoch in range(30) for i in (1, 4)}
    again = replaced_dataset(tmp_path)
    assert {key: again[key].id for key in reversed(taken)} == taken  # independent of earlier calls
    assert not {"r1", "r4"} & set(taken.values()) and len(set(taken.values())) > 5
    assert {key: replaced_dataset(tmp_path, seed=1)[key].id for key in taken} != taken
    assert any(taken[epoch, 1] != taken[epoch, 4] for epoch in range(30))


def test_a_batch_reports_which_records_were_replaced_and_why(tmp_path):
    dataset = replaced_dataset(tmp_path)
    batch = collate([dataset[0, i] for i in (0, 1, 2, 4)], PAD)
    qa, image = tmp_path / "qa.jsonl", tmp_path / "gone.png"
    assert batch.replaced == [f'{qa} ("r{i}"): {image}: no such file.' for i in (1, 4)]
    assert [batch.ids[0], batch.ids[2]] == ["r0", "r2"]
    for row, name in enumerate(batch.ids):  # a replacement has its own image
        assert batch.pixel_values[row, 0, 0, 0] == int(name[1:])
    assert [piece.replaced for piece in batch.split(2)] == [[], []], "counted once, with the whole batch"


def test_only_kept_records_are_replacements(tmp_path):
    """A record that data.max_length leaves out does not come back this way."""
    kept = np.array([1, 2, 3, 4])
    dataset = replaced_dataset(tmp_path, kept=kept)
    assert {dataset[epoch, i].id for epoch in range(40) for i in (1, 4)} == {"r2", "r3"}


def test_replacing_stops_if_no_record_can_be_read(tmp_path):
    dataset = replaced_dataset(tmp_path, gone=range(12))
    advice = f"{MAX_REPLACEMENTS - 1} records that could replace it cannot be read either"
    with pytest.raises(InputError, match=f'"r3".*gone.png.*{advice}'):
        dataset[0, 3]


def test_only_unreadable_images_are_a_reason_to_replace_a_record(tmp_path):
    """A record that does not fit stops the run: it should have been left out before."""
    dataset = dataset_of(write_qa(tmp_path, [record("wide", [1] * 40), record("good", [1])]), 50, skip_bad_images=True)
    with pytest.raises(InputError, match='"wide"'):
        dataset[0, 0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_choose_the_same_replacements(tmp_path, num_workers):
    dataset = replaced_dataset(tmp_path)
    batches = list(micro_batches(order_of([1] * 12), range(6), batch_size=2, accumulation=2))
    alone = load(dataset, batches)
    assert are_same(alone, load(dataset, batches, num_workers))
    assert sum(len(batch.replaced) for batch in alone) == 4  # two epochs with two such records each
