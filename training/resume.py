"""Find the checkpoint from which a run resumes, record the start, save, mark finished."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import gather_object

from config import Config, InputError, changed_keys, is_extendable, nearest_path, to_yaml
from config.files import open_regular
from evaluation.score import score_table
from model.build import save_processors
from model.checkpoint import save_trained, trained_bytes
from model.checkpoint_folder import (
    MANIFEST,
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    read_json,
    replace_text,
    verify_folder,
    weights_digest,
    write_folder,
)
from training.digests import is_same_digest
from training.processes import on_main, print_main
from training.provenance import (
    equal_contents,
    model_names,
    saved_config,
    start_entry,
    without_absolute_paths,
)
from training.run import Run
from training.run_folder import NO_HISTORY
from training.sharding import gathered_for_saving
from training.state import Position, load_state, save_state, state_bytes

# keys of the fingerprint that checkpoints of earlier versions lack -> what they are digests of
_MEANS_AUTO = ("latest", "last", "newest", "true", "yes", "on", "checkpoint", "resume")
LISTED = 20  # keys that a message names at most
WEIGHT_DIGESTS = {
    "vision_tower_sha256": " (the safetensors files and config.json of model.vision_tower)",
    "language_model_sha256": " (the safetensors files and config.json of model.language_model)",
}


def record_start(run: Run, resume_from: Path | None, command: Sequence[str]) -> None:
    """Append this start to <run>/run.json, which is copied into every folder that the run writes from now on."""
    path = run.config.output_dir / "run.json"

    def record() -> None:
        # a run that resumes from another run's folder continues its history too
        earlier = path if path.exists() or resume_from is None else resume_from / path.name
        starts = read_json(earlier, NO_HISTORY) if earlier.exists() else []
        if not isinstance(starts, list):
            raise InputError(f"{earlier}: not a list of starts; {NO_HISTORY}.")
        entry = start_entry(
            command=without_absolute_paths(command, path.parent),
            step=run.position.step,
            resumed_from=None if resume_from is None else os.path.relpath(resume_from, path.parent),
            processes=run.accelerator.num_processes,
            config_text=to_yaml(run.config, relative_to=path.parent),
            digests=model_names(run.config.model)
            | {key: value for key, value in run.fingerprint.items() if key.endswith("_sha256")},
        )
        start_from = run.config.model.start_from
        # absent when a resumed run no longer needs it
        if start_from is not None and (start_from / MANIFEST).exists():
            entry["start_from_sha256"] = weights_digest(start_from)
        replace_text(path, json.dumps([*starts, entry], indent=1, ensure_ascii=False) + "\n")

    on_main(record)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def find_checkpoint(config: Config, resume: str, extends: bool = False) -> Path | None:
    """Find the checkpoint to resume from: the newest intact one (`auto`), the one named, or None to start (`none`).

    extends: the config may have another length and other data than the checkpoint's (`is_extendable`). Raises InputError for
    a checkpoint of another config, for a finished run whose checkpoints are gone, which would be trained again over itself,
    and for a checkpoint that another machine of the run does not find. Only the main process looks, and it reads each file
    once.
    """
    found = on_main(lambda: _find_checkpoint(config, resume, extends=extends))
    if found is not None:
        check_shared(found)
    return found


def check_shared(folder: Path) -> None:
    """Raise InputError, on every process, if some process does not find the checkpoint that the main one has found."""
    try:
        with open_regular(folder / MANIFEST) as file:
            content = file.read()
    except (OSError, InputError):
        content = None
    seen = gather_object([(platform.node(), content)])
    if others := sorted({host for host, other in seen if other != seen[0][1]}):
        raise InputError(
            f"{folder}: is missing or different on {', '.join(others)}, while {seen[0][0]} has it. Every machine of a run "
            "reads it: put it on a disk that all of them share, or copy it to the same path on each machine."
        )


def _find_checkpoint(config: Config, resume: str, extends: bool) -> Path | None:
    folder = config.output_dir
    if resume == "none":
        return None
    if resume == "auto":
        found = latest_checkpoint(folder, print_main)
        if found is None and (folder / "final").exists():
            raise InputError(
                f"{folder / 'final'}: a finished run whose checkpoints are gone. Give another output_dir, with this folder "
                "as model.start_from to train its weights further, or start over with --resume none (the old run is moved "
                "aside, not deleted)."
            )
    else:
        found = Path(resume).resolve()
        if not found.exists():
            meant = "auto" if resume.lower() in _MEANS_AUTO else None
            hint = f'; did you mean "{meant}"?' if meant else nearest_path(found, checkpoints(folder))
            raise InputError(
                f"--resume {resume}: {found} does not exist{hint} Give auto, none or a checkpoint's folder."
            )
        verify_folder(found)
    if found is None:
        if extends:
            raise InputError(f"--extend: {folder} holds no checkpoint to resume from; to start the run, leave it out.")
        return None
    if not (found / "state.safetensors").exists():
        raise InputError(
            f"{found}: holds a model but no training state, so no run can resume from it; name a checkpoint-<step>, or "
            'start a new run from it with "model.start_from".'
        )
    saved = saved_config(found)
    changed = changed_keys(saved, config, equal_contents(found, saved, config))
    refused = {key: text for key, text in changed.items() if not (extends and is_extendable(key))}
    if refused:
        lines = list(refused.values())
        more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        advice = (
            "To train the same run longer or on more data, add --extend. " if all(map(is_extendable, refused)) else ""
        )
        raise InputError(
            "\n  ".join([f"{found}: belongs to a run of another config:", *lines[:LISTED], *more])
            + f"\n{advice}Resume with that config, or give another output_dir, or start over with --resume none (the old "
            "run is moved aside, not deleted)."
        )
    return found


def load_position(run: Run, checkpoint: Path, extends: bool = False) -> Position:
    """Load the optimizer and the loss scaler from a checkpoint, and return the position.

    extends: the data may have changed, to as many records or more. Raises InputError if data, precision or released weights
    are not those that the run began with.
    """
    state = load_state(checkpoint, run.model, run.optimizer.optimizer)
    unrecorded = [key for key in WEIGHT_DIGESTS if key in run.fingerprint and key not in state]
    if unrecorded:
        print_main(f"{checkpoint}: records no digest of the released weights, so changes of these are not noticed")
    if extends:
        _extend_data(run, checkpoint, state)
        unrecorded += ["qa_sha256", "records"]  # they may change
    for key, now in run.fingerprint.items():
        if key not in unrecorded and not is_same_digest(state.get(key), now):
            if key in ("qa_sha256", "records"):
                raise InputError(_other_data(run, checkpoint, state))
            raise InputError(
                f"{checkpoint}: the run began with {key} {state.get(key)!r:.80}, now it is {now}"
                f"{WEIGHT_DIGESTS.get(key, '')}: resuming would not continue the same run. Restore what it began with "
                "(undo the edit, or put the old files back), or start over with --resume none."
            )
    if extends and state["step"] > run.total_steps:
        raise InputError(
            f"--extend: the run has trained {state['step']} steps already, and this config ends at step "
            f"{run.total_steps}; raise train.num_train_epochs or train.max_steps."
        )
    if state["step"] > run.total_steps:
        raise InputError(
            f'{checkpoint / "state.json"}: "step" is {state["step"]!r:.20}, but the run has {run.total_steps} steps; use '
            "another checkpoint."
        )
    scaler, saved = run.accelerator.scaler, state.get("scaler")
    if _keys(saved) != _keys(scaler and scaler.state_dict()):
        raise InputError(f'{checkpoint / "state.json"}: "scaler" does not fit this precision; use another checkpoint.')
    if scaler is not None:
        scaler.load_state_dict(saved)
    print_main(f"resuming from {checkpoint} at step {state['step']} of {run.total_steps}")
    bad_steps = state.get("bad_steps")
    if type(bad_steps) is not int or bad_steps < 0:
        raise InputError(f'{checkpoint / "state.json"}: "bad_steps" is not a count; use another checkpoint.')
    planned = state.get("total_steps")
    return Position(state["step"], bad_steps, planned_steps=planned if type(planned) is int else None)


def _other_data(run: Run, checkpoint: Path, state: dict) -> str:
    """Return the message about training data that are not those of the checkpoint."""
    file, digests = run.config.data.qa_file, (str(state.get("qa_sha256")), str(run.fingerprint["qa_sha256"]))
    before, now = state.get("records"), run.fingerprint["records"]
    may_extend = type(before) is not int or now >= before
    return (
        f"{checkpoint}: the training data have changed since the run began:\n"
        f"  records: {before!s:.20} -> {now} (data.qa_file: {file})\n"
        f"  SHA-256: {digests[0]:.12}... -> {digests[1]:.12}...\n"
        + ("To train the same run on more data, add --extend. " if may_extend else "")
        + "Put the old data back, or start over with --resume none (the old run is moved aside, not deleted)."
    )


def _extend_data(run: Run, checkpoint: Path, state: dict) -> None:
    """Print what an extended run reads from now on, if its data has changed. Raises InputError if there are fewer records.

    The samples of every further step are those that a run on the new data reads at this step (`SampleOrder`), so that the
    position in the data needs no history: a run that is extended, killed and resumed reads the same samples.
    """
    before, now = state.get("records"), run.fingerprint["records"]
    if state.get("qa_sha256") == run.fingerprint["qa_sha256"] and before == now:
        return
    if type(before) is not int or now < before:
        raise InputError(
            f"{checkpoint}: --extend: the run began with {before} records and now has {now}; it may only get more. To "
            "train its weights on other data, start another run with model.start_from."
        )
    step = state["step"]
    print_main(
        f"extended data: {before:,} records before, {now:,} now. Every further step reads what a run on the new data reads "
        f"at that step: step {step} is {run.epoch(step):.2f} epochs into it, and every pass over the data that begins from "
        "now on includes the new records."
    )


def _keys(values: object) -> set[str] | None:
    return set(values) if isinstance(values, dict) else None


def is_finished(run: Run, resume_from: Path | None) -> bool:
    """Return whether the run has finished already; if so, print its result."""
    final, last = run.config.output_dir / "final", run.config.output_dir / f"checkpoint-{run.total_steps}"
    if resume_from is None or resume_from.resolve() != last.resolve() or not final.exists():
        return False
    if run.validation_set is not None and not (final / "scores.json").exists():
        return False  # it was interrupted while it was scored
    on_main(lambda: verify_folder(final))
    if on_main(lambda: weights_digest(final, model_only=True) != weights_digest(last, model_only=True)):
        return False  # final/ is from before the run was extended
    print_finished(final)
    state = on_main(lambda: read_json(last / "state.json"))
    if isinstance(state, dict) and not is_same_digest(state.get("qa_sha256"), run.fingerprint["qa_sha256"]):
        print_main(
            f"note: the training data have changed since: {state.get('records')!s:.20} records -> "
            f"{run.fingerprint['records']}; the model has not seen the new ones. --extend trains on them."
        )
    return True


def print_finished(final: Path) -> None:
    """Print that the run which ended with `final` needs nothing more, and its scores."""
    print_main(
        f"This run is finished: {final}. To train it longer, raise train.num_train_epochs or train.max_steps and add "
        "--extend. For a new one give another output_dir, or --resume none."
    )
    scores = final / "scores.json"
    if scores.exists():
        print_main(score_table(read_json(scores)))


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(run: Run) -> None:
    """Write checkpoint-<step>, then remove the oldest checkpoints beyond save_total_limit."""
    model, optimizer, origins = run.model, run.optimizer.optimizer, run.built.origins
    scaler, position = run.accelerator.scaler, run.position
    state = {
        "step": position.step,
        "bad_steps": position.bad_steps,
        "scaler": scaler and scaler.state_dict(),
        "total_steps": run.total_steps,
        **run.fingerprint,
    }

    def write(folder: Path) -> None:
        write_model(run, folder)
        save_state(folder, model, optimizer, state=state)

    def save() -> None:
        room = trained_bytes(model, origins) + state_bytes(model, optimizer)
        write_folder(run.config.output_dir / f"checkpoint-{position.step}", write, room)
        prune_checkpoints(run.config.output_dir, run.config.train.save_total_limit, print_main)

    run.accelerator.wait_for_everyone()
    with gathered_for_saving(model, origins, optimizer):
        on_main(save)


def write_model(run: Run, folder: Path) -> None:
    """Write everything that answering needs (weights, config, tokenizer, image processor), and the run's history.

    Weights come last: if the disk has no room for them, the other files have shown how much is needed.
    """
    (folder / "config.yaml").write_text(config_text(run, folder), encoding="utf-8")
    if (run.config.output_dir / "run.json").exists():
        shutil.copyfile(run.config.output_dir / "run.json", folder / "run.json")
    save_processors(run.built, folder)
    save_trained(run.model, run.built.origins, folder)


def config_text(run: Run, folder: Path) -> str:
    """Return the run's config.yaml in `folder`, with a heading that names the released models and their SHA-256."""
    lines = ["# Paths are relative to this folder. If a model is not there, it is looked for by its name and SHA-256."]
    for part, name in model_names(run.config.model).items():
        digest = run.fingerprint.get(f"{part}_sha256", "not recorded")
        lines.append(f"# model.{part}: {json.dumps(name, ensure_ascii=False)}, SHA-256 {digest}")
    return "\n".join([*lines, to_yaml(run.config, relative_to=folder)])


