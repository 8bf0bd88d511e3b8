"""A run in stages: each stage is a run in <run>/stages/<name>/ that starts from the final/ of the one before. What the last
stage ended with is copied into <run>/, beside the log and the curves of all stages."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from config import Config, InputError, StageConfig, changed_keys, nearest, to_yaml
from dataprocess.process_image import MISSING, missing_sources
from dataprocess.train_tokenizer import learn_if_missing
from model.checkpoint_folder import MANIFEST, read_json, replace_text, verify_folder, weights_digest, write_folder
from training.curves import draw_curves
from training.log import not_written, read_rows
from training.open import check_run, check_settings
from training.prepare import look_ahead
from training.processes import on_main, print_main
from training.provenance import equal_contents, saved_config
from training.resume import print_finished
from training.run_folder import NO_HISTORY, RunLock, check_owner, move_aside

Stages = tuple[StageConfig, ...]


@contextlib.contextmanager
def open_stages(config: Config, arguments: argparse.Namespace) -> Iterator[Iterator[Config]]:
    """Yield the configs to train, one after the other: those of the stages that are not finished, or `config` itself if
    it has no stages. arguments: train.py's command line; --stage chooses one stage.

    The whole run's folder is locked until the context ends. Raises InputError if a stage has nothing to start from, or was
    trained on top of something else than exists now, and if a later stage's data is wrong.
    """
    stages = config.train.stages
    if not stages:
        yield iter([config])
        return
    chosen = _chosen(stages, arguments)
    _check_settings(stages)
    with RunLock(config.output_dir):
        for stage in stages:
            on_main(functools.partial(check_owner, stage.config.output_dir))
        _learn_tokenizer(stages)
        if arguments.resume == "none" and arguments.stage is None:
            for stage in stages:  # before anything moves
                with _name_stage(stage):
                    look_ahead(stage.config, starts_over=True)
            # all stages now: a run that is stopped in its first stage must not find the old run's later ones
            for folder in (config.output_dir, *(stage.config.output_dir for stage in stages)):
                move_aside(folder)
        ended: list[int] = []
        yield _unfinished(stages, chosen, arguments, ended=ended)
        on_main(lambda: _publish(config))
    if ended == chosen and chosen[-1] == len(stages) - 1:
        print_main(f"\nthe model that all stages together made: {config.output_dir / 'final'}")


def check_stages(config: Config, arguments: argparse.Namespace) -> None:
    """Check `config`, or each chosen stage of it, and print what would train. Raises InputError with every stage's
    faults."""
    stages = config.train.stages
    if not stages:
        check_run(config, arguments)
        return
    chosen = _chosen(stages, arguments)
    _check_settings(stages)
    _learn_tokenizer(stages)
    faults = []
    for number in chosen:
        print_main(f"\nstage {number + 1} of {len(stages)}: {stages[number].name}")
        try:
            with _name_stage(stages[number]):
                check_run(_with_start(stages, number, arguments), arguments)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n\n".join(faults))


def _unfinished(stages: Stages, chosen: list[int], arguments: argparse.Namespace, ended: list[int]) -> Iterator[Config]:
    """Yield the config of each chosen stage that is not finished. A stage's number is added to
    `ended` when the caller asks for the next stage."""
    is_first = True
    for number in chosen:
        print_main(f"\nstage {number + 1} of {len(stages)}: {stages[number].name}")
        stage = _with_start(stages, number, arguments)
        if arguments.resume == "auto" and not arguments.extend and on_main(functools.partial(_is_finished, stage)):
            print_finished(stage.output_dir / "final")
        else:
            if is_first:
                _refuse_missing([stages[i] for i in chosen[chosen.index(number) :]])
                for later in chosen[chosen.index(number) + 1 :]:
                    with _name_stage(stages[later]):
                        look_ahead(stages[later].config)
            is_first = False
            yield stage
        ended.append(number)


def _check_settings(stages: Stages) -> None:
    """Raise InputError for a mistake in a stage that needs no data to be seen, before any stage's data is prepared."""
    for stage in stages:
        with _name_stage(stage):
            check_settings(stage.config)


def _refuse_missing(stages: list[StageConfig]) -> None:
    """Raise InputError for all files and folders of the stages' sources that do not exist."""

    def look() -> None:
        new = [stage for stage in stages if not any(stage.config.output_dir.glob("checkpoint-*"))]
        faults = [f'stage "{stage.name}": {fault}' for stage in new for fault in missing_sources(stage.config.data)]
        if faults:
            raise InputError("\n".join([*faults, MISSING]))

    on_main(look)


def _learn_tokenizer(stages: Stages) -> None:
    """Learn a missing tokenizer from the data of all stages, whichever of them trains now."""
    if size := on_main(lambda: learn_if_missing([stage.config for stage in stages])):
        new = stages[0].config.model.from_scratch
        assert new is not None
        print_main(f"learned a tokenizer of {size:,} tokens: {new.tokenizer}")


