"""What a run writes down while it trains: metrics.jsonl, samples.jsonl, skipped.jsonl, the progress bar, trackers,
curves.png."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from config import InputError
from dataset.loader import count_tokens


class RunLog:
    """Counts what this process does, and writes one row a logged step where `writes` is true (the main process).

    start_step: rows after it are dropped, because those steps are about to be made again; processes: how many do as this
    one does; track: (values, step) -> None, passes rows on to TensorBoard or wandb.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        logging_steps: int,
        writes: bool,
        processes: int,
        track: Callable[[dict, int], None],
    ):
        self.folder, self.logging_steps, self.writes, self.track = folder, logging_steps, writes, track
        self.processes = processes
        self.metrics = folder / "metrics.jsonl"
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (self.metrics, folder / "samples.jsonl", folder / "skipped.jsonl"):
                _keep_rows(path, start_step)
        self.start_interval()

    def step(
        self,
        step: int,
        epoch: float,
        loss: float,
        grad_norm: float,
        targets: int,
        is_bad: bool,
        replaced: int,
        rates: dict,
        batches: list,
    ) -> dict:
        """Note one optimizer step of this process's `batches`. is_bad: it was left out, because its loss or gradient was no
        number. replaced: how many records were, for their pictures. Returns what the progress bar shows."""
        if not is_bad:
            self.loss_sum += loss * targets
            self.targets += targets
        self.skipped_steps += is_bad
        self.replaced += replaced
        self.samples += sum(len(batch["ids"]) for batch in batches)
        self.tokens += sum(map(count_tokens, batches))
        seconds = max(time.perf_counter() - self.started, 1e-9)
        shown = {
            "loss": f"{loss:.3f}",
            "samples/s": f"{self.samples * self.processes / seconds:.1f}",
            "MB": f"{peak_memory_mb():.0f}",
        }
        self.pending = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": self.loss_sum / self.targets if self.targets else None,
            "grad_norm": _number(grad_norm),  # fp16 overflows now and then
            **rates,
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
        """Write the row of the steps since the last one, if there are any, and count anew: before something that takes time
        which is not training's, and at the end."""
        if self.pending:
            self._write(self.metrics, self.pending)
        self.start_interval()

    def skipped(self, step: int, reason: str, details: dict) -> None:
        """Write down, in skipped.jsonl, what of a step was not learned from."""
        self._write(self.folder / "skipped.jsonl", {"step": step, "reason": reason, **details})

    def validation(self, step: int, epoch: float, val_loss: float, samples: list[dict]) -> None:
        """Note an evaluation: the held-out loss, and a few generated answers. `flush` before it is made."""
        self._write(self.metrics, {"step": step, "epoch": round(epoch, 4), "val_loss": _number(val_loss)})
        for sample in samples:
            self._write(self.folder / "samples.jsonl", {"step": step, **sample})
        self.start_interval()

    def start_interval(self) -> None:
        """Count from here."""
        self.pending: dict | None = None
        self.loss_sum, self.targets, self.samples, self.tokens = 0.0, 0, 0, 0
        self.skipped_steps, self.replaced = 0, 0
        self.started = time.perf_counter()

    def _write(self, path: Path, row: dict) -> None:
        if not self.writes:
            return
        _append(path, json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if path == self.metrics:
            self.track({key: value for key, value in row.items() if key != "step"}, row["step"])

    def draw(self) -> None:
        """Draw curves.png anew."""
        if self.writes:
            picture = self.folder / "curves.png"
            try:
                draw_curves(self.metrics, picture)
            except OSError as error:
                raise _not_written(picture, error) from None


def _append(path: Path, line: bytes) -> None:
    """Add a line, the whole of it or nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(size)
            raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be written ({error.strerror}); make room there, and the same command goes on from the last "
        "checkpoint."
    )


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def peak_memory_mb() -> float:
    """The most memory that this process has used so far, in MiB: the GPU's where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def read_rows(path: Path) -> list[dict]:
    """The whole rows of a JSON Lines file that this module wrote; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _keep_rows(path: Path, last_step: int) -> None:
    """Drop what was written after the checkpoint from which the run goes on: those steps are made again."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= last_step]
        partial = path.with_suffix(".partial")
        try:
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _not_written(path, error) from None


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss (training and held out), learning rates, gradient norm and speed over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    rows = read_rows(metrics)
    trained = [row for row in rows if row.get("loss") is not None]
    held_out = [row for row in rows if "val_loss" in row]
    steps = [row["step"] for row in trained]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    loss, rate, norm, speed = axes.flat
    loss.plot(steps, [row["loss"] for row in trained], label="training", color="#4c72b0")
    if held_out:
        val_loss = [row["val_loss"] or math.nan for row in held_out]
        loss.plot([row["step"] for row in held_out], val_loss, "o-", label="held out", color="#dd8452")
    loss.set(title="loss per answer token", yscale="log")
    loss.legend()
    for name in [key for key in (trained[0] if trained else ()) if key.endswith("_lr")]:
        rate.plot(steps, [row[name] for row in trained], label=name)
    rate.set(title="learning rates")
    if trained:
        rate.legend()
    norm.plot(steps, [row["grad_norm"] or math.nan for row in trained], color="#55a868")
    norm.set(title="gradient norm before clipping", yscale="log")
    speed.plot(steps, [row["samples_per_s"] for row in trained], color="#8172b3")
    speed.set(title="samples per second", ylim=(0, None))
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
    plt.close(figure)
