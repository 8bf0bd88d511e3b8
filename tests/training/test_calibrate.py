"""How a new projector starts: at words, calibrated or at random; what comes from a checkpoint stays as it is.

Run: python -m pytest tests/training/test_calibrate.py
"""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from config import load_config
from model.build import read_pixels
from model.checkpoint import load_trained
from model.projector import build_projector
from model.trainable import WeightOrigins
from tests.toy_project import run_training, write_project
from training import calibrate
from training.calibrate import WHITENING, Examples, fit_words, root_mean_square, whiten, word_vectors
from training.run import open_model, open_processors

ONE_STEP = (
    "train.max_steps=1",
    "train.projector_lr=0",
    "train.lora_lr=0",
    "train.eval_steps=null",
    "train.score_samples=1",
)
BUFFERS = {"feature_mean", "feature_std", "output_scale"}


def projector_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "projector.safetensors")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("start"), images=40)


@pytest.fixture(scope="module")
def runs(project):
    """word -> (final folder of a run whose learning rates are 0, what it printed). Its projector is as it started."""
    found = {}
    for word in ("words", "calibrated", "random"):
        folder = project.parent / word
        run_training(project, *ONE_STEP, f"output_dir={folder}", f"train.projector_start={word}")
        found[word] = folder / "final"
    return found


def test_a_random_start_leaves_features_as_they_are(runs):
    tensors = projector_of(runs["random"])
    assert not tensors["feature_mean"].any()
    assert (tensors["feature_std"] == 1).all() and tensors["output_scale"] == 1


