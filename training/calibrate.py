"""Fit a new projector to its encoder and language model before the first step, on some of the run's own images.

`train.projector_start` says how. Neither way runs the language model.

calibrated: the features get mean 0 and standard deviation 1, the output gets the size of text embeddings
    (`Projector.calibrate`).
words: calibrated, and the projector learns to give each image vectors near the embeddings of the words of its answers.
    From a random start, a language model first learns to answer without looking at the image, and may stay there for long:
    nothing in the image tokens is worth attending to. From this start there is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import IGNORE_INDEX
from dataset.batch import Batch
from dataset.loader import QADataset, make_loader
from dataset.workers import explain_dead_workers
from model.build import autocast
from model.projector import Projector
from training.processes import on_main, print_main
from training.run import Run

CALIBRATED = 128  # images that are enough for means and standard deviations
MAX_IMAGES = 4096  # images that the projector learns words from
MAX_BYTES = 2**30  # of their features
VIEWS = 4  # of each image, besides itself, if training sees augmented images
RECORDS = 4  # for each image, so many random records are read at least, to find images and all their answers
READ = RECORDS * MAX_IMAGES  # records that are read at most
MOST_RECORDS = 16  # of an image
ENCODED_AT_ONCE = 8
KEPT_ASIDE = 0.1  # fraction of the images that measure the result
STEPS, FEWEST_STEPS, EPOCHS = 400, 100, 40  # of the words: at most, at least, and rather than more epochs
STEPS_WITH_VIEWS = 600  # at most
BATCH, FEWEST, NUMBERS = 64, 16, 2**26  # images a step: fewer, but not below 16, if their tokens have more numbers
RATE, WARMUP = 1e-3, 20
SHARPNESS = 20.0  # inverse temperature of the cross entropy
WHITENING = 0.3  # more: the words' own distances; less: all images equally far apart


@dataclass(frozen=True)
class Examples:
    """Images with the tokens of their answers, then views of them."""

    features: Tensor  # [n, N, Dv], on the CPU, in the type that the tower computes in; all finite
    answers: list[Tensor]  # token ids of each image's answers: of the first len(answers) rows of features
    image_of: Tensor  # [n] the image of each row; 0, 1, 2... for the images themselves


def start_projector(run: Run) -> None:
    """Let a new projector start as `train.projector_start` says; print what was found.

    Does nothing if the projector's weights come from a checkpoint or if no record has an image. The main process computes,
    all processes get its result.
    """
    config, projector = run.config, run.model.projector
    if not run.built.is_projector_new or config.train.projector_start == "random":
        return

    at_words = config.train.projector_start == "words" and config.train.trainable.projector.kind == "full"

    def work() -> dict[str, Tensor] | None:
        # no more than the run itself will see
        most = max(CALIBRATED, min(MAX_IMAGES, run.total_steps * run.samples_per_step)) if at_words else CALIBRATED
        examples = sample_examples(run, most, with_views=at_words)
        if examples is None:
            print_main("projector: starts at random, because no record has exactly one image")
            return None
        projector.to(run.accelerator.device)
        embeddings = run.model.causal_lm.get_input_embeddings().weight.detach()
        size = root_mean_square(embeddings)
        projector.calibrate(examples.features[:CALIBRATED].to(run.accelerator.device), output_rms=size)
        mean, std = projector.feature_mean.square().mean(), projector.feature_std.square().mean()
        print_main(
            f"projector: features standardised (standard deviation {std.sqrt():.3g}; {mean / (mean + std):.0%} of their "
            f"square is common to all images); output scaled to the text embeddings' root mean square, {size:.3g}"
        )
        if at_words:
            targets = word_vectors(examples.answers, embeddings)
            context = autocast(run.precision, run.accelerator.device)
            found = fit_words(projector, examples, targets, seed=config.seed, autocast=context)
            views = len(examples.features) - len(targets)
            print_main(
                f"projector: starts at words, learned from {len(targets):,} images"
                f"{f' and {views:,} augmented views of them' if views else ''}{found}"
            )
        return {name: value.cpu() for name, value in projector.state_dict().items()}

    with explain_dead_workers():
        state = on_main(work)
    if run.accelerator.device.type == "cuda":  # metrics.jsonl reports the peak of training
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if state is not None:
        projector.load_state_dict(state)


@torch.no_grad()
def sample_examples(run: Run, count: int, with_views: bool) -> Examples | None:
    """Return at most `count` random training images with the answers of all their records that are read; None if none of
    READ random records has exactly one image. Their features go into the feature cache if the run has one.

    with_views: if training augments images, the first VIEWS views that it sees of each follow, in as far as MAX_BYTES
    allows."""
    qa = run.train_set.qa
    records = np.random.default_rng(run.config.seed).permutation(run.train_set.kept)[:READ]
    by_image: dict[str, list[int]] = {}
    for number, record in enumerate(map(int, records)):
        if len(by_image) == count and number >= RECORDS * count:
            break
        images = qa[record].images
        if len(images) == 1 and (images[0] in by_image or len(by_image) < count):
            by_image.setdefault(images[0], []).append(record)
    firsts = [first for first, *_ in by_image.values()]
    others = {qa[first].id: rest[: MOST_RECORDS - 1] for first, *rest in by_image.values()}
    features: list[Tensor] = []
    answers: list[Tensor] = []
    image_of: list[int] = []
    places: dict[str, int] = {}  # record id -> its image's place in `answers`
    plain = [(0, first) for first in firsts]
    for name, own in _encoded(
        run, run.train_set.without_augmentation(), plain, desc="images for the projector's start"
    ):
        # a record that replaces another one has another id
        more = (run.train_set.encode((0, record))[1].labels for record in others.get(name, ()))
        labels = torch.cat([own.labels, *map(torch.tensor, more)])
        places[name] = len(answers)
        image_of.append(len(answers))
        features.append(own.features)
        answers.append(labels[labels != IGNORE_INDEX])
        if len(features) * features[0].nbytes >= MAX_BYTES:
            break
    if not features:
        return None
    augmenter = run.train_set.augmenter if with_views else None
    views = 0 if augmenter is None else min(VIEWS, augmenter.settings.views or VIEWS)
    for name, own in _encoded(
        run,
        run.train_set,
        [(epoch, first) for epoch in range(views) for first in firsts],
        desc="views of them",
    ):
        if len(features) * features[0].nbytes >= MAX_BYTES:
            break
        if name in places:
            image_of.append(places[name])
            features.append(own.features)
    return Examples(torch.stack(features), answers, torch.tensor(image_of))


@dataclass(frozen=True)
class _Encoded:
    features: Tensor  # [N, Dv]
    labels: Tensor  # of the sample


def _encoded(run: Run, dataset: QADataset, keys: list[tuple[int, int]], desc: str) -> Iterator[tuple[str, _Encoded]]:
    """Yield the id and the features of each sample that has exactly one image; those that are not finite are left out."""
    starts = range(0, len(keys), ENCODED_AT_ONCE)
    loader = make_loader(
        dataset,
        (keys[start : start + ENCODED_AT_ONCE] for start in starts),
        run.built.tokenizer.pad_token_id,
        num_workers=run.config.train.num_workers,
    )
    for batch in tqdm(loader, desc=desc, total=len(starts), unit="batch", leave=False):
        # a record that replaces an unreadable one may have another number of images
        if not any(batch.images_in_sample):
            continue
        of_images = iter(encode(run, batch))
        for sample, images in zip(batch.samples(), batch.images_in_sample, strict=True):
            own = [next(of_images) for _ in range(images)]
            if images == 1 and own[0].isfinite().all():  # training names what is not finite
                yield sample.id, _Encoded(own[0], sample.labels)


def encode(run: Run, batch: Batch) -> Tensor:
    """Return the patch features of a batch with images, on the CPU."""
    device = run.accelerator.device
    if run.encoder is not None:
        features = run.encoder(batch)
    else:
        with autocast(run.precision, device)():
            features = run.model.patch_features(cast(Tensor, batch.pixel_values).to(device))
    return cast(Tensor, features).cpu()


def word_vectors(answers: list[Tensor], embeddings: Tensor) -> Tensor:
    """Return a vector [n, D] for each image: the mean embedding of its answers' tokens, weighted by how rare they are.

    A token that all answers have, such as the one that ends them, has weight 0 (log of the inverse document frequency). The
    differences between images are whitened: names share words, and mean embeddings share directions, which would make
    different things look alike. They are as large as embeddings, since the mean of many tokens would differ little.
    """
    counts = torch.bincount(torch.cat([row.unique() for row in answers]), minlength=len(embeddings))
    rarity = (len(answers) / counts.clamp(min=1)).log()
    rows = []
    for row in answers:
        weights = rarity[row] + 1e-6  # answers of common tokens alone still have a mean
        rows.append((weights[:, None] * embeddings[row.to(embeddings.device)].float().cpu()).sum(0) / weights.sum())
    vectors = torch.stack(rows)
    centre = vectors.mean(0)
    differences = whiten(vectors - centre)
    spread = differences.square().mean().sqrt()
    return centre + differences * (root_mean_square(embeddings) / spread.clamp(min=1e-12))


def whiten(vectors: Tensor) -> Tensor:
    """Return vectors [n, D] of mean 0, turned and stretched as little as makes all their directions about equally large.

    A direction is divided by its standard deviation, to whose square WHITENING times the mean square of all directions is
    added: those that hardly occur stay small.
    """
    squares, directions = torch.linalg.eigh(vectors.T @ vectors / len(vectors))
    squares = squares.clamp(min=0)  # rounding
    typical = squares.sum() / min(vectors.shape)
    scales = (squares + WHITENING * typical).clamp(min=1e-12).rsqrt()
    return vectors @ (directions * scales) @ directions.T


def fit_words(
    projector: Projector,
    examples: Examples,
    targets: Tensor,
    seed: int,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> str:
    """Train `projector` so that an image's tokens are near its target; AdamW with a cosine schedule.

    The loss has three terms: the cross entropy of finding each image's target among those of the batch, by the cosine of
    the mean token around the targets' mean; the squared error of the mean token; a tenth of that of every token.

    targets: [len(examples.answers), D]. autocast: makes the context to compute in. Returns a text: how many of the images
    kept aside have a mean token nearest to their own target among those kept aside; empty for too few images. All views of
    an image kept aside are kept aside too.
    """
    features, image_of = examples.features, examples.image_of
    device = projector.output_scale.device
    aside = math.ceil(KEPT_ASIDE * len(targets)) if len(targets) >= 10 else 0
    learned = (image_of >= aside).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.01)
    targets = targets.to(device)
    centre = targets.mean(0)
    variance = float((targets - centre).square().mean().clamp(min=1e-12))

    def tokens_of(images: Tensor) -> Tensor:
        """[n, N, Dv] -> [n, K, D], float32"""
        with autocast():
            return projector(images.to(device).float()).float()

    def likeness(tokens: Tensor, of: Tensor) -> Tensor:
        """[n, K, D], [m, D] -> [n, m]"""
        return F.normalize(tokens.mean(1) - centre, dim=1) @ F.normalize(of - centre, dim=1).T

    with torch.no_grad():
        numbers = tokens_of(features[:1]).numel()
    batch = min(BATCH, max(FEWEST, NUMBERS // numbers))
    most = STEPS if len(features) == len(targets) else STEPS_WITH_VIEWS
    steps = min(most, max(FEWEST_STEPS, EPOCHS * len(features) // batch))
    for step in tqdm(range(steps), desc="the projector learns words", unit="step", leave=False):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * cosine
        chosen = learned[torch.randint(len(learned), (batch,), generator=generator)]
        images = image_of[chosen]
        tokens, wanted = tokens_of(features[chosen]), targets[images.to(device)]
        _, same = images.unique(return_inverse=True)
        finding = F.cross_entropy(SHARPNESS * likeness(tokens, wanted), _shares(same).to(device))
        mean_error = (tokens.mean(1) - wanted).square().mean() / variance
        error = (tokens - wanted[:, None]).square().mean() / variance
        (finding + 0.5 * mean_error + 0.1 * error).backward()
        optimizer.step()
        optimizer.zero_grad()
    if aside < 2:
        return ""
    with torch.no_grad():
        means = torch.cat([tokens_of(some).mean(1, keepdim=True) for some in features[:aside].split(batch)])
        alike = likeness(means, targets[:aside])
    right = float((alike.diagonal() >= alike.amax(1)).float().mean())
    return f"; {right:.0%} of {aside} kept aside are nearest to their own answers' words (by chance {1 / aside:.1%})"


def _shares(group: Tensor) -> Tensor:
    """Return [n, n] probabilities: each row divides 1 among the members of its own group."""
    same = (group[:, None] == group).float()
    return same / same.sum(1, keepdim=True)


def root_mean_square(weight: Tensor) -> float:
    """Return the root mean square of embeddings [V, D], some rows at a time: a copy in float32 would be large."""
    return math.sqrt(sum(float(rows.float().square().sum()) for rows in weight.split(4096)) / weight.numel())
