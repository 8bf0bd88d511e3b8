"""What a run writes down while it trains: metrics.jsonl, samples.jsonl, skipped.jsonl, the progress bar, trackers,
curves.png."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import time
from collections.abc import Callable, Sequence
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
        balance_loss: float | None,
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
            if balance_loss is not None:
                self.balance_losses.append(balance_loss)
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
            **self._balance(),
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

    def _balance(self) -> dict[str, float]:
        """The experts' balance loss, a mean over steps; nothing where there are no experts."""
        found = self.balance_losses
        return {"balance_loss": sum(found) / len(found)} if found else {}

    def validation(self, step: int, epoch: float, values: dict[str, float], samples: list[dict]) -> None:
        """Note an evaluation: the held-out loss and what else is told of it, and a few generated answers. `flush` before it
        is made."""
        found = {f"val_{name}": _number(value) for name, value in values.items()}
        self._write(self.metrics, {"step": step, "epoch": round(epoch, 4), **found})
        for sample in samples:
            self._write(self.folder / "samples.jsonl", {"step": step, **sample})
        self.start_interval()

    def start_interval(self) -> None:
        """Count from here."""
        self.pending: dict | None = None
        self.loss_sum, self.targets, self.samples, self.tokens = 0.0, 0, 0, 0
        self.skipped_steps, self.replaced = 0, 0
        self.balance_losses: list[float] = []
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
                draw_curves([("", self.metrics)], picture)
            except OSError as error:
                raise not_written(picture, error) from None


def _append(path: Path, line: bytes) -> None:
    """Add a line, the whole of it or nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(size)
            raise not_written(path, error) from None


def not_written(path: Path, error: OSError) -> InputError:
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
            raise not_written(path, error) from None


def draw_curves(runs: Sequence[tuple[str, Path]], picture: Path) -> None:
    """Loss (training and held out), learning rates, gradient norm and speed over the steps, as a PNG; with experts their
    balance loss too. runs: (name, its metrics.jsonl) of one run, or of stages, which are drawn one behind the other."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    rows, starts, first = [], [], 0
    for name, metrics in runs:
        found = read_rows(metrics)
        if found:
            starts.append((first, name))
            rows += [row | {"step": first + row["step"]} for row in found]
            first = rows[-1]["step"]
    trained = [row for row in rows if row.get("loss") is not None]
    held_out = [row for row in rows if "val_loss" in row]
    balanced = [row for row in trained if row.get("balance_loss") is not None]
    figure, axes = plt.subplots(2, 3 if balanced else 2, figsize=(15 if balanced else 11, 7), layout="constrained")
    loss, rate, norm, speed = axes[:, :2].flat

    def draw(axis, found: list[dict], key: str, *style, **options) -> None:
        values = [row.get(key) if row.get(key) is not None else math.nan for row in found]
        axis.plot([row["step"] for row in found], values, *style, **options)

    draw(loss, trained, "loss", label="training", color="#4c72b0")
    if held_out:
        draw(loss, held_out, "val_loss", "o-", label="held out", color="#dd8452", markersize=4)
    loss.set(title="loss per answer token", yscale="log")
    loss.legend()
    for name in dict.fromkeys(key for row in trained for key in row if key.endswith("_lr")):
        draw(rate, trained, name, label=name)
    rate.set(title="learning rates")
    if trained:
        rate.legend()
    draw(norm, trained, "grad_norm", color="#55a868")
    norm.set(title="gradient norm before clipping", yscale="log")
    draw(speed, trained, "samples_per_s", color="#8172b3")
    speed.set(title="samples per second", ylim=(0, None))
    if balanced:
        right, balance = axes[:, 2]
        draw(right, held_out, "val_token_accuracy", "o-", color="#dd8452", markersize=4)
        right.set(title="answer tokens that are right, held out", ylim=(0, 1))
        draw(balance, balanced, "balance_loss", color="#c44e52")
        balance.set(title="balance loss of the experts")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        for start, name in starts if len(starts) > 1 else ():
            axis.axvline(start, color="#888888", linewidth=0.8, linestyle="--")
            axis.annotate(name, (start, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
                          va="top", fontsize=8, color="#666666")  # fmt: skip
    figure.savefig(picture, dpi=110)
    plt.close(figure)
