"""The benchmark of training runs, and compares equal work. Run: python -m pytest tests/test_benchmark_training.py"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import qwen
from training.run import open_processors, open_qa_file
from benchmarks.peers import Collator, Meter, Settings, cpu_seconds, samples, sorted_batches
from benchmarks.training import NAMES, check_losses, largest_differences, markdown, parse_arguments
from benchmarks.vlm_workload import SHAPES, make_workload, new_tokenizer, record
from config import IGNORE_INDEX, load_config
from dataset.order import SampleOrder
from visual.encoders import load_vision_tower
from visual.processor import load_image_processor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[str, dict, Path]:
    """What a run of two ways prints, what it adds to its file, and the workload's folder."""
    folder = tmp_path_factory.mktemp("work")
    options = ["--quick", "--precision", "fp32", "--only", "ours,hf", "--workdir", str(folder)]
    command = [sys.executable, "-m", "benchmarks.training", *options, "--append-json", str(folder / "raw.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "raw.jsonl").read_text()), folder / "tiny"


def answer(losses: list[float], **values) -> dict:
    costs = {"cpu": 2.0, "wall": 4.0, "memory": 100.0, "memory_above": 50.0, "samples": 8, "tokens": 80, "targets": 20}
    return costs | values | {"losses": losses}


def test_two_ways_learn_the_same_and_cost_something(finished):
    answers = finished[1]["answers"]
    (ours,), (theirs,) = answers["ours"], answers["hf"]
    assert len(ours["losses"]) == 3 and ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["losses"][0] != ours["losses"][2]
    for one in (ours, theirs):
        assert 0 < one["cpu"] < 60 and one["wall"] > 0
        assert 100 < one["memory"] and 0 < one["memory_above"] < one["memory"]
        assert (one["samples"], one["tokens"], one["targets"]) == (4, ours["tokens"], ours["targets"])


def test_the_output_is_a_table_with_the_machine_and_the_losses(finished):
    first, _, head, rule, ours, theirs, _, losses = finished[0].strip().split("\n")
    assert re.search(
        r"\d+ cores, Python 3\.\d+\.\d+, torch .*transformers .*peft .*\d{4}-\d\d-\d\d; workload tiny, ", first
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, rule, ours, theirs)]
    assert {len(row) for row in cells} == {10} and set(cells[1]) == {"---"}
    assert [row[0] for row in cells[2:]] == [NAMES["ours"], NAMES["hf"]] and cells[2][5:7] == ["1.00", "1.00"]
    assert all(float(cell.replace(",", "")) > 0 for cell in cells[3][1:7]) and cells[3][7:9] == ["-", "-"]
    assert re.fullmatch(rf"Losses of 3 steps .*: {re.escape(NAMES['hf'])} \d\.\de-\d\d\.", losses)


def test_both_halves_of_the_workload_hold_the_same_numbers(finished):
    folder = finished[2]
    whole = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32)
    pairs = [
        (whole.model.vision_tower, load_vision_tower(folder / "tower", dtype=torch.float32).model),
        (whole.model.language_model, qwen.load_language_model(str(folder / "lm"), dtype=torch.float32).model),
    ]
    for theirs, ours in pairs:
        weights = dict(ours.named_parameters())
        named = dict(theirs.named_parameters())
        assert named.keys() == weights.keys() and all(torch.equal(named[name], weights[name]) for name in named)


def test_a_workload_that_is_there_is_used_again_and_a_smaller_one_is_not(finished):
    folder = finished[2]
    before = (folder / "workload.json").stat().st_mtime_ns
    make_workload(folder, "tiny", 3)
    assert (folder / "workload.json").stat().st_mtime_ns == before
    assert json.loads((folder / "workload.json").read_text())["records"] == 3 * SHAPES["tiny"].batch


def test_the_peers_get_the_pixels_and_the_ids_of_our_batches(finished):
    config = load_config(finished[2] / "config.yaml")
    taken, processors = samples(config, 2), open_processors(config)
    assert len(taken) == 2 * SHAPES["tiny"].batch
    dataset = open_qa_file(config, processors, config.data.qa_file)
    order = SampleOrder(dataset.kept, config.seed, np.ones(len(dataset.kept)))
    processor = load_image_processor(finished[2] / "tower")._processor
    batch = Collator(processor, 7)(taken)
    lengths = [len(sample.input_ids) for sample in taken]
    assert batch.attention_mask.sum(dim=1).tolist() == lengths
    for row, length in enumerate(lengths):
        wanted = dataset[order.at(row)]
        assert torch.equal(batch.input_ids[row, :length], wanted["input_ids"])
        assert torch.equal(batch.labels[row, :length], wanted["labels"])
        assert (batch.input_ids[row, length:] == 7).all() and (batch.labels[row, length:] == IGNORE_INDEX).all()
        assert torch.equal(batch.pixel_values[row], wanted["pixel_values"][0])


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


def test_sorted_batches_are_the_same_samples_with_the_least_padding():
    chance = np.random.default_rng(0)
    taken = [{"input_ids": [number] * int(length)} for number, length in enumerate(chance.integers(1, 99, 24))]
    batches = sorted_batches(taken, 4, seed=1)
    assert sorted(sample.input_ids[0] for sample in batches) == list(range(24)) and batches != taken
    lengths = [[len(sample.input_ids) for sample in batches[first : first + 4]] for first in range(0, 24, 4)]
    in_order = sorted(len(sample.input_ids) for sample in taken)
    assert sorted(map(sorted, lengths)) == [in_order[first : first + 4] for first in range(0, 24, 4)]
    assert lengths != sorted(lengths)  # the warm-up must not be all that is short


def test_the_time_of_processes_below_counts_while_they_run_and_after():
    before = cpu_seconds()
    code = "import time\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    running = cpu_seconds() - before
    child.communicate(b"\n")
    assert 0.9 < running < 3 and 0.9 < cpu_seconds() - before < 3


def test_the_warm_up_is_not_measured():
    meter = Meter(Settings(Path(), "fp32", steps=3, warmup=1, threads=1, workers=0))
    for seconds in (0.3, 0.0, 0.1):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        meter.step_done()
    assert 0.09 < meter.cost["cpu"] < 0.29 and meter.cost["wall"] > 0.09


def test_the_speed_is_of_tokens_and_of_the_same_round():
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


def test_losses_that_differ_are_an_error():
    answers = {"ours": [answer([1.0, 2.0])], "hf": [answer([1.0, 2.000001])], "hf-sorted": [answer([5.0, 5.0])]}
    check_losses(answers)
    assert largest_differences(answers)["hf"] == pytest.approx(1e-6, rel=1e-3)
    for wrong in ([1.0, 2.00002], [1.0, float("nan")]):
        answers["hf"].append(answer(wrong))
        with pytest.raises(ValueError, match="hf: its losses are up to"):
            check_losses(answers)
        answers["hf"].pop()


@pytest.mark.parametrize("wrong", [["--warmup", "24"], ["--only", "ours-cached"], ["--only", "ours,their"]])
def test_what_cannot_be_measured_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(wrong)
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err
