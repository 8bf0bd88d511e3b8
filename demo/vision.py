"""Pretrain the demo's image encoder to classify each patch and the whole image. It sees no questions or sentences.

The encoder sees only training scenes and training digits. Held-out images and unseen pairs are used only by `probe`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from demo import world

GRID = 4  # patches per side; each corner of a scene has 2 x 2 patches
LAYER = -2  # index in hidden_states of the layer that a vision-language model reads
CLASSES = {
    "colour": len(world.COLOURS) + 1,
    "shape": len(world.SHAPES) + 1,
    "place": 4,
    "digit": 11,
}  # the last class: none
PLACE_OF_PATCH = np.array([2 * (row // 2) + column // 2 for row in range(GRID) for column in range(GRID)])
DIGITS, SCENES, PALE = 64, 80, 48  # images per batch; PALE of the scenes lose colour
MUON_RATE, ADAM_RATE = 0.01, 2e-3


def new_encoder(seed: int) -> CLIPVisionModel:
    """A CLIP vision model of 0.75 million random parameters for 60 x 60 images: 16 patches and the class token."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        image_size=world.SIDE, patch_size=world.SIDE // GRID, hidden_size=128, intermediate_size=384,
        num_hidden_layers=4, num_attention_heads=4, projection_dim=128,
    )  # fmt: skip
    return CLIPVisionModel(config)


def new_processor() -> CLIPImageProcessor:
    """The transform of every image: 60 x 60 pixels in -1..1."""
    crop = {"height": world.SIDE, "width": world.SIDE}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(size={"shortest_edge": world.SIDE}, crop_size=crop, image_mean=half, image_std=half)


def scene_labels(scene: world.Scene) -> dict[str, np.ndarray]:
    """Head -> class of every patch [16]: the colour, shape and place of the object in the patch's corner."""
    none = [CLASSES["colour"] - 1, CLASSES["shape"] - 1]
    pairs = np.array([none if p is None else [world.COLOURS.index(p[0]), world.SHAPES.index(p[1])] for p in scene])
    colour, shape = pairs[PLACE_OF_PATCH].T
    return {"colour": colour, "shape": shape, "place": PLACE_OF_PATCH, "digit": np.full(GRID**2, 10)}


def digit_labels(digit: int) -> dict[str, np.ndarray]:
    """Head -> class of every patch [16] of a digit image."""
    nothing = scene_labels((None,) * 4)
    return nothing | {"digit": np.full(GRID**2, digit)}


def batch(images: list[Image.Image], labels: list[dict[str, np.ndarray]]) -> tuple[Tensor, dict[str, Tensor]]:
    """pixel_values [B, 3, 60, 60] as the processor makes them, and head -> labels [B, 16]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, {name: torch.from_numpy(np.stack([row[name] for row in labels])) for name in CLASSES}


class Digits:
    """scikit-learn's digits, divided into training and held-out digits."""

    def __init__(self) -> None:
        images, labels, held_out = world.load_digits()
        self.parts = {False: (images[~held_out], labels[~held_out]), True: (images[held_out], labels[held_out])}

    def draw(
        self, count: int, rng: np.random.Generator, held_out: bool = False, turn: float = 0.0
    ) -> tuple[list[Image.Image], list[dict[str, np.ndarray]]]:
        """`count` random digit images, rotated by up to `turn` degrees, with their labels."""
        digits, labels = self.parts[held_out]
        chosen = rng.integers(len(digits), size=count)
        images = [world.draw_digit(digits[i], rng, rng.uniform(-turn, turn)) for i in chosen]
        return images, [digit_labels(labels[i]) for i in chosen]


def tags(labels: dict[str, Tensor]) -> Tensor:
    """float [B, 5 + 10]: 1 for each shape and digit that is anywhere in the image."""
    found = [F.one_hot(labels[name], CLASSES[name]).amax(1)[:, :-1] for name in ("shape", "digit")]
    return torch.cat(found, dim=1).float()


