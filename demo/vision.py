"""Pretraining of the demo's image encoder: what is in each patch and in the whole picture. No question, no sentence.

The encoder sees training scenes and training digits only; held-out pictures and unseen pairs serve the probe alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import ImageEnhance
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from dataprocess import demo_world as world

GRID = 4  # patches a side: every corner of a scene is 2 x 2 patches
LAYER = -2  # of hidden_states: the one that a vision-language model reads
CLASSES = {"colour": len(world.COLOURS) + 1, "shape": len(world.SHAPES) + 1, "place": 4, "digit": 11}  # last one: none
PLACE_OF_PATCH = np.array([2 * (row // 2) + column // 2 for row in range(GRID) for column in range(GRID)])
DIGITS, SCENES, PALE = 64, 80, 48  # pictures of a batch; PALE of the scenes lose colour
MUON_RATE, ADAM_RATE = 0.01, 2e-3


def new_encoder(seed: int) -> CLIPVisionModel:
    """A CLIP vision model of 0.75 million random parameters for 60 x 60 pictures: 16 patches and the class token."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        image_size=world.SIDE, patch_size=world.SIDE // GRID, hidden_size=128, intermediate_size=384,
        num_hidden_layers=4, num_attention_heads=4, projection_dim=128,
    )  # fmt: skip
    return CLIPVisionModel(config)


def new_processor() -> CLIPImageProcessor:
    """The transform of every picture: 60 x 60 pixels in -1..1."""
    crop = {"height": world.SIDE, "width": world.SIDE}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(size={"shortest_edge": world.SIDE}, crop_size=crop, image_mean=half, image_std=half)


def scene_labels(scene: world.Scene) -> dict[str, np.ndarray]:
    """Class of every patch [16] by head: the colour, shape and place of the object in the patch's corner."""
    none = [CLASSES["colour"] - 1, CLASSES["shape"] - 1]
    pairs = np.array([none if p is None else [world.COLOURS.index(p[0]), world.SHAPES.index(p[1])] for p in scene])
    colour, shape = pairs[PLACE_OF_PATCH].T
    return {"colour": colour, "shape": shape, "place": PLACE_OF_PATCH, "digit": np.full(GRID**2, 10)}


def digit_labels(digit: int) -> dict[str, np.ndarray]:
    """Class of every patch [16] by head for a digit picture."""
    nothing = scene_labels((None,) * 4)
    return nothing | {"digit": np.full(GRID**2, digit)}


def batch(pictures: list, labels: list[dict[str, np.ndarray]]) -> tuple[Tensor, dict[str, Tensor]]:
    """pixel_values [B,3,60,60] as the processor makes them, and labels [B,16] by head."""
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, {name: torch.from_numpy(np.stack([row[name] for row in labels])) for name in CLASSES}


class Digits:
    """scikit-learn's digits, training and held-out ones apart."""

    def __init__(self):
        images, labels, held_out = world.load_digits()
        self.parts = {False: (images[~held_out], labels[~held_out]), True: (images[held_out], labels[held_out])}

    def draw(self, count: int, rng: np.random.Generator, held_out: bool = False, turn: float = 0.0):
        """`count` random digit pictures, turned by up to `turn` degrees, with their labels."""
        images, labels = self.parts[held_out]
        chosen = rng.integers(len(images), size=count)
        pictures = [world.draw_digit(images[i], rng, rng.uniform(-turn, turn)) for i in chosen]
        return pictures, [digit_labels(labels[i]) for i in chosen]


def tags(labels: dict[str, Tensor]) -> Tensor:
    """float [B, 5 + 10]: which shapes and digits are anywhere in the picture."""
    found = [F.one_hot(labels[name], CLASSES[name]).amax(1)[:, :-1] for name in ("shape", "digit")]
    return torch.cat(found, dim=1).float()


def training_batch(digits: Digits, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Digits turned by up to 12 degrees, and scenes, most of them paled: a shape must not depend on its colour, or an
    unseen pair is seen as another shape. What is too pale (colour label -100) teaches no colour."""
    pictures, labels = digits.draw(DIGITS, rng, turn=12.0)
    for k in range(SCENES):
        scene = world.training_scene(rng)
        pictures.append(world.draw_scene(scene, rng))
        labels.append(scene_labels(scene))
        if k < PALE:
            saturation = rng.random()
            pictures[-1] = ImageEnhance.Color(pictures[-1]).enhance(saturation)
            if saturation < 0.7:
                labels[-1]["colour"] = np.full(GRID**2, -100)
    return batch(pictures, labels)


def pretrain(steps: int, seed: int, log) -> CLIPVisionModel:
    """Train an encoder: cross entropy of colour, shape, place and digit at every patch of layer LAYER, and of the
    picture's tags at the class token of the last layer."""
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
        sum(losses.values()).backward()
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
    """Accuracy of linear (ridge) classifiers on the frozen features of layer LAYER: of each patch for the colour, shape
    and place of its object, of the patches' mean for the digit.

    They are fitted on `count` training pictures and scored on as many held-out ones; `unseen_colour` and `unseen_shape`
    are scored on the objects that are unseen pairs. Compare with the same numbers of a random encoder.
    """
    rng, digits = np.random.default_rng(seed), Digits()

    def features(pictures: list, labels: list) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, target = batch(pictures, labels)
        return encoder(pixels, output_hidden_states=True).hidden_states[LAYER][:, 1:].double(), target

    def scene_features(scenes: list[world.Scene]):
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
        none = CLASSES[name] - 1 if name != "place" else -1  # empty corners have a place and nothing else
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
    """Write the encoder and its image processor, in half precision."""
    encoder.to(torch.bfloat16).save_pretrained(folder)
    new_processor().save_pretrained(folder)
