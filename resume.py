"""Where a run stands: the checkpoint to go on from, saving one, whether the run has ended. For train.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from assemble import Run
from config import Config, InputError, changed_keys, load_config, to_yaml
from evaluation.score import score_table
from model.build import save_processors
from model.checkpoint import (
    latest_checkpoint,
    load_state,
    prune_checkpoints,
    save_state,
    save_trained,
    verify_folder,
    write_folder,
)

# what a run writes into its folder, and so what is moved when another run takes the folder over
RUN_FILES = (
    "checkpoint-* final answers tensorboard wandb metrics.jsonl samples.jsonl curves.png *.unusable.jsonl .*.partial"
).split()


def find_checkpoint(config: Config, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the newest whole one (`auto`), the one named, or None to begin (`none`). A run of
    another config is not continued, and a finished run without checkpoints is not made again over itself."""
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
        if not (found / "state.safetensors").exists():
            raise InputError(
                f"{found}: holds a model but no training state, so a run cannot go on from it; name a checkpoint-<step>, "
                'or start a new run from it with "model.start_from".'
            )
    if found is not None:
        changed = changed_keys(load_config(found / "config.yaml"), config)
        if changed:
            raise InputError(
                f"{found}: belongs to a run of another config ({'; '.join(changed[:4])}). Go on with that config, or give "
                "another output_dir, or start anew with --resume none (the old run is moved aside, not deleted)."
            )
    return found


def move_aside(folder: Path, accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Move what an earlier run wrote into `folder` to `folder`/previous-<n>. Nothing else there is touched."""
    accelerator.wait_for_everyone()
    old = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    if old and accelerator.is_main_process:
        number = 1 + max([int(p.name[9:]) for p in folder.glob("previous-*") if p.name[9:].isdigit()], default=0)
        aside = folder / f"previous-{number}"
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        say(f"the run that was in {folder} is now in {aside}")
    accelerator.wait_for_everyone()


def is_finished(run: Run, resume_from: Path | None) -> bool:
    """Whether the run that would go on has ended already; if so, says how it ended."""
    final = run.config.output_dir / "final"
    scores = final / "scores.json"
    if resume_from != run.config.output_dir / f"checkpoint-{run.total_steps}" or not final.exists():
        return False
    if run.validation_set is not None and not scores.exists():
        return False  # it was interrupted while it was scored
    verify_folder(final)
    run.say(f"This run is finished: {final}. For a new one give another output_dir, or --resume none.")
    if scores.exists():
        run.say(score_table(json.loads(scores.read_text(encoding="utf-8"))))
    return True


def save_checkpoint(run: Run, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write checkpoint-<step>, then remove the oldest beyond save_total_limit."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {"step": step, "scaler": scaler and scaler.state_dict(), **run.identity}

        def write(folder: Path) -> None:
            write_model(run, folder)
            save_state(folder, run.built.model, optimizer.optimizer, state)

        write_folder(run.config.output_dir / f"checkpoint-{step}", write)
        prune_checkpoints(run.config.output_dir, run.config.train.save_total_limit)
    run.accelerator.wait_for_everyone()


def write_model(run: Run, folder: Path) -> None:
    """What answering needs: everything trained, the config, tokenizer and image processor."""
    (folder / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    save_trained(run.built.model, folder)
    save_processors(run.built, folder)


def write_final(run: Run, scores: dict | None) -> None:
    """Write final/: the trained model, and its scores once they are known."""

    def write(folder: Path) -> None:
        write_model(run, folder)
        if scores is not None:
            (folder / "scores.json").write_text(
                json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    if run.accelerator.is_main_process:
        write_folder(run.config.output_dir / "final", write)
    run.accelerator.wait_for_everyone()


def load_position(run: Run, optimizer: torch.optim.Optimizer, checkpoint: Path) -> int:
    """Fill the optimizer and the loss scaler; return the step to go on at. InputError where the data or the precision are
    not those of the run's first part."""
    state = load_state(checkpoint, run.built.model, optimizer.optimizer)
    for key, now in run.identity.items():
        if state[key] != now:
            raise InputError(
                f"{checkpoint}: the run began with {key} {state[key]}, now it is {now}: going on would not be the same run. "
                "Bring back what it began with, or start anew with --resume none."
            )
    if state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.say(f"going on from {checkpoint} at step {state['step']} of {run.total_steps}")
    return state["step"]
