"""The files that a run writes while it trains: rows of metrics and samples, and the curves.

Run: python -m pytest tests/training/test_log.py
"""

from __future__ import annotations

import json
import math

import matplotlib
import matplotlib.figure
import pytest

from dataset.batch import collate
from tests.toy_batches import PAD, text_sample
from training.curves import draw_curves
from training.log import RunLog, read_rows
from training.step import Outcome


def open_log(folder, start_step: int, *, logging_steps: int = 1, writes: bool = True, track=print) -> RunLog:
    """Return the log of one of two processes."""
    return RunLog(folder, start_step, logging_steps=logging_steps, writes=writes, processes=2, track=track)


def outcome(loss: float, targets: int, balance_loss: float, is_bad: bool = False) -> Outcome:
    return Outcome(
        loss=loss,
        balance_loss=balance_loss,
        grad_norm=0.5,
        targets=targets,
        is_bad=is_bad,
        has_overflowed=False,
        replaced=0,
        stop_requested=False,
    )


def test_a_logged_loss_is_the_mean_over_the_targets_since_the_last_row(tmp_path):
    tracked = []
    log = open_log(tmp_path, 0, logging_steps=3, track=lambda values, step: tracked.append((step, values)))
    padded = collate([text_sample("a", 6), text_sample("b", 4)], PAD)
    packed = collate([text_sample("a", 7), text_sample("b", 3)], PAD, packed=True)
    assert packed.lengths == [7, 3, 6], "the last 6 tokens are filler"
    for step, (loss, targets) in enumerate([(4.0, 7), (1.0, 10), (2.0, 30), (9.0, 5)], start=1):
        result = outcome(loss, targets, balance_loss=2.0 + step)
        log.step(step, step / 4, result, learning_rates={"lora_lr": 0.1}, micro_batches=[padded, packed])
    log.validation(4, 1.0, {"loss": 3.5, "perplexity": math.inf}, [{"id": "a"}])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("loss"), row.get("targets")) for row in rows] == [
        (1, 4.0, 7), (3, (1.0 * 10 + 2.0 * 30) / 40, 40), (4, None, None),
    ]  # fmt: skip
    assert [row.get("balance_loss") for row in rows] == [3.0, (4.0 + 5.0) / 2, None]
    assert rows[2]["val_loss"] == 3.5 and rows[2]["val_perplexity"] is None and rows[1]["lora_lr"] == 0.1
    assert rows[1]["tokens_per_s"] / rows[1]["samples_per_s"] == pytest.approx(5, rel=0.01)
    assert [step for step, _ in tracked] == [1, 3, 4] and "step" not in tracked[0][1]
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 4, "id": "a"}]


def test_a_bad_step_is_counted_and_its_loss_is_not(tmp_path):
    log = open_log(tmp_path, 0, logging_steps=3)
    batch = collate([text_sample("a", 6)], PAD)
    for step, (loss, is_bad) in enumerate([(4.0, False), (math.nan, True), (2.0, False)], start=1):
        log.step(step, 0.5, outcome(loss, 7, 2.0, is_bad), learning_rates={}, micro_batches=[batch])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"], row["targets"], row["skipped_steps"]) for row in rows] == [
        (1, 4.0, 7, 0), (3, 2.0, 7, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("has_experts", [False, True])
def test_the_curves_of_stages_follow_each_other(tmp_path, monkeypatch, has_experts):
    """A stage that has not begun is left out, and a dense model has no balance loss to show."""
    runs = []
    for name in ("text", "chat"):
        row = {"step": 1, "loss": 2.0, "grad_norm": None, "embeddings_lr": 0.1, "samples_per_s": 3.0}
        row |= {"balance_loss": 2.1} if has_experts else {}
        found = [row, row | {"step": 2, f"{name}_lr": 1e-3}, {"step": 2, "val_loss": 1.5, "val_token_accuracy": 0.5}]
        runs.append((name, found))
    runs.insert(1, ("vision", []))
    before = json.dumps(runs)
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    draw_curves(runs, tmp_path / "curves.png")
    assert json.dumps(runs) == before, "the rows are not changed"
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    assert len(axes) == (6 if has_experts else 4)
    training = axes["loss per answer token"].lines[0]
    assert list(training.get_xdata()) == [1, 2, 3, 4]
    assert [text.get_text() for text in axes["learning rates"].texts] == ["text", "chat"]
    drawn = {line.get_label() for line in axes["learning rates"].lines}
    assert {"embeddings_lr", "text_lr", "chat_lr"} <= drawn


def test_a_resumed_run_drops_the_rows_of_steps_that_it_repeats(tmp_path):
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo'
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(lines)
    open_log(tmp_path, 2, writes=False)  # not the main process: changes nothing
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    open_log(tmp_path, 2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert read_rows(tmp_path / name) == [{"step": 1}, {"step": 2}]