def training_batch(digits: Digits, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Digits rotated by up to 12 degrees, and scenes, most of them with less colour.

    Pale scenes keep the shape features independent of colour; otherwise an unseen pair is recognized as another shape.
    Very pale scenes have colour label -100, which the loss ignores.
    """
    images, labels = digits.draw(DIGITS, rng, turn=12.0)
    for k in range(SCENES):
        scene = world.training_scene(rng)
        images.append(world.draw_scene(scene, rng))
        labels.append(scene_labels(scene))
        if k < PALE:
            saturation = rng.random()
            images[-1] = ImageEnhance.Color(images[-1]).enhance(saturation)
            if saturation < 0.7:
                labels[-1]["colour"] = np.full(GRID**2, -100)
    return batch(images, labels)


def pretrain(steps: int, seed: int, log: Callable[[str], None]) -> CLIPVisionModel:
    """Train an encoder and return it.

    The loss is the cross entropy of colour, shape, place and digit at every patch of layer LAYER, plus the binary cross
    entropy of the image's tags at the class token of the last layer.
    """
    rng = np.random.default_rng(seed)
    encoder, digits = new_encoder(seed), Digits()
    width = encoder.config.hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})
    tag_head = nn.Linear(width, CLASSES["shape"] + CLASSES["digit"] - 2)
    matrices = {name: p for name, p in encoder.named_parameters() if p.ndim == 2 and "encoder.layers" in name}
    others = [p for name, p in encoder.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(matrices.values(), lr=MUON_RATE, weight_decay=0.0)
    adam = torch.optim.AdamW([*others, *heads.parameters(), *tag_head.parameters()], lr=ADAM_RATE, weight_decay=0.01)
    for step in range(steps):
        pixels, target = training_batch(digits, rng)
        output = encoder(pixels, output_hidden_states=True)
        patches = output.hidden_states[LAYER][:, 1:]  # [B, 16, width]
        losses = {name: F.cross_entropy(head(patches).mT, target[name]) for name, head in heads.items()}
        losses["tags"] = F.binary_cross_entropy_with_logits(tag_head(output.pooler_output), tags(target))
        loss = sum(losses.values())
        assert isinstance(loss, Tensor)
        loss.backward()
        factor = min(1.0, (step + 1) / 30) * (1 - step / steps)
        for optimizer, rate in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            log(f"vision step {step}: " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))
    return encoder.eval()


@torch.no_grad()
def probe(encoder: CLIPVisionModel, count: int = 1500, seed: int = 1) -> dict[str, float]:
    """Accuracy of linear (ridge) classifiers on the frozen features of layer LAYER.

    Each patch is classified by the colour, shape and place of its object; the mean of the patches by the digit. The
    classifiers are fitted on `count` training images and scored on as many held-out ones. `unseen_colour` and
    `unseen_shape` are scored on objects that are unseen pairs. Compare with the scores of a random encoder.
    """
    rng, digits = np.random.default_rng(seed), Digits()

    def features(images: list, labels: list) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, target = batch(images, labels)
        return encoder(pixels, output_hidden_states=True).hidden_states[LAYER][:, 1:].double(), target

    def scene_features(scenes: list[world.Scene]) -> tuple[Tensor, dict[str, Tensor]]:
        return features([world.draw_scene(scene, rng) for scene in scenes], [scene_labels(scene) for scene in scenes])

    def fit(name: str, states: Tensor, target: Tensor) -> Tensor:
        x, y = F.pad(states, (0, 1), value=1.0), F.one_hot(target, CLASSES[name]).double()
        return torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    def score(weight: Tensor, states: Tensor, target: Tensor) -> float:
        return ((F.pad(states, (0, 1), value=1.0) @ weight).argmax(1) == target).double().mean().item()

    unseen_scenes = [world.held_out_scene(rng, unseen=True) for _ in range(count)]
    train, train_target = scene_features([world.training_scene(rng) for _ in range(count)])
    held_out, held_out_target = scene_features([world.held_out_scene(rng) for _ in range(count)])
    unseen, unseen_target = scene_features(unseen_scenes)
    is_unseen = torch.tensor([[pair in world.UNSEEN_PAIRS for pair in scene] for scene in unseen_scenes])
    is_unseen = is_unseen[:, PLACE_OF_PATCH]
    scores = {}
    for name in ("colour", "shape", "place"):
        none = CLASSES[name] - 1 if name != "place" else -1  # empty corners have only a place
        keep, keep_held_out = train_target[name] != none, held_out_target[name] != none
        weight = fit(name, train[keep], train_target[name][keep])
        scores[name] = score(weight, held_out[keep_held_out], held_out_target[name][keep_held_out])
        if name != "place":
            scores[f"unseen_{name}"] = score(weight, unseen[is_unseen], unseen_target[name][is_unseen])
    train, train_target = features(*digits.draw(count, rng))
    held_out, held_out_target = features(*digits.draw(count, rng, held_out=True))
    weight = fit("digit", train.mean(1), train_target["digit"][:, 0])
    scores["digit"] = score(weight, held_out.mean(1), held_out_target["digit"][:, 0])
    return scores


def save(encoder: CLIPVisionModel, folder: Path) -> None:
    """Write the encoder in bfloat16 and its image processor."""
    encoder.bfloat16().save_pretrained(folder)
    new_processor().save_pretrained(folder)
