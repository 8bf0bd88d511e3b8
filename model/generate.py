"""Generate answers to a batch of prompts with images, with the KV cache. Knows no text and no file.

Each image passes the vision tower once, however many prompts show it. A prefix that several prompts share, up to the end of
their images, passes the language model once: its keys and values are copied to every row, and only the rest of each prompt
is read row by row. An image takes hundreds of tokens, a question about it a dozen. With a sliding window, nothing is shared.

Shapes: B prompts, L tokens, M images of N tokens each, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from model.model import VisionLanguageModel


class Prompt(NamedTuple):
    """ids: with the image tokens; images: indices of the batch's images that these tokens stand for, in order."""

    ids: Sequence[int]
    images: Sequence[int]


@torch.inference_mode()
def generate(
    model: VisionLanguageModel, prompts: Sequence[Prompt], pixel_values: Tensor | None, **options: Any
) -> Tensor:
    """Return the generated ids [B, new], padded on the right.

    pixel_values: [M,3,H,W], or None if M is 0. options: transformers' generation options
    (max_new_tokens, num_beams, ...).
    """
    lm = model.causal_lm
    features = None if pixel_values is None else model.encode_images(pixel_values)  # [M, N, D]
    prefixes = None
    # Beam search needs a cache that transformers has made itself. In a sliding window, the padding between a prefix and a
    # rest would take the place of tokens.
    if options.get("num_beams", 1) == 1 and not getattr(lm.config, "sliding_window", None):
        prefixes = _shared_prefixes(prompts, lm.config, options.get("max_new_tokens", 0))
    inputs: dict[str, Any]
    if prefixes is None:
        ids, mask = _pad(lm, [prompt.ids for prompt in prompts])
        inputs = {"image_features": _features_of(prompts, features)}
    else:
        distinct, prefix_of, ends = prefixes
        ids, mask = _pad(lm, [prefix.ids for prefix in distinct])
        cache = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            image_features=_features_of(distinct, features),
            use_cache=True,
        ).past_key_values
        rows = torch.tensor(prefix_of, device=ids.device)
        cache.batch_select_indices(rows)
        # A row is its prefix and its rest, each padded on the left. transformers computes positions from the mask, so
        # padding between the two counts as little as padding before them. It reads only what the cache does not hold.
        rest_ids, rest_mask = _pad(lm, [prompt.ids[end:] for prompt, end in zip(prompts, ends, strict=True)])
        ids, mask = torch.cat([ids[rows], rest_ids], dim=1), torch.cat([mask[rows], rest_mask], dim=1)
        inputs = {"image_features": None, "past_key_values": cache}
    return lm.generate(input_ids=ids, attention_mask=mask, synced_gpus=False, **inputs, **options)[:, ids.shape[1] :]


def _shared_prefixes(
    prompts: Sequence[Prompt], config: PreTrainedConfig, new_tokens: int
) -> tuple[list[Prompt], list[int], list[int]] | None:
    """Return (distinct prefixes, index of each prompt's prefix, length of each prompt's prefix), or None if reading the
    prefixes first saves nothing.

    A prefix ends after the prompt's last image. A prompt without images shares its prefix with no other prompt.
    """
    ends: list[int] = []
    prefix_of: list[int] = []
    number: dict[tuple[Prompt, int | None], int] = {}
    for i, prompt in enumerate(prompts):
        ends.append(_end_of_images(prompt.ids, config.image_token_id))
        prefix = Prompt(tuple(prompt.ids[: ends[i]]), tuple(prompt.images))
        prefix_of.append(number.setdefault((prefix, None if prompt.images else i), len(number)))
    distinct = [prefix for prefix, _ in number]
    longest_prefix, longest_rest = max(ends), max(len(p.ids) - end for p, end in zip(prompts, ends, strict=True))
    separate = max(len(prompt.ids) for prompt in prompts)
    shared = longest_prefix + longest_rest  # more than `separate` if the prefixes differ in length
    pays = len(distinct) * longest_prefix + len(prompts) * longest_rest < len(prompts) * separate
    fits = shared == separate or shared + new_tokens <= config.max_position_embeddings
    return (distinct, prefix_of, ends) if pays and fits else None


def _end_of_images(ids: Sequence[int], image_token_id: int) -> int:
    """Return the position after the last image token; 1 without any, because a prefix has at least one token."""
    return next((i + 1 for i in reversed(range(len(ids))) if ids[i] == image_token_id), 1)


def _features_of(prompts: Sequence[Prompt], features: Tensor | None) -> Tensor | None:
    """Return the features of the prompts' images, one prompt after the other, [images, N, D]; None without images."""
    images = [image for prompt in prompts for image in prompt.images]
    if not images:
        return None
    assert features is not None
    return features[torch.tensor(images, device=features.device)]


def _pad(lm: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both [B, L] on the model's device, padded on the left: all rows end at the same column."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), lm.generation_config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = 1
    return ids.to(lm.device), mask.to(lm.device)
