"""A run in stages: each is a run of its own, in <run>/stages/<name>/, that starts from the final/ of the one before. What
the last one ended with is put into <run>/ itself, beside the log and the curves of all. For train.py."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import PartialState

from config import Config, InputError, StageConfig, changed_keys, load_config, nearest
from dataprocess.train_tokenizer import learn_if_missing
from evaluation.runlog import draw_curves, not_written, read_rows
from model.folder import MANIFEST, read_json, replace_text, verify_folder, weights_digest, write_folder
from resume import NO_HISTORY, RunLock, move_aside, on_main, say_finished


def run_stages(
    config: Config,
    arguments: argparse.Namespace,
    run: Callable[[Config, argparse.Namespace], int],
    look_ahead: Callable[[Config, Callable[[str], None]], None],
) -> int:
    """Train the stages of `config` in their order, or `arguments.stage` alone, each by `run(its config, arguments)`; a
    finished one is passed over. Returns what the first of them that was stopped ended with, or 0.

    look_ahead: refuses a stage's data, by an InputError, before an earlier one trains. InputError also where a stage has
    nothing to start from, or was trained on top of something else than is there now.
    """
    stages = config.train.stages
    chosen = _chosen(stages, arguments)
    with contextlib.nullcontext() if arguments.check else RunLock(config.output_dir, _say):
        if arguments.resume == "none" and arguments.stage is None and not arguments.check:
            # all of it now: a run that is stopped in its first stage must not find the old run's later ones
            for folder in (config.output_dir, *(stage.config.output_dir for stage in stages)):
                move_aside(folder, _say)
        # from the data of all stages, whichever of them trains now
        if size := on_main(lambda: learn_if_missing([stage.config for stage in stages])):
            _say(f"learned a tokenizer of {size:,} tokens: {config.model.from_scratch.tokenizer}")
        if arguments.check:
            return _check(stages, chosen, arguments, run)
        ended, is_first = 0, True
        for number in chosen:
            _say(f"\nstage {number + 1} of {len(stages)}: {stages[number].name}")
            stage = _with_start(stages, number, arguments)
            if arguments.resume == "auto" and on_main(lambda stage=stage: _is_over(stage)):
                say_finished(stage.output_dir / "final", _say)
                continue
            if is_first:
                for later in chosen[chosen.index(number) + 1 :]:
                    with _named(stages[later]):
                        look_ahead(stages[later].config, _say)
            is_first = False
            ended = run(stage, arguments)
            if ended:
                break
        on_main(lambda: _publish(config))
    if not ended and chosen[-1] == len(stages) - 1:
        _say(f"\nthe model that all stages together made: {config.output_dir / 'final'}")
    return ended


def _check(stages: tuple[StageConfig, ...], chosen: list[int], arguments: argparse.Namespace, run: Callable) -> int:
    """Look at all chosen stages, then say what is wrong with any of them."""
    wrong = []
    for number in chosen:
        _say(f"\nstage {number + 1} of {len(stages)}: {stages[number].name}")
        try:
            with _named(stages[number]):
                run(_with_start(stages, number, arguments), arguments)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("\n\n".join(wrong))
    return 0


@contextlib.contextmanager
def _named(stage: StageConfig) -> Iterator[None]:
    """Inside, an InputError says which stage it is of."""
    try:
        yield
    except InputError as error:
        raise InputError(f'stage "{stage.name}": {error}') from None


def _is_over(config: Config) -> bool:
    """Whether a stage of this very config has ended. Its data and its checkpoints may be gone since."""
    final = config.output_dir / "final"
    if not final.exists() or (config.data.validation_file is not None and not (final / "scores.json").exists()):
        return False
    verify_folder(final)
    return not changed_keys(load_config(final / "config.yaml"), config)


def place_of(stages: tuple[StageConfig, ...], name: str) -> int:
    """Where the stage of that name stands among `stages`. InputError where there is none."""
    names = [stage.name for stage in stages]
    if not names:
        raise InputError(f'--stage {name}: the config has no stages; list them under "train.stages".')
    if name not in names:
        raise InputError(f"--stage {name}: no such stage; there are {', '.join(names)}{nearest(name, names)}")
    return names.index(name)


def _chosen(stages: tuple[StageConfig, ...], arguments: argparse.Namespace) -> list[int]:
    """Which stages to run, by their places."""
    if arguments.stage is not None:
        return [place_of(stages, arguments.stage)]
    if arguments.resume not in ("auto", "none"):
        raise InputError(f"--resume {arguments.resume}: say which stage goes on from it, with --stage NAME.")
    return list(range(len(stages)))


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a stage starts from


def _with_start(stages: tuple[StageConfig, ...], number: int, arguments: argparse.Namespace) -> Config:
    """The stage's config, starting from the final/ of the stage before."""
    stage = stages[number]
    if number == 0:
        return stage.config
    before = stages[number - 1]
    final = before.config.output_dir / "final"
    if not final.exists():
        if arguments.check:  # nothing has trained yet; all the same everything can be looked at
            free = tuple(dataclasses.asdict(stage.config.train.trainable).keys() - {"vision_tower"})
            train = dataclasses.replace(stage.config.train, freeze_random=free)
            return dataclasses.replace(stage.config, train=train)
        raise InputError(
            f'stage "{stage.name}" starts from stage "{before.name}", which has not ended: there is no {final}. Train it '
            f"first (--stage {before.name}, or without --stage all of them)."
        )
    if arguments.resume != "none":
        on_main(lambda: _refuse_stale(stage, before, final))
    return dataclasses.replace(stage.config, model=dataclasses.replace(stage.config.model, start_from=final))