def test_calibration_measures_the_runs_own_images(runs, project):
    """Mean and deviation of the encoder's features of the training images; the trained layers stay as they are."""
    tensors, random = projector_of(runs["calibrated"]), projector_of(runs["random"])
    assert all(torch.equal(tensors[name], random[name]) for name in random.keys() - BUFFERS)
    config = load_config(project, [])
    built = open_model(config, "fp32", open_processors(config))
    images = [project.parent / "images" / f"{i}.png" for i in range(30)]  # the last quarter is held out
    with torch.no_grad():
        features = built.model.patch_features(
            torch.stack([read_pixels(built.image_processor, path) for path in images])
        )
    std, mean = torch.std_mean(features.flatten(0, 1), dim=0, correction=0)
    torch.testing.assert_close(tensors["feature_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tensors["feature_std"], std, rtol=1e-4, atol=1e-5)


def test_a_projector_that_starts_at_words_tells_images_apart(project, capsys):
    run_training(project, *ONE_STEP, f"output_dir={project.parent / 'printed'}", "train.projector_start=words")
    found = re.search(
        r"learned from 30 images; (\d+)% of 3 kept aside .* \(by chance 33\.3%\)", capsys.readouterr().out
    )
    assert found and int(found[1]) == 100


def test_a_loaded_projector_is_not_fitted_again(runs, project, tmp_path, capsys):
    run_training(project, *ONE_STEP, f"output_dir={tmp_path / 'run'}", f"model.start_from={runs['words']}", "seed=5")
    assert "starts at words" not in capsys.readouterr().out
    first, second = projector_of(runs["words"]), projector_of(tmp_path / "run" / "final")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_without_buffers_takes_features_as_they_are(runs, project, tmp_path):
    """Projectors of earlier versions have none."""
    config = load_config(project, [])
    built = open_model(config, "fp32", open_processors(config))
    tensors = projector_of(runs["random"])
    save_file(
        {name: value for name, value in tensors.items() if name not in BUFFERS}, tmp_path / "projector.safetensors"
    )
    load_trained(built.model, WeightOrigins.new(built.model, from_scratch=False), tmp_path)
    state = built.model.projector.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in state)


def test_an_image_starts_at_the_words_of_all_its_records(project, tmp_path, monkeypatch):
    """A second record about each image, in another language: its words count too."""
    values = yaml.safe_load(project.read_text())
    rows = json.loads((project.parent / "train.json").read_text())
    more = [
        row | {"id": f"more-{row['id']}", "conversations": [row["conversations"][0], {"from": "gpt", "value": "zzz"}]}
        for row in rows
    ]
    folder = project.parent
    (folder / "more.json").write_text(json.dumps(more))
    source = {"name": "more", "format": "llava", "images": "images", "annotations": "more.json", "split": "train"}
    values["data"] |= {
        "sources": [*values["data"]["sources"], source],
        "qa_file": "qa_more.jsonl",
        "validation_file": "held_more.jsonl",
    }
    (folder / "more.yaml").write_text(yaml.safe_dump(values))
    found = []
    monkeypatch.setattr(
        calibrate,
        "word_vectors",
        lambda answers, embeddings: found.extend(answers) or word_vectors(answers, embeddings),
    )
    run_training(folder / "more.yaml", *ONE_STEP, f"output_dir={tmp_path}", "train.projector_start=words")
    tokenizer = open_processors(load_config(folder / "more.yaml", [])).tokenizer
    texts = [tokenizer.decode(answer.tolist()) for answer in found]
    assert len(texts) == 30 and all(text.count("zzz") == 1 and len(text) > 20 for text in texts), texts


def test_words_that_all_answers_share_do_not_count():
    embeddings = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    answers = [torch.tensor([1, 9]), torch.tensor([2, 9]), torch.tensor([1, 3, 9])]
    vectors = word_vectors(answers, embeddings)
    one, two = torch.tensor(3 / 2).log(), torch.tensor(3.0).log()
    plain = torch.stack([embeddings[1], embeddings[2], (one * embeddings[1] + two * embeddings[3]) / (one + two)])
    centre = plain.mean(0)
    differences = whiten(plain - centre)
    expected = centre + differences * root_mean_square(embeddings) / differences.square().mean().sqrt()
    torch.testing.assert_close(vectors, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count, width", [(6, 40), (200, 40)])
def test_whitened_vectors_are_equally_far_apart_except_along_rare_directions(count, width):
    """As a singular value decomposition says; and vectors that mostly share a direction no longer look alike."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(width, generator=generator)
    vectors = torch.randn(count, width, generator=generator) + 5 * torch.randn(count, 1, generator=generator) * shared
    vectors -= vectors.mean(0)
    left, sizes, right = torch.linalg.svd(vectors, full_matrices=False)
    squares = sizes.square() / count
    typical = squares.sum() / min(count, width)
    found = whiten(vectors)
    torch.testing.assert_close(
        found, left * sizes / (squares + WHITENING * typical).sqrt() @ right, rtol=1e-3, atol=1e-3
    )

    def alike(rows: torch.Tensor) -> float:
        rows = torch.nn.functional.normalize(rows, dim=1)
        return float((rows @ rows.T).triu(1).abs().sum())

    assert alike(found) < 0.7 * alike(vectors)


@pytest.mark.parametrize("kind", ["mlp", "pixel_shuffle", "resampler"])
def test_every_kind_of_projector_finds_the_words_of_images_kept_aside(kind):
    """Images of eight classes, whose features share a direction and differ otherwise; each class has a word."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(200) % 8
    directions, words = torch.randn(8, 32, generator=generator), torch.randn(8, 24, generator=generator)
    features = directions[label][:, None] + 0.5 * torch.randn(200, 16, 32, generator=generator)
    torch.manual_seed(0)
    projector = build_projector(kind, 32, 128, 24)
    projector.calibrate(features, output_rms=1.0)
    text = fit_words(projector, Examples(features, [], torch.arange(200)), words[label], seed=0)
    found = re.search(r"(\d+)% of 20 kept aside", text)
    assert found and int(found[1]) == 100
    with torch.no_grad():
        error = (projector(features[:20]).mean(1) - words[label[:20]]).square().mean() / words.var()
    assert error < 0.5


def test_views_are_learned_but_none_of_an_image_kept_aside():
    """Two of 20 images are kept aside; a view of one of them would make every weight NaN."""
    generator = torch.Generator().manual_seed(0)
    features, words = torch.randn(20, 4, 8, generator=generator), torch.randn(20, 6, generator=generator)

    def fitted(views: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        projector = build_projector("mlp", 8, 16, 6)
        projector.calibrate(features, output_rms=1.0)
        both = Examples(torch.cat([features, views]), [], torch.arange(20).repeat(2))
        assert "2 kept aside" in fit_words(projector, both, words, seed=0)
        return projector.state_dict()

    kept_aside = (torch.arange(20) < 2)[:, None, None]
    plain, unknown = fitted(features.clone()), fitted(features.masked_fill(kept_aside, float("nan")))
    assert all(torch.equal(plain[name], value) for name, value in unknown.items())
    others = fitted(features.masked_fill(~kept_aside, 0.0))
    assert not all(torch.equal(plain[name], value) for name, value in others.items())