def write_final(run: Run, scores: dict | None = None) -> None:
    """Write final/: the trained model, and its scores once they are known."""
    _write_with(run, "final", "scores.json", values=scores)


def write_best(run: Run, val_loss: float) -> None:
    """Write best/: the model with the lowest held-out loss so far; best.json says at which step, and on which file."""
    values: dict[str, int | float | str] = {"step": run.position.step, "val_loss": val_loss}
    if run.validation_sha256 is not None:
        values["validation_sha256"] = run.validation_sha256
    _write_with(run, "best", "best.json", values=values)


def lowest_val_loss(output_dir: Path, validation_sha256: str | None = None) -> float:
    """Return the held-out loss of best/; infinity if best/ does not exist, or if it is damaged or was measured on another
    validation file, which is reported. validation_sha256: of the file of now."""

    def read() -> float:
        folder = output_dir / "best"
        if not folder.exists():
            return math.inf
        try:
            verify_folder(folder, hashes=False)
            value = read_json(folder / "best.json")
            loss = value.get("val_loss") if isinstance(value, dict) else None
            if not isinstance(loss, float) or not math.isfinite(loss):
                raise InputError(f'{folder / "best.json"}: "val_loss" is not a finite number.')
            if value.get("validation_sha256", validation_sha256) != validation_sha256:
                print_main(f"{folder}: its loss is of another validation file; the next evaluation replaces it")
                return math.inf
            return loss
        except InputError as error:
            print_main(f"the next evaluation replaces a damaged folder: {error}")
            return math.inf

    return on_main(read)


def _write_with(run: Run, name: str, file: str, values: dict | None) -> None:
    def write(folder: Path) -> None:
        write_model(run, folder)
        if values is not None:
            (folder / file).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    run.accelerator.wait_for_everyone()
    with gathered_for_saving(run.model, run.built.origins):
        room = trained_bytes(run.model, run.built.origins)
        on_main(lambda: write_folder(run.config.output_dir / name, write, room))
