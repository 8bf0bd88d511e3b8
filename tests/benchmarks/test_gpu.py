"""benchmarks.gpu compares equal work and counts it correctly. Run: sh tests/run.sh tests/benchmarks/test_gpu.py"""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import benchmarks.ours
from benchmarks import gpu
from benchmarks.gpu import BATCHES, CHECKPOINTING, HF, OURS, WARM_UP, WAYS, Row, markdown, measure, pass_flops
from benchmarks.models import SIZES, NotInstalled, Task, random_sample
from benchmarks.ours import AllLogits, ours
from benchmarks.peers import llava
from model.fused_lora import FusedLoraLinear
from training.step import Stepper

CPU = torch.device("cpu")
LENGTHS = ((5, 3), (2, 11), (9, 1), (4, 7), (30, 20), (3, 3))  # of questions and answers


@pytest.fixture(autouse=True)
def compiled(monkeypatch) -> list:
    """Records what would be compiled; compiling takes long and is tested elsewhere."""
    seen = []
    monkeypatch.setattr(benchmarks.ours, "compile_elementwise", lambda *arguments: seen.append(arguments))
    return seen


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    chance = np.random.default_rng(0)
    sizes = SIZES["tiny"]
    samples = [random_sample(sizes, chance, *length, images=1 + i % 2) for i, length in enumerate(LENGTHS)]
    return Task(sizes, "fp32", CPU, samples, folder=tmp_path_factory.mktemp("compiled"))


def losses(train, steps: int = 5) -> list[float]:
    found = []
    train(lambda loss: found.append(float(loss)) or len(found) == steps)
    return found


@pytest.fixture(scope="module")
def reference(task) -> list[float]:
    return losses(llava(task))


