"""Prompts and their pictures -> the ids of the answers: one batch, with the KV cache. Knows no text and no file.

Each picture passes the vision tower once, however many prompts show it. And what several prompts have in common, up to
the end of their pictures, passes the language model once: the keys and values are copied to every row, and row by row
only the rest is read. A picture is hundreds of tokens, a question about it a dozen.

B prompts, M pictures of N tokens, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Prompt(NamedTuple):
    """ids: image tokens included; pictures: which of the batch's pictures these stand for, in order."""

    ids: Sequence[int]
    pictures: Sequence[int]


@torch.inference_mode()
def generate(model, prompts: Sequence[Prompt], pixel_values: Tensor | None, **options) -> Tensor:
    """Generated ids [B, new], padded on the right. model: a VisionLanguageModel; pixel_values [M,3,H,W], None for M = 0;
    options: transformers' (max_new_tokens, num_beams, ...)."""
    lm = model.causal_lm
    features = None if pixel_values is None else model.encode_images(pixel_values)  # [M, N, D]
    prefixes = None
    if options.get("num_beams", 1) == 1:  # beams take a cache that `generate` itself has made
        prefixes = _shared_prefixes(prompts, lm.config, options.get("max_new_tokens", 0))
    if prefixes is None:
        ids, mask = _pad(lm, [prompt.ids for prompt in prompts])
        inputs = {"image_features": _features_of(prompts, features)}
    else:
        distinct, rows, ends = prefixes
        ids, mask = _pad(lm, [prefix.ids for prefix in distinct])
        cache = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            image_features=_features_of(distinct, features),
            use_cache=True,
        ).past_key_values
        rows = torch.tensor(rows, device=ids.device)
        cache.batch_select_indices(rows)
        # A row is its prefix, then its rest, each padded on the left. `generate` takes the positions from the mask, so
        # that padding between the two counts as little as padding before them, and reads what the cache does not hold.
        rest_ids, rest_mask = _pad(lm, [prompt.ids[end:] for prompt, end in zip(prompts, ends, strict=True)])
        ids, mask = torch.cat([ids[rows], rest_ids], dim=1), torch.cat([mask[rows], rest_mask], dim=1)
        inputs = {"image_features": None, "past_key_values": cache}
    return lm.generate(input_ids=ids, attention_mask=mask, synced_gpus=False, **inputs, **options)[:, ids.shape[1] :]


def _shared_prefixes(
    prompts: Sequence[Prompt], config, new_tokens: int
) -> tuple[list[Prompt], list[int], list[int]] | None:
    """(the distinct prefixes, which of them each prompt begins with, and where it ends in each prompt), or None where it
    does not pay to read them first. A prefix ends behind the prompt's last picture; without a picture it is shared with
    nobody."""
    ends, rows, number = [], [], {}
    for i, prompt in enumerate(prompts):
        ends.append(_end_of_images(prompt.ids, config.image_token_id))
        prefix = Prompt(tuple(prompt.ids[: ends[i]]), tuple(prompt.pictures))
        rows.append(number.setdefault((prefix, None if prompt.pictures else i), len(number)))
    distinct = [prefix for prefix, _ in number]
    longest_prefix, longest_rest = max(ends), max(len(p.ids) - end for p, end in zip(prompts, ends, strict=True))
    apart = max(len(prompt.ids) for prompt in prompts)
    together = longest_prefix + longest_rest  # more than `apart` where the prefixes differ in length
    pays = len(distinct) * longest_prefix + len(prompts) * longest_rest < len(prompts) * apart
    fits = together == apart or together + new_tokens <= config.max_position_embeddings
    return (distinct, rows, ends) if pays and fits else None


def _end_of_images(ids: Sequence[int], image_token_id: int) -> int:
    """Where the last image ends; 1 without any, as a row needs something to begin with."""
    return next((i + 1 for i in reversed(range(len(ids))) if ids[i] == image_token_id), 1)


def _features_of(prompts: Sequence[Prompt], features: Tensor | None) -> Tensor | None:
    """[the prompts' pictures one after the other, N, D]; None where they show none."""
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    return features[torch.tensor(pictures, device=features.device)] if pictures else None


def _pad(lm, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, L] on the model's device, padded on the left: the rows end at the same column."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), lm.generation_config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = 1
    return ids.to(lm.device), mask.to(lm.device)
