"""Image features inside a decoder-only language model: two mixins around transformers' own classes.

`ImageInjection` goes before a base model (`Qwen2Model`), `ImageGeneration` before its CausalLM. A prompt holds
`image_token_id` N times an image; the embeddings at these places are replaced by the image's N features, and the
ordinary forward goes on. Nothing is inserted, padded or trimmed. No encoder and no projector is known here.

Attention is causal, or `mixed` (`config.image_attention`): the tokens of one image see each other as well. No image ever
sees what comes after it, so no answer leaks into a picture.

M images in the batch, row by row and from left to right; N features an image; D hidden size; B rows; L tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from qwen.attention import PACKED_SDPA, document_masks


class ImageInjection:
    """Mixin for a base model: `forward` takes `image_features` [M, N, D] beside `input_ids` [B, L]."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        image_features=None,
        lengths=None,
        **kwargs,
    ):
        """The library's forward, on embeddings that hold the images.

        `image_features` may be None or have M = 0 for text. ValueError if the image tokens do not match the features,
        or if there are none for the image tokens of a prompt: of anything but one token after a filled cache.
        `lengths`: how the one row is made of documents that do not see each other; instead of a mask and positions.
        """
        images = None
        if image_features is not None and (input_ids is None or inputs_embeds is not None):
            raise ValueError("image_features need input_ids, which say where the images stand; inputs_embeds do not.")
        if image_features is not None and getattr(self.config, "image_attention", "causal") == "mixed":
            images = number_images(input_ids, self.config.image_token_id, image_features.shape[1])
        if lengths is not None:
            positions = torch.cat([torch.arange(length) for length in lengths])
            position_ids = positions.to(input_ids.device, non_blocking=True)[None]
            documents = self.documents(lengths, images, input_ids.device)
            # no mask: the attention is told the documents. The library makes none where it is handed one
            attention_mask = torch.empty(1, 1, 1, 1) if "lengths" in documents else None
            kwargs |= documents
        if input_ids is not None and inputs_embeds is None:
            is_step = input_ids.shape[1] == 1 and past_key_values is not None and past_key_values.get_seq_length() > 0
            inputs_embeds, input_ids = self.embed_with_images(input_ids, image_features, not is_step), None
            if images is not None and lengths is None:
                attention_mask = self.mixed_mask(images, inputs_embeds, attention_mask, past_key_values, position_ids)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def mixed_mask(self, images, inputs_embeds, attention_mask, past_key_values, position_ids) -> Tensor:
        """The library's mask for rows of `images` [B, L] (see `number_images`) behind what the cache holds."""
        if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2):
            raise ValueError("attention_mask: mixed attention makes its own mask; give the 2-D one that marks padding.")
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=F.pad(images, (seen, 0), value=-1),  # the library counts from the cache's beginning
        )

    def documents(self, lengths: Sequence[int], images: Tensor | None, device: torch.device) -> dict:
        """What the model's attention takes to keep documents apart, and with `images` [1, L] to let the tokens of an image
        see each other. ValueError for one that cannot."""
        attention = self.config._attn_implementation
        if attention == PACKED_SDPA:
            return {"lengths": lengths, "masks": None if images is None else document_masks(images[0], lengths)}
        if images is not None:
            raise ValueError(
                f'attention "{attention}" cannot let the tokens of an image in a packed row see each other'
            )
        if attention.startswith("flash_attention"):  # flash-attn's own form: where each document starts, and the end
            starts = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
            of_both = {"cu_seq_lens": starts, "max_length": max(lengths)}
            return {f"{name}_{side}": value for name, value in of_both.items() for side in "qk"}
        raise ValueError(f'attention "{attention}" cannot keep documents in a row apart')

    def embed_with_images(self, input_ids, image_features, is_prompt):
        """input_ids [B, L], image_features [M, N, D] or None -> embeddings [B, L, D]."""
        image_token_id = getattr(self.config, "image_token_id", None)
        if image_token_id is None:
            if image_features is not None:
                raise ValueError("the model knows no image token; call attach_tokenizer(model, tokenizer) first.")
            return self.embed_tokens(input_ids)

        is_image = input_ids == image_token_id
        if image_features is not None or is_prompt:
            check_image_tokens(is_image, image_features)
        # The image token may be a new one, without an embedding: look up row 0 in its place.
        inputs_embeds = self.embed_tokens(input_ids.masked_fill(is_image, 0))
        if image_features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_features.to(inputs_embeds.dtype))


def number_images(input_ids: Tensor, image_token_id: int, num_image_tokens: int) -> Tensor:
    """[B, L]: for each token of input_ids [B, L] the number of the image in its row that it belongs to, -1 for text. Images
    may stand side by side: each has `num_image_tokens`."""
    is_image = input_ids == image_token_id
    numbers = (is_image.cumsum(dim=1) - 1) // max(num_image_tokens, 1)
    return torch.where(is_image, numbers, -1)


class ImageGeneration:
    """Mixin for a CausalLM whose `base_class` is an ImageInjection: `forward` and `generate` take `image_features`."""

    base_class: type

    def __init__(self, config):
        super().__init__(config)
        self.model = self.base_class(config)
        self.loss_type = "ForCausalLM"  # the library guesses it from the class's name, where v1's does not tell
        self.post_init()

    # The arguments are listed, not packed: `generate` reads both signatures to know what the model accepts.
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        image_features=None,
        **kwargs,
    ):
        """The library's forward; `image_features` [M, N, D] travel to the base model."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            image_features=image_features,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        image_features=None,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # Later steps see the images through the cache; without a cache every step reads the whole prompt again.
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["image_features"] = image_features
        return inputs

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # Every chunk would be given all features: which of them stand in it, the library does not know.
        image_features = model_kwargs.get("image_features")
        has_images = image_features is not None and len(image_features) > 0
        if has_images and generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size: a prompt with images is not read in chunks; leave it out.")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # The library repeats every tensor along its first dimension. Features are not one to a row: rows may hold no
        # image or several, and each copy of a row (a beam, a sample) needs all of its row's images, in order.
        image_features = model_kwargs.pop("image_features", None)
        if image_features is not None and expand_size > 1:
            is_image = input_ids == self.config.image_token_id
            check_image_tokens(is_image, image_features)
            images_per_row = (is_image.sum(dim=1) // max(image_features.shape[1], 1)).tolist()
            rows = image_features.split(images_per_row)
            image_features = torch.cat([row.repeat(expand_size, 1, 1) for row in rows])
        ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return ids, model_kwargs | {"image_features": image_features}


def check_image_tokens(is_image, image_features):
    """ValueError unless `is_image` [B, L] marks M * N places in all and whole images, multiples of N, in every row."""
    images, places = (0, 0) if image_features is None else image_features.shape[:2]
    per_row = is_image.sum(dim=1)
    matches = per_row.sum() == images * places
    if images * places > 0:
        matches &= (per_row % places == 0).all()
    if not matches:
        raise ValueError(
            f"image tokens a row: {per_row.tolist()}, {int(per_row.sum())} in all; image features: {images} images of "
            f"{places}, {images * places} in all. Every image needs its {places} tokens, in one row."
        )