SWITCHES = {
    "as it is": {},
    "padded": {"packing": False},
    "PEFT's own LoRA": {"fused_lora": False},
    "not compiled": {"kernels": "plain"},
    "cached": {"cached": True},
    "checkpointing": {"checkpointing": True},
    "all logits": {"chosen_logits": False},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_ours_learns_what_transformers_and_peft_learn_with_any_switch(task, reference, name):
    found = losses(ours(task, **SWITCHES[name]))
    assert found == pytest.approx(reference, rel=2e-6)
    assert abs(found[3] - found[0]) > 1e-3  # the first batch again: something was learned


def test_a_peer_with_activation_checkpointing_learns_the_same(task, reference):
    assert losses(llava(task, **CHECKPOINTING)) == pytest.approx(reference, rel=2e-6)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_what_its_name_says(task, name, monkeypatch, compiled):
    class Seen(Exception):
        pass

    def look(stepper, step, micro_batches):
        model, batch = stepper.model, micro_batches[0]
        raise Seen(
            {
                "padded": batch.lengths is None,
                "PEFT's own LoRA": not any(isinstance(one, FusedLoraLinear) for one in model.modules()),
                "not compiled": compiled == [],
                "cached": batch.pixel_values is None and len(stepper.encoder(batch)) == len(batch.is_cached),
                "checkpointing": model.causal_lm.is_gradient_checkpointing,
                "all logits": isinstance(model, AllLogits),
            }
        )

    monkeypatch.setattr(Stepper, "forward_and_backward", look)
    with pytest.raises(Seen) as seen:
        ours(task, **SWITCHES[name])(bool)
    assert {one for one, is_on in seen.value.args[0].items() if is_on} == {name} - {"as it is"}


def test_sorting_by_length_leaves_the_least_padding(task, monkeypatch):
    seen = []
    monkeypatch.setattr(Task, "batches", lambda self, samples, packed=False: seen.append(samples) or [])
    llava(task, by_length=True)
    lengths = [len(sample.input_ids) for sample in seen[0]]
    size, in_order = task.sizes.batch_size, sorted(len(sample.input_ids) for sample in task.samples)
    batches = [sorted(lengths[first : first + size]) for first in range(0, len(lengths), size)]
    assert sorted(batches) == [in_order[first : first + size] for first in range(0, len(in_order), size)]


# ---------------------------------------------------------------------------------------------------------------------
# The harness


def way(steps_seconds: list[float], monkeypatch):
    """Register a way whose steps take these seconds by a clock of their own."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def train(after_step):
        for seconds in steps_seconds:
            now[0] += seconds
            if after_step(1.5):
                return
        raise AssertionError("was not stopped")

    monkeypatch.setitem(WAYS, "timed", (lambda task: train, {}))
    return "timed"


def measured(name: str, task: Task, seconds: float = 1e6, least: float = 0.0) -> Row:
    end = gpu.time.perf_counter() + seconds
    return measure(Row("m", name), task, pass_flops(task), rate=1e9, end=end, least=least)


def test_a_row_is_whole_passes_after_the_warm_up(task, monkeypatch):
    one_pass = [0.5] * BATCHES
    row = measured(way([100.0] * WARM_UP + one_pass + [9.0], monkeypatch), task)
    assert row.samples_per_s == pytest.approx(len(task.samples) / (0.5 * BATCHES))
    assert row.tokens_per_s == pytest.approx(sum(len(sample.input_ids) for sample in task.samples) / (0.5 * BATCHES))
    assert row.peak_fraction == pytest.approx(pass_flops(task)[False] / (0.5 * BATCHES) / 1e9)
    assert row.first_loss == 1.5


def test_passes_are_repeated_until_the_time_suffices(task, monkeypatch):
    steps = [100.0] * WARM_UP + [1.0] * BATCHES + [3.0] * BATCHES + [50.0]
    row = measured(way(steps, monkeypatch), task, least=1.5 * BATCHES)
    assert row.samples_per_s == pytest.approx(len(task.samples) / (2.0 * BATCHES))


def test_ways_without_time_are_left_out(task, monkeypatch):
    assert measured(OURS, task, seconds=0.0).note == "left out: no time"
    steps = [100.0] * WARM_UP + [1.0] * (BATCHES - 1)
    assert measured(way(steps, monkeypatch), task, seconds=100.0 * WARM_UP + 1.5).note == "left out: no time for a pass"


@pytest.mark.parametrize(
    "error, note",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (NotInstalled("trl"), "left out: trl is not installed"),
        (ValueError("a shape\nand more"), "failed: ValueError: a shape"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_way_that_cannot_run_says_why(task, monkeypatch, error, note):
    def fails(task):
        raise error

    monkeypatch.setitem(WAYS, "fails", (fails, {}))
    assert measured("fails", task) == Row("m", "fails", note=note)


def test_a_row_holds_the_notes_of_its_way(task, monkeypatch):
    def speaks(task):
        task.say("nothing was compiled")
        return lambda after_step: [after_step(1.0) for _ in range(WARM_UP + BATCHES)]

    monkeypatch.setitem(WAYS, "speaks", (speaks, {}))
    row = measured("speaks", task)
    assert row.samples_per_s and row.note == "nothing was compiled" and row.note in markdown([row], "about")


def test_patches_of_a_library_do_not_reach_the_next_way(task, monkeypatch):
    def patches(task):
        monkeypatch.setattr(gpu.modeling_qwen2, "Qwen2MLP", object)
        return lambda after_step: None

    before = gpu.modeling_qwen2.Qwen2MLP
    monkeypatch.setitem(WAYS, "patches", (patches, {}))
    measured("patches", task)
    assert gpu.modeling_qwen2.Qwen2MLP is before


@pytest.mark.parametrize("way", [ours, llava])
def test_a_missing_package_is_named(task, monkeypatch, way):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(NotInstalled, match="flash_attn"):
        way(replace(task, flash=True))


def test_cached_features_are_less_work(task):
    flops = pass_flops(task)
    assert 0 < flops[True] < flops[False]


def test_the_table_holds_the_ratio_to_the_peer_and_what_was_left_out():
    values = {"tokens_per_s": 1000.0, "peak_fraction": 0.4, "peak_gib": None, "first_loss": 1.0}
    rows = [
        Row("m", OURS, samples_per_s=30.0, **values),
        Row("m", HF, samples_per_s=12.0, **values),
        Row("m", "other", note="out of memory"),
    ]
    text = markdown(rows, "about")
    assert "| ours | 30.00 | 2.50 | 1,000 | 40.0% | - |" in text
    assert "- other: out of memory" in text


def test_runs_without_a_gpu(tmp_path):
    gpu.main(["--tiny", "--output", str(tmp_path / "new")])
    written = json.loads((tmp_path / "new" / "gpu.json").read_text())
    rows = {row["way"]: row for row in written["rows"]}
    assert list(rows) == list(WAYS)
    ran = {name for name, row in rows.items() if row["samples_per_s"]}
    assert {OURS, HF, "ours without packing", "ours, cached features"} <= ran
    assert all(row["note"].endswith("is not installed") for name, row in rows.items() if name not in ran)
    same_batches = ran - {"LLaVA + PEFT, sorted by length"}
    assert [rows[name]["first_loss"] for name in same_batches] == pytest.approx(
        [rows[HF]["first_loss"]] * len(same_batches)
    )
    assert "| " + OURS + " |" in (tmp_path / "new" / "gpu.md").read_text()


def test_refuses_the_real_sizes_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--output", str(tmp_path)])
    assert stopped.value.code == 2 and "--tiny" in capsys.readouterr().err