@contextlib.contextmanager
def _name_stage(stage: StageConfig) -> Iterator[None]:
    """Put the stage's name in front of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f'stage "{stage.name}": {error}') from None


def _is_finished(config: Config) -> bool:
    """Return whether a stage with this very config has ended. Its data and its checkpoints may have been deleted since."""
    final = config.output_dir / "final"
    if not final.exists() or (config.data.validation_file is not None and not (final / "scores.json").exists()):
        return False
    verify_folder(final)
    saved = saved_config(final)
    return not changed_keys(saved, config, equal_contents(final, saved, config))


def stage_index(stages: Stages, name: str) -> int:
    """Return the position of the stage with that name. Raises InputError if there is none."""
    names = [stage.name for stage in stages]
    if not names:
        raise InputError(f'--stage {name}: the config has no stages; list them under "train.stages".')
    if name not in names:
        raise InputError(f"--stage {name}: no such stage; there are {', '.join(names)}{nearest(name, names)}")
    return names.index(name)


def _chosen(stages: Stages, arguments: argparse.Namespace) -> list[int]:
    """Return the positions of the stages to run."""
    if arguments.stage is not None:
        return [stage_index(stages, arguments.stage)]
    if arguments.extend:
        raise InputError(
            "--extend: say which stage trains further, with --stage NAME; the stages after it train again."
        )
    if arguments.resume not in ("auto", "none"):
        raise InputError(f"--resume {arguments.resume}: say which stage resumes from it, with --stage NAME.")
    return list(range(len(stages)))


# ---------------------------------------------------------------------------------------------------------------------
# What a stage starts from


def _with_start(stages: Stages, number: int, arguments: argparse.Namespace) -> Config:
    """Return a stage's config, starting from the final/ of the stage before."""
    stage = stages[number]
    if number == 0:
        return stage.config
    before = stages[number - 1]
    final = before.config.output_dir / "final"
    if not final.exists():
        if arguments.check:  # nothing has trained yet, but everything else can be checked
            train = dataclasses.replace(stage.config.train, freeze_random=("projector", "language_model", "embeddings"))
            return dataclasses.replace(stage.config, train=train)
        raise InputError(
            f'stage "{stage.name}" starts from stage "{before.name}", which has not ended: {final} does not exist. Train it '
            f"first (--stage {before.name}, or all stages without --stage)."
        )
    if arguments.resume != "none":
        on_main(lambda: _refuse_stale(stage, before, final))
    return dataclasses.replace(stage.config, model=dataclasses.replace(stage.config.model, start_from=final))


def _refuse_stale(stage: StageConfig, before: StageConfig, final: Path) -> None:
    """Raise InputError if the stage has begun on top of another `final` than exists now."""
    history = stage.config.output_dir / "run.json"
    if not history.exists():
        return
    starts = read_json(history, NO_HISTORY)
    last = starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
    began_with = last.get("start_from_sha256")
    if began_with is not None and began_with != weights_digest(final):
        raise InputError(
            f'{stage.config.output_dir}: stage "{stage.name}" was trained on top of another "{before.name}" than is in '
            f"{final} now, which was trained again since. Train it again too: --stage {stage.name} --resume none."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Results of the whole run


def _publish(config: Config) -> None:
    """Write <run>/metrics.jsonl and curves.png of all stages, and <run>/final of the last stage, unless they are up to
    date."""
    logs = [(stage.name, read_rows(stage.config.output_dir / "metrics.jsonl")) for stage in config.train.stages]
    rows = [{"stage": name, **row} for name, found in logs for row in found]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    metrics, image = config.output_dir / "metrics.jsonl", config.output_dir / "curves.png"
    if not metrics.exists() or metrics.read_text(encoding="utf-8") != text:
        try:
            draw_curves(logs, image)
        except OSError as error:
            raise not_written(image, error) from None
        replace_text(metrics, text)  # last: it marks both as up to date
    last, final = config.train.stages[-1].config.output_dir / "final", config.output_dir / "final"
    if last.exists() and not ((final / MANIFEST).exists() and _contents(final) == _contents(last)):
        verify_folder(last)
        write_folder(final, lambda folder: _copy(last, folder))


def _contents(folder: Path) -> dict:
    """Return what a manifest lists, without the config, whose paths depend on the place of the folder."""
    files = dict(read_json(folder / MANIFEST)["files"])
    files.pop("config.yaml", None)
    return files


def _copy(source: Path, target: Path) -> None:
    """Copy a model's folder without its manifest, with the paths of its config relative to `target`. Other files are hard
    links where the disk has them: nothing writes to them again."""
    heading = [line for line in (source / "config.yaml").read_text("utf-8").splitlines() if line.startswith("#")]
    text = to_yaml(saved_config(source), relative_to=target)
    (target / "config.yaml").write_text("\n".join([*heading, text]), encoding="utf-8")
    for path in source.rglob("*"):
        to = target / path.relative_to(source)
        if path.is_dir():
            to.mkdir(parents=True, exist_ok=True)
        elif path not in (source / MANIFEST, source / "config.yaml"):
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, to)
            except OSError:
                shutil.copyfile(path, to)
