"""curves.png: a run's metrics drawn over its steps. Reads no file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(runs: Sequence[tuple[str, list[dict]]], image: Path) -> None:
    """Draw loss (training and held out), learning rates, gradient norm and speed over the steps as a PNG, and the
    balance loss of experts if there are any.

    runs: (name, its rows of metrics.jsonl) of one run, or of each stage; stages are drawn one after the other. Raises
    OSError if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    rows: list[dict] = []
    starts: list[tuple[int, str]] = []
    first = 0
    for name, found in runs:
        if found:
            starts.append((first, name))
            rows += [row | {"step": first + row["step"]} for row in found]
            first = rows[-1]["step"]
    trained = [row for row in rows if row.get("loss") is not None]
    held_out = [row for row in rows if "val_loss" in row]
    balanced = [row for row in trained if row.get("balance_loss") is not None]
    figure, axes = plt.subplots(2, 3 if balanced else 2, figsize=(15 if balanced else 11, 7), layout="constrained")
    loss, rate, norm, speed = axes[:, :2].flat

    def draw(axis: Axes, found: list[dict], key: str, *style: str, **options: Any) -> None:
        values: list[float] = [math.nan if (value := row.get(key)) is None else value for row in found]
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
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_whole(image, content.getvalue())
    plt.close(figure)
