"""benchmarks.from_scratch on a toy project: every choice can be switched off, and the table holds the scores.
Run: sh tests/run.sh tests/benchmarks/test_from_scratch.py"""

from __future__ import annotations

import json

import pytest

from benchmarks import from_scratch
from config import InputError, load_config
from tests.toy_project import write_staged_project

QUICK = ["--override", "train.max_steps=1", "--override", "train.eval_steps=null", "--seeds", "0"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(from_scratch, "RECIPE", write_staged_project(tmp_path / "project"))
    monkeypatch.setattr(from_scratch, "TYPES", ("colour",))
    return tmp_path


def test_finished_runs_are_kept_and_the_table_holds_every_variant(toy, monkeypatch, capsys):
    variants = ["the recipe", "without stage 0"]
    words = ["--output", str(toy / "out"), *QUICK, "--variants", *variants]
    assert from_scratch.main(words) == 0
    table = (toy / "out" / "from_scratch.md").read_text()
    assert table.startswith("1 seeds: mean") and table in capsys.readouterr().out + "\n"
    assert [line.split(" | ")[0] for line in table.splitlines() if " (" in line][1:] == [
        f"| {name}" for name in variants
    ]
    values = json.loads((toy / "out" / "from_scratch.json").read_text())
    assert set(values["scores"]) == set(variants) and "accuracy" in values["scores"]["the recipe"][0]
    assert (toy / "out" / "0-0" / "stages" / "text" / "final").exists()
    assert not (toy / "out" / "4-0" / "stages" / "text").exists()

    words = words[: -len(variants)] + variants[:1]
    final = toy / "out" / "0-0" / "final" / "manifest.json"
    before = final.stat().st_mtime_ns
    assert from_scratch.main(words) == 0
    assert final.stat().st_mtime_ns == before, "a finished run was repeated"
    with pytest.raises(InputError, match="0-0: ended with exit code 2; see log.txt there"):
        from_scratch.main([*words, "--override", "seed=5"])
    assert "belongs to a run of another config:\n  seed: 0 -> 5\n" in (toy / "out" / "0-0" / "log.txt").read_text()


@pytest.mark.parametrize("name", from_scratch.VARIANTS)
def test_each_variant_differs_from_the_recipe_in_its_choice_alone(name, tmp_path):
    """Checked on the real recipe; the dense model has as many active parameters."""
    before = load_config(from_scratch.RECIPE)
    path = from_scratch.write_config(tmp_path, name == from_scratch.WITHOUT_TEXT)
    after = load_config(path, [*from_scratch.VARIANTS[name], "seed=3"])
    assert after.seed == 3 and after.train.stages[-1].config.seed == 3
    model, changed = before.model, after.model
    assert model.projector == "resampler" and model.attention == "mixed"
    new, made = model.from_scratch, changed.from_scratch
    assert (changed.projector == "mlp") == (name.startswith("MLP"))
    assert (changed.attention == "causal") == (name.startswith("causal"))
    assert (made.architecture == "qwen2") == (name.startswith("dense"))
    if made.architecture == "qwen2":
        passed = new.num_experts_per_tok * new.moe_intermediate_size + new.shared_expert_intermediate_size
        assert made.intermediate_size == passed
    else:
        assert made == new
    stages = [stage.name for stage in after.train.stages]
    assert stages == [stage.name for stage in before.train.stages][name == from_scratch.WITHOUT_TEXT :]
    for stage in after.train.stages:  # data and steps are the same
        (same,) = [one for one in before.train.stages if one.name == stage.name]
        assert (stage.config.data, stage.config.train.max_steps) == (same.config.data, same.config.train.max_steps)


def test_a_cell_is_the_mean_and_the_spread():
    assert from_scratch.cell([0.5, 0.6, 1.0]) == "70.0 (50–100)"
