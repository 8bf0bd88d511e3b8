"""Where a run stands: the checkpoint to go on from, saving one, whether the run has ended. For train.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

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


def find_checkpoint(config: Config, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the newest whole one (`auto`), the one named, or none. A run of another config in the
    same folder is not continued; with `none` it is moved aside, never overwritten."""
    folder = config.output_dir
    if resume == "none":
        if PartialState().is_main_process:
            move_aside(folder, say)
        PartialState().wait_for_everyone()
        return None
    if resume == "auto":
        found = latest_checkpoint(folder, say)
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


def move_aside(folder: Path, say: Callable[[str], None]) -> None:
    old = [path for path in folder.glob("*") if not path.name.startswith("previous-")]
    if old:
        number = 1 + max([int(p.name[9:]) for p in folder.glob("previous-*") if p.name[9:].isdigit()], default=0)
        aside = folder / f"previous-{number}"
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        say(f"the run that was in {folder} is now in {aside}")


def is_finished(run: Run, resume_from: Path | None) -> bool:
    """Whether the run that would go on has ended already; if so, says how it ended."""
    final = run.config.output_dir / "final"
    if resume_from != run.config.output_dir / f"checkpoint-{run.total_steps}" or not final.exists():
        return False
    verify_folder(final)
    run.say(f"This run is finished: {final}. For a new one give another output_dir, or --resume none.")
    if (final / "scores.json").exists():
        run.say(score_table(json.loads((final / "scores.json").read_text(encoding="utf-8"))))
    return True


def save_checkpoint(run: Run, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write checkpoint-<step>, then remove the oldest beyond save_total_limit."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler

        def write(folder: Path) -> None:
            write_model(run, folder)
            save_state(
                folder, run.built.model, optimizer.optimizer, {"step": step, "scaler": scaler and scaler.state_dict()}
            )

        write_folder(run.config.output_dir / f"checkpoint-{step}", write)
        prune_checkpoints(run.config.output_dir, run.config.train.save_total_limit)
    run.accelerator.wait_for_everyone()


def write_model(run: Run, folder: Path) -> None:
    """What answering needs: everything trained, the config, tokenizer and image processor."""
    (folder / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
    save_trained(run.built.model, folder)
    save_processors(run.built, folder)


def load_position(run: Run, optimizer: torch.optim.Optimizer, checkpoint: Path) -> int:
    """Fill the optimizer and the loss scaler; return the step to go on at."""
    state = load_state(checkpoint, run.built.model, optimizer.optimizer)
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.say(f"going on from {checkpoint} at step {state['step']} of {run.total_steps}")
    return state["step"]
