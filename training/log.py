"""The files that a run writes while it trains: metrics.jsonl, samples.jsonl, skipped.jsonl, curves.png, and the numbers
for the progress bar and trackers."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from config import InputError
from config.files import open_append, open_regular, write_whole
from dataset.batch import Batch
from model.checkpoint_folder import refuse_lost
from training.curves import draw_curves
from training.step import Outcome


class RunLog:
    """Counts what this process does and writes one row per logged step.

    start_step: rows after it are dropped, because those steps will be repeated. writes: true on the main process. processes:
    how many processes count the same. track: (values, step) -> None, passes rows on to TensorBoard or wandb.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        *,
        logging_steps: int,
        writes: bool,
        processes: int,
        track: Callable[[dict, int], object],
    ):
        self.folder, self.logging_steps, self.writes, self.track = folder, logging_steps, writes, track
        self.processes = processes
        self.metrics = folder / "metrics.jsonl"
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (self.metrics, folder / "samples.jsonl", folder / "skipped.jsonl"):
                _drop_rows_after(path, start_step)
        self.start_interval()

    def start_interval(self) -> None:
        """Reset all counts."""
        self.pending: dict[str, Any] | None = None
        self.loss_sum, self.targets, self.samples, self.tokens = 0.0, 0, 0, 0
        self.skipped_steps, self.replaced = 0, 0
        self.balance_losses: list[float] = []
        self.started = time.perf_counter()

    def step(
        self,
        step: int,
        epoch: float,
        outcome: Outcome,
        *,
        learning_rates: Mapping[str, float],
        micro_batches: Sequence[Batch],
    ) -> dict:
        """Count one optimizer step of this process's micro-batches. Returns what the progress bar shows."""
        if not outcome.is_bad:
            self.loss_sum += outcome.loss * outcome.targets
            self.targets += outcome.targets
            if outcome.balance_loss is not None:
                self.balance_losses.append(outcome.balance_loss)
        self.skipped_steps += outcome.is_bad or outcome.has_overflowed
        self.replaced += outcome.replaced
        self.samples += sum(batch.num_samples for batch in micro_batches)
        self.tokens += sum(batch.num_tokens for batch in micro_batches)
        seconds = max(time.perf_counter() - self.started, 1e-9)
        shown = {
            "loss": f"{outcome.loss:.3f}",
            "samples/s": f"{self.samples * self.processes / seconds:.1f}",
            "MB": f"{peak_memory_mb():.0f}",
        }
        self.pending = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": self.loss_sum / self.targets if self.targets else None,
            **self._mean_balance_loss(),
            "grad_norm": _finite(outcome.grad_norm),  # fp16 overflows now and then
            **learning_rates,
            "targets": self.targets,
            "samples_per_s": round(self.samples * self.processes / seconds, 2),
            "tokens_per_s": round(self.tokens * self.processes / seconds, 1),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "skipped_steps": self.skipped_steps,
            "replaced_records": self.replaced,
        }
        if step == 1 or step % self.logging_steps == 0:
            self.flush()
        return shown

    def flush(self) -> None:
        """Write the row of the steps since the last one, if any, and start a new interval. Call it at the end, and before
        anything whose time is not training's."""
        if self.pending:
            self._write(self.metrics, self.pending)
        self.start_interval()

    def skipped(self, step: int, reason: str, details: dict) -> None:
        """Write to skipped.jsonl what of a step was not learned from."""
        self._write(self.folder / "skipped.jsonl", {"step": step, "reason": reason, **details})

    def validation(self, step: int, epoch: float, values: Mapping[str, float], samples: Sequence[dict]) -> None:
        """Write an evaluation: the held-out loss and related values, and a few generated answers. Call `flush` before the
        evaluation runs."""
        found = {f"val_{name}": _finite(value) for name, value in values.items()}
        self._write(self.metrics, {"step": step, "epoch": round(epoch, 4), **found})
        for sample in samples:
            self._write(self.folder / "samples.jsonl", {"step": step, **sample})
        self.start_interval()

    def draw(self) -> None:
        """Draw curves.png from metrics.jsonl."""
        if self.writes:
            image = self.folder / "curves.png"
            try:
                draw_curves([("", read_rows(self.metrics))], image)
            except OSError as error:
                raise not_written(image, error) from None

    def _mean_balance_loss(self) -> dict[str, float]:
        """The experts' balance loss, a mean over steps; empty without experts."""
        found = self.balance_losses
        return {"balance_loss": sum(found) / len(found)} if found else {}

    def _write(self, path: Path, row: dict) -> None:
        if not self.writes:
            return
        _append(path, json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if path == self.metrics:
            try:
                self.track({key: value for key, value in row.items() if key != "step"}, row["step"])
            except OSError as error:
                raise not_written(self.folder / "tensorboard", error) from None


def _append(path: Path, line: bytes) -> None:
    """Append a whole line or nothing."""
    refuse_lost(path.parent)
    with open_append(path) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(size)
            raise not_written(path, error) from None


def not_written(path: Path, error: OSError) -> InputError:
    """Return the error for a file of the run that cannot be written. Raises InputError if the run's folder is gone."""
    refuse_lost(path.parent)
    return InputError(
        f"{path}: cannot be written ({error.strerror}); make room there, and the same command resumes from the last "
        "checkpoint (with --resume auto, the default)."
    )


def _finite(value: float) -> float | None:
    """None for a value that is not finite: JSON has no infinity."""
    return value if math.isfinite(value) else None


def peak_memory_mb() -> float:
    """Return this process's peak memory so far in MiB: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def read_rows(path: Path) -> list[dict]:
    """Return the complete rows of a JSON Lines file of the log. A last line that a kill cut off is left out.

    Raises InputError for a line that is no row with a step.
    """
    if not path.exists():
        return []
    with open_regular(path) as file:
        lines = file.read().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            is_row = isinstance(row, dict) and type(row["step"]) is int
        except (ValueError, KeyError, RecursionError):
            is_row = False
        if not is_row:
            raise InputError(
                f"{path}: line {number} is damaged, not a row with a step as a run writes it. Restore the file, or move it "
                "elsewhere: training does not need it."
            )
        rows.append(row)
    return rows


def _drop_rows_after(path: Path, last_step: int) -> None:
    """Drop the rows written after the checkpoint from which the run resumes: their steps will be repeated."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= last_step]
        try:
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        except OSError as error:
            raise not_written(path, error) from None
