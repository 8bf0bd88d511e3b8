"""Where a run stands: the folder that is its own, the checkpoint to go on from, saving one, whether it has ended. For
train.py."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from assemble import Run
from config import Config, InputError, changed_keys, load_config, to_yaml
from evaluation.provenance import start_entry, utc_now
from evaluation.score import score_table
from model.build import save_processors
from model.checkpoint import load_state, save_state, save_trained, state_bytes, trained_bytes
from model.folder import (
    MANIFEST,
    disk_full,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    recover,
    replace_text,
    verify_folder,
    weights_digest,
    write_folder,
)
from model.parallel import whole

# what a run writes into its folder, and so what is moved when another run takes the folder over
RUN_FILES = (
    "checkpoint-* best final answers tensorboard wandb metrics.jsonl samples.jsonl skipped.jsonl run.json curves.png"
).split()
NO_HISTORY = "remove it, it only tells how the run came about"

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every process. Its InputError too: no process waits for one that has
    stopped."""
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except InputError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


class RunLock:
    """`with RunLock(output_dir, say):` the folder is this run's alone, and what a kill left in it is in order. The main
    process holds it for all. InputError where another run holds it.

    A record lock (fcntl): it belongs to the process, not to the open file as flock's does, so that the loader's workers,
    which are forked while it is held, never hold it; the kernel frees it at the process's end, however that comes.
    """

    def __init__(self, output_dir: Path, say: Callable[[str], None]) -> None:
        self.output_dir, self.path, self.say = output_dir, output_dir / ".lock", say
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        on_main(self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)  # the file stays: were it removed, two runs could hold two files of one name
            self._handle = None

    def _take(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise InputError(
                f"{self.output_dir}: no run can write there ({disk_full(error) or error.strerror}); give another output_dir."
            ) from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(handle, 1000, 0).decode(errors="replace")
                os.close(handle)
                raise InputError(f"{self.output_dir}: another run writes there{_named(holder)}") from None
            self.say(f"{self.path}: this disk has no locks ({error.strerror}); start no second run in this folder.")
        self._handle = handle
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": platform.node(), "started": utc_now()}).encode(), 0)
        recover(self.output_dir)


def _named(holder: str) -> str:
    try:
        found = json.loads(holder)
        who = f" (process {found['pid']:d} on {found['host']!s:.64}, since {found['started']!s:.32})"
    except (ValueError, KeyError, TypeError):  # it is just being written
        who = ""
    return f"{who}. Wait for its end or stop it, or give another output_dir."


def move_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Move what an earlier run wrote into `folder` to `folder`/previous-<n>. Nothing else there is touched."""

    def move() -> None:
        old = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
        if not old:
            return
        number = 1 + max([int(p.name[9:]) for p in folder.glob("previous-*") if p.name[9:].isdigit()], default=0)
        aside = folder / f"previous-{number}"
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        say(f"the run that was in {folder} is now in {aside}")

    on_main(move)


def record_start(run: Run, resume_from: Path | None, step: int, command: Sequence[str]) -> None:
    """Append this start to <run>/run.json, which goes into every folder that the run writes from then on."""
    path = run.config.output_dir / "run.json"

    def record() -> None:
        # a run that goes on from another run's folder goes on with its history as well
        earlier = path if path.exists() or resume_from is None else resume_from / path.name
        starts = read_json(earlier, NO_HISTORY) if earlier.exists() else []
        if not isinstance(starts, list):
            raise InputError(f"{earlier}: no list of starts; {NO_HISTORY}.")
        entry = start_entry(
            command, step, resume_from, run.accelerator.num_processes, to_yaml(run.config), run.identity["qa_sha256"]
        )
        start_from = run.config.model.start_from
        if start_from is not None and (start_from / MANIFEST).exists():  # a run that goes on does without it
            entry["start_from_sha256"] = weights_digest(start_from)
        replace_text(path, json.dumps([*starts, entry], indent=1, ensure_ascii=False) + "\n")

    on_main(record)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def find_checkpoint(config: Config, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the newest whole one (`auto`), the one named, or None to begin (`none`). A run of
    another config is not continued, and a finished run without checkpoints is not made again over itself. Only the main
    process looks, and reads each file once."""
    return on_main(lambda: _find_checkpoint(config, resume, say))


def _find_checkpoint(config: Config, resume: str, say: Callable[[str], None]) -> Path | None:
    folder = config.output_dir
    if resume == "none":
        return None
    if resume == "auto":
        found = latest_checkpoint(folder, say)
        if found is None and (folder / "final").exists():
            raise InputError(
                f"{folder / 'final'}: a finished run, whose checkpoints are gone. Give another output_dir, or start "
                "anew with --resume none (the old run is moved aside, not deleted)."
            )
    else:
        found = Path(resume).resolve()
        verify_folder(found)
    if found is None:
        return None
    if not (found / "state.safetensors").exists():
        raise InputError(
            f"{found}: holds a model but no training state, so a run cannot go on from it; name a checkpoint-<step>, "
            'or start a new run from it with "model.start_from".'
        )
    changed = changed_keys(load_config(found / "config.yaml"), config)
    if changed:
        raise InputError(
            f"{found}: belongs to a run of another config ({'; '.join(changed[:4])}). Go on with that config, or give "
            "another output_dir, or start anew with --resume none (the old run is moved aside, not deleted)."
        )
    return found


def load_position(run: Run, optimizer: torch.optim.Optimizer, checkpoint: Path) -> tuple[int, int]:
    """Fill the optimizer and the loss scaler; return the step to go on at, and how many bad steps in a row were before it.
    InputError where the data or the precision are not those of the run's first part."""
    state = load_state(checkpoint, run.built.model, optimizer.optimizer)
    for key, now in run.identity.items():
        if state.get(key) != now:
            raise InputError(
                f"{checkpoint}: the run began with {key} {state.get(key)!r:.80}, now it is {now}: going on would not be "
                "the same run. Bring back what it began with, or start anew with --resume none."
            )
    if state["step"] > run.total_steps:
        raise InputError(
            f'{checkpoint / "state.json"}: "step" is {state["step"]!r:.20}, but the run has {run.total_steps} steps; use '
            "another checkpoint."
        )
    scaler, saved = run.accelerator.scaler, state.get("scaler")
    if _keys(saved) != _keys(scaler and scaler.state_dict()):
        raise InputError(f'{checkpoint / "state.json"}: "scaler" is of another kind of run; use another checkpoint.')
    if scaler is not None:
        scaler.load_state_dict(saved)
    run.say(f"going on from {checkpoint} at step {state['step']} of {run.total_steps}")
    bad_steps = state.get("bad_steps")
    if type(bad_steps) is not int or bad_steps < 0:
        raise InputError(f'{checkpoint / "state.json"}: "bad_steps" is no count; use another checkpoint.')
    return state["step"], bad_steps


def _keys(value: object) -> set | None:
    return set(value) if isinstance(value, dict) else None


def is_finished(run: Run, resume_from: Path | None) -> bool:
    """Whether the run that would go on has ended already; if so, says how it ended."""
    final = run.config.output_dir / "final"
    scores = final / "scores.json"
    if resume_from != run.config.output_dir / f"checkpoint-{run.total_steps}" or not final.exists():
        return False
    if run.validation_set is not None and not scores.exists():
        return False  # it was interrupted while it was scored
    on_main(lambda: verify_folder(final))
    say_finished(final, run.say)
    return True


def say_finished(final: Path, say: Callable[[str], None]) -> None:
    """That the run that ended with `final` needs no more, and how it ended."""
    say(f"This run is finished: {final}. For a new one give another output_dir, or --resume none.")
    scores = final / "scores.json"
    if scores.exists():
        say(score_table(read_json(scores)))


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(run: Run, optimizer: torch.optim.Optimizer, step: int, bad_steps: int) -> None:
    """Write checkpoint-<step>, then remove the oldest beyond save_total_limit. bad_steps: how many in a row stand before."""
    model, scaler = run.built.model, run.accelerator.scaler
    state = {"step": step, "bad_steps": bad_steps, "scaler": scaler and scaler.state_dict(), **run.identity}

    def write(folder: Path) -> None:
        write_model(run, folder)
        save_state(folder, model, optimizer.optimizer, state)

    def save() -> None:
        room = trained_bytes(model) + state_bytes(model, optimizer.optimizer)
        write_folder(run.config.output_dir / f"checkpoint-{step}", write, room)
        prune_checkpoints(run.config.output_dir, run.config.train.save_total_limit, run.say)

    run.accelerator.wait_for_everyone()
    with whole(model, optimizer.optimizer):
        on_main(save)


def write_model(run: Run, folder: Path) -> None:
    """What answering needs: everything trained, the config, tokenizer and image processor; and how it came about. Weights
    come last: where there is no room for them, the rest has shown what it takes."""
    (folder / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    if (run.config.output_dir / "run.json").exists():
        shutil.copyfile(run.config.output_dir / "run.json", folder / "run.json")
    save_processors(run.built, folder)
    save_trained(run.built.model, folder)


def write_final(run: Run, scores: dict | None) -> None:
    """Write final/: the trained model, and its scores once they are known."""
    _write_with(run, "final", "scores.json", scores)


def write_best(run: Run, step: int, val_loss: float) -> None:
    """Write best/, like final/: the model whose held-out loss is the lowest so far, and best.json, which says which."""
    _write_with(run, "best", "best.json", {"step": step, "val_loss": val_loss})


def best_val_loss(run: Run) -> float:
    """The held-out loss of best/; infinity where there is no best/ yet, or a damaged one, which is said."""

    def read() -> float:
        folder = run.config.output_dir / "best"
        if not folder.exists():
            return math.inf
        try:
            verify_folder(folder, hashes=False)
            value = read_json(folder / "best.json")
            loss = value.get("val_loss") if isinstance(value, dict) else None
            if not isinstance(loss, float) or not math.isfinite(loss):
                raise InputError(f'{folder / "best.json"}: "val_loss" is no number.')
            return loss
        except InputError as error:
            run.say(f"the next validation takes the place of a damaged folder: {error}")
            return math.inf

    return on_main(read)


def _write_with(run: Run, name: str, file: str, values: dict | None) -> None:
    def write(folder: Path) -> None:
        write_model(run, folder)
        if values is not None:
            (folder / file).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    run.accelerator.wait_for_everyone()
    with whole(run.built.model):
        on_main(lambda: write_folder(run.config.output_dir / name, write, trained_bytes(run.built.model)))
