"""benchmarks.training runs and compares equal work. Run: sh tests/run.sh tests/benchmarks/test_training.py"""

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qwen
from benchmarks import training
from benchmarks.measuring import cpu_seconds
from benchmarks.models import SIZES
from benchmarks.peers import llava_twin, sort_by_length
from benchmarks.training import NAMES, Meter, check_losses, largest_differences, markdown, parse_arguments
from benchmarks.workload import new_tokenizer, record, write_workload
from config import IGNORE_INDEX, load_config
from dataset.order import SampleOrder
from training.run import open_model, open_processors, open_qa_file
from visual.encoders import load_vision_tower

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[str, dict, Path]:
    """Return what a run of two ways prints, what it appends to its file, and the workload's folder."""
    folder = tmp_path_factory.mktemp("work")
    options = ["--quick", "--precision", "fp32", "--only", "ours,hf", "--workdir", str(folder)]
    command = [sys.executable, "-m", "benchmarks.training", *options, "--append-json", str(folder / "raw.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "raw.jsonl").read_text()), folder / "tiny"


def answer(losses: list[float], **values) -> dict:
    costs = {"cpu": 2.0, "wall": 4.0, "memory": 100.0, "memory_above": 50.0, "samples": 8, "tokens": 80, "targets": 20}
    return costs | values | {"losses": losses}


def test_two_ways_learn_the_same_at_a_cost(finished):
    answers = finished[1]["answers"]
    (ours,), (theirs,) = answers["ours"], answers["hf"]
    assert len(ours["losses"]) == 3 and ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["losses"][0] != ours["losses"][2]
    for one in (ours, theirs):
        assert 0 < one["cpu"] < 60 and one["wall"] > 0
        assert 100 < one["memory"] and 0 < one["memory_above"] < one["memory"]
        assert (one["samples"], one["tokens"], one["targets"]) == (4, ours["tokens"], ours["targets"])


def test_prints_the_machine_a_table_and_the_losses(finished):
    first, _, head, rule, ours, theirs, _, losses = finished[0].strip().split("\n")
    assert re.search(
        r"\d+ cores, Python 3\.\d+\.\d+, torch .*transformers .*peft .*\d{4}-\d\d-\d\d; workload tiny, ", first
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, rule, ours, theirs)]
    assert {len(row) for row in cells} == {10} and set(cells[1]) == {"---"}
    assert [row[0] for row in cells[2:]] == [NAMES["ours"], NAMES["hf"]] and cells[2][5:7] == ["1.00", "1.00"]
    assert all(float(cell.replace(",", "")) > 0 for cell in cells[3][1:7]) and cells[3][7:9] == ["-", "-"]
    assert re.fullmatch(rf"Losses of 3 steps .*: {re.escape(NAMES['hf'])} \d\.\de-\d\d\.", losses)


def test_the_peer_holds_the_weights_of_the_workload(finished):
    folder = finished[2]
    config = load_config(folder / "config.yaml")
    whole = llava_twin(open_model(config, "fp32", open_processors(config)).model).get_base_model()
    pairs = [
        (whole.model.vision_tower, load_vision_tower(folder / "tower", dtype=torch.float32).model),
        (whole.model.language_model, qwen.load_language_model(str(folder / "lm"), dtype=torch.float32).model),
    ]
    for theirs, ours in pairs:
        weights = dict(ours.named_parameters())
        named = {n.replace(".base_layer", ""): p for n, p in theirs.named_parameters() if "lora_" not in n}
        assert named.keys() == weights.keys() and all(torch.equal(named[name], weights[name]) for name in named)


def test_a_large_enough_workload_is_used_again(finished):
    folder = finished[2]
    before = (folder / "workload.json").stat().st_mtime_ns
    write_workload(folder, "tiny", 3)
    assert (folder / "workload.json").stat().st_mtime_ns == before
    assert json.loads((folder / "workload.json").read_text())["records"] == 3 * SIZES["tiny"].batch_size


def test_the_peers_get_the_pixels_and_ids_of_our_batches(finished, monkeypatch):
    class Seen(Exception):
        pass

    def look(model, read, samples, after_step, **options):
        raise Seen(read(range(samples)))

    monkeypatch.setattr(training, "train_peer", look)
    with pytest.raises(Seen) as seen:
        training.peer(Namespace(workdir=finished[2], precision="fp32", steps=2, warmup=1, workers=0))
    batch = seen.value.args[0]

    config = load_config(finished[2] / "config.yaml")
    processors = open_processors(config)
    pad = processors.tokenizer.pad_token_id
    dataset = open_qa_file(config, processors, config.data.qa_file)
    order = SampleOrder(dataset.kept, config.seed, np.ones(len(dataset.kept)))
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(lengths) == 2 * SIZES["tiny"].batch_size
    for row, length in enumerate(lengths):
        wanted = dataset[order.at(row)]
        assert torch.equal(batch["input_ids"][row, :length], wanted.input_ids)
        assert torch.equal(batch["labels"][row, :length], wanted.labels)
        assert (batch["input_ids"][row, length:] == pad).all() and (batch["labels"][row, length:] == IGNORE_INDEX).all()
        assert torch.equal(batch["pixel_values"][row], wanted.pixel_values[0])


def test_the_words_are_one_token_each_and_three_tenths_of_a_sample_are_answers():
    tokenizer, chance = new_tokenizer(), np.random.default_rng(0)
    found = np.array(
        [[len(tokenizer.encode(turn["content"])) for turn in record(chance, i)["conversations"]] for i in range(2000)]
    )
    answers = found[:, 1] + 1  # and the token that ends it
    whole = found.sum() / 2000 + 196 + 12
    assert 93 < answers.mean() < 103 and 0.26 < answers.mean() / whole < 0.32
    assert np.log(answers).std() == pytest.approx(0.75, abs=0.1)
    assert len(tokenizer.encode(" wooden bicycle kitchen")) == 3 and len(tokenizer.encode("assistant")) == 1


def test_sorting_by_length_keeps_the_samples_and_leaves_the_least_padding():
    lengths = np.random.default_rng(0).integers(1, 99, 24).tolist()
    order = sort_by_length(lengths, 4)
    assert sorted(order) == list(range(24)) and order != list(range(24))
    batches = [[lengths[number] for number in order[first : first + 4]] for first in range(0, 24, 4)]
    in_order = sorted(lengths)
    assert sorted(map(sorted, batches)) == [in_order[first : first + 4] for first in range(0, 24, 4)]
    assert batches != sorted(batches)  # or the warm-up would be all short samples


def test_the_time_of_child_processes_counts_while_they_run_and_after():
    before = cpu_seconds()
    code = "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    running = cpu_seconds() - before
    child.communicate(b"\n")
    assert 0.9 < running < 3 and 0.9 < cpu_seconds() - before < 3


def test_the_warm_up_is_not_measured():
    meter = Meter(Namespace(steps=3, warmup=1))
    for seconds in (0.3, 0.0, 0.1):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        assert not meter(1.0)
    samples = [(None, None, SimpleNamespace(input_ids=[1] * length, labels=[1])) for length in (9, 2, 3)]
    found = meter.answer(samples)
    assert 0.09 < found["cpu"] < 0.29 and found["wall"] > 0.09
    assert (found["samples"], found["tokens"], found["losses"]) == (2, 5, [1.0, 1.0, 1.0])


def test_a_ratio_is_of_tokens_and_of_the_same_round():
    answers = {
        "ours": [answer([1.0]), answer([1.0], cpu=1.0), answer([1.0], cpu=4.0)],
        "hf-sorted": [
            answer([9.0], tokens=40),
            answer([9.0], cpu=3.0),
            answer([9.0], cpu=4.0, tokens=40),
        ],  # 2, 3, 2 times
    }
    row = markdown(answers, "x").split("\n")[5]
    assert [cell.strip() for cell in row.strip("|").split("|")][5:] == ["2.00", "2.00", "-", "-", "1.00"]


def test_different_losses_are_an_error():
    answers = {"ours": [answer([1.0, 2.0])], "hf": [answer([1.0, 2.000001])], "hf-sorted": [answer([5.0, 5.0])]}
    check_losses(answers)
    assert largest_differences(answers)["hf"] == pytest.approx(1e-6, rel=1e-3)
    for wrong in ([1.0, 2.00002], [1.0, float("nan")]):
        answers["hf"].append(answer(wrong))
        with pytest.raises(ValueError, match="hf: its losses differ from ours"):
            check_losses(answers)
        answers["hf"].pop()


@pytest.mark.parametrize("wrong", [["--warmup", "24"], ["--only", "ours-cached"], ["--only", "ours,their"]])
def test_refuses_contradictory_options(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(wrong)
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err