def _refuse_stale(stage: StageConfig, before: StageConfig, final: Path) -> None:
    """InputError where the stage has begun, on top of another `final` than is there now."""
    history = stage.config.output_dir / "run.json"
    if not history.exists():
        return
    starts = read_json(history, NO_HISTORY)
    last = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
    began_with = last.get("start_from_sha256")
    if began_with is not None and began_with != weights_digest(final):
        raise InputError(
            f'{stage.config.output_dir}: stage "{stage.name}" was trained on top of another "{before.name}" than is in '
            f"{final} now, which was trained anew since. Train it anew as well: --stage {stage.name} --resume none."
        )


# ---------------------------------------------------------------------------------------------------------------------
# What the whole run leaves


def _publish(config: Config) -> None:
    """<run>/metrics.jsonl and curves.png, of all stages, and <run>/final, what the last one ended with; made anew where they
    are not up to date."""
    logs = [(stage.name, stage.config.output_dir / "metrics.jsonl") for stage in config.train.stages]
    rows = [{"stage": name, **row} for name, path in logs for row in read_rows(path)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    metrics, picture = config.output_dir / "metrics.jsonl", config.output_dir / "curves.png"
    if not metrics.exists() or metrics.read_text(encoding="utf-8") != text:
        try:
            draw_curves(logs, picture)
        except OSError as error:
            raise not_written(picture, error) from None
        replace_text(metrics, text)  # last: it says that both are up to date
    last, final = config.train.stages[-1].config.output_dir / "final", config.output_dir / "final"
    is_there = (final / MANIFEST).exists()
    if last.exists() and not (is_there and read_json(final / MANIFEST) == read_json(last / MANIFEST)):
        verify_folder(last)
        write_folder(final, lambda folder: _copy(last, folder))


def _copy(source: Path, target: Path) -> None:
    """The files of a model's folder, all but its manifest. As further names of the same files where the disk has that:
    they are never written to again."""
    for path in source.rglob("*"):
        to = target / path.relative_to(source)
        if path.is_dir():
            to.mkdir(parents=True, exist_ok=True)
        elif path.name != MANIFEST:
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, to)
            except OSError:
                shutil.copyfile(path, to)
