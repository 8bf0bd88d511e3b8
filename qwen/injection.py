"""Image features inside a decoder-only language model: two mixins around transformers' own classes.

`ImageInjection` goes before a base model (`Qwen2Model`), `ImageGeneration` before its CausalLM. A prompt holds
`image_token_id` N times for each image. The embeddings at these positions are replaced by the image's N features, then the
library's forward runs. Nothing is inserted, padded or trimmed. Encoders and projectors are not known here.

Attention is `causal`, or `mixed` (`config.image_attention`): the tokens of one image attend to each other as well. An image
never attends to tokens after it, so an answer cannot leak into an image.

Shapes: M images in the batch, row by row and from left to right; N features per image; D hidden size; B rows; L tokens
per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from qwen.attention import PACKED_SDPA, document_masks

# Private names of transformers used in this package, to be checked at upgrades:
#   config._attn_implementation: read in ImageInjection.documents
#   GenerationMixin._prefill, ._expand_inputs_for_generation: overridden in ImageGeneration
#   GenerationMixin._validate_generated_length: overridden in QWenLMHeadModel (modeling.py)
#   PreTrainedModel._keys_to_ignore_on_load_unexpected: set in QWenLMHeadModel (modeling.py)
# Public by name but without documentation: conversion_mapping and core_model_loading (__init__.py, configuration.py),
# masking_utils and integrations.sdpa_attention (injection.py, attention.py).

if TYPE_CHECKING:  # what the mixins use of the classes that they are combined with; at run time they have no base
    from transformers import PreTrainedModel as _BaseModel

    class _CausalLM(_BaseModel):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]: ...
        def _prefill(self, *args: Any, **kwargs: Any) -> ModelOutput: ...
        def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> tuple[LongTensor, dict[str, Any]]: ...
        def _validate_generated_length(self, *args: Any, **kwargs: Any) -> None: ...
else:
    _BaseModel = _CausalLM = object


NO_TOKEN = -1  # the id that no token has


class ImageInjection(_BaseModel):
    """Mixin for a base model: `forward` takes `image_features` [M, N, D] beside `input_ids` [B, L]."""

    embed_tokens: nn.Embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_features: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the library's forward on embeddings that contain the images.

        image_features: None or M = 0 for text. lengths: tokens of each document in the one row; documents do not attend to
        each other. It replaces `attention_mask` and `position_ids`.
        ValueError: the image tokens do not match the features. Features are required for the image tokens of a prompt,
        which is any input but a single token after a filled cache. `input_ids` may be on the CPU: they are checked there and
        moved, while counting tokens on a GPU waits for all queued work.
        """
        images = None
        if image_features is not None and (input_ids is None or inputs_embeds is not None):
            raise ValueError("image_features need input_ids, which say where the images are; inputs_embeds do not.")
        if input_ids is not None and inputs_embeds is None:
            is_step = input_ids.shape[1] == 1 and past_key_values is not None and past_key_values.get_seq_length() > 0
            image_token_id = self._image_token(image_features)
            if image_token_id != NO_TOKEN and (image_features is not None or not is_step):
                check_image_tokens(input_ids == image_token_id, image_features)
            input_ids = input_ids.to(self.embed_tokens.weight.device, non_blocking=True)
        if image_features is not None and getattr(self.config, "image_attention", "causal") == "mixed":
            assert input_ids is not None  # as checked above
            images = number_images(input_ids, self.config.image_token_id, image_features.shape[1])
        if lengths is not None:
            assert input_ids is not None  # documents are packed as ids
            positions = torch.cat([torch.arange(length) for length in lengths])
            position_ids = positions.to(input_ids.device, non_blocking=True)[None]
            documents = self.documents(lengths, images, input_ids.device)
            # packed_sdpa gets the lengths instead of a mask; the library makes no mask of its own if one is given
            attention_mask = torch.empty(1, 1, 1, 1) if "lengths" in documents else None
            kwargs |= documents
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds, input_ids = self.embed_with_images(input_ids, image_features), None
            if images is not None and lengths is None:
                attention_mask = self.mixed_mask(
                    images,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def mixed_mask(
        self,
        images: Tensor,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> Any:
        """Return the library's mask for rows of `images` [B, L] (see `number_images`) after the cached tokens.

        Its type depends on the attention.
        """
        if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.ndim != 2):
            raise ValueError("attention_mask: mixed attention makes its own mask; give the 2-D one that marks padding.")
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=F.pad(images, (cached, 0), value=-1),  # indexed from the start of the cache
        )

    def documents(self, lengths: Sequence[int], images: Tensor | None, device: torch.device) -> dict:
        """Return the keyword arguments with which the model's attention keeps documents apart.

        images [1, L]: let the tokens of an image attend to each other. ValueError: the attention does not support it.
        """
        attention = self.config._attn_implementation
        if attention == PACKED_SDPA:
            return {"lengths": lengths, "masks": None if images is None else document_masks(images[0], lengths)}
        if images is not None:
            raise ValueError(
                f'attention "{attention}" cannot let the tokens of an image in a packed row attend to each other'
            )
        if attention.startswith("flash_attention"):  # flash-attn takes each document's start, and the end of the last
            starts = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
            of_both = {"cu_seq_lens": starts, "max_length": max(lengths)}
            return {f"{name}_{side}": value for name, value in of_both.items() for side in "qk"}
        raise ValueError(f'attention "{attention}" cannot keep documents in a row apart')

    def _image_token(self, image_features: Tensor | None) -> int:
        """Return the id of the image token, or NO_TOKEN. ValueError: the model has none, but there are features."""
        image_token_id = getattr(self.config, "image_token_id", None)
        if image_token_id is None and image_features is not None:
            raise ValueError("the model has no image token; call attach_tokenizer(model, tokenizer) first.")
        return NO_TOKEN if image_token_id is None else image_token_id

    def embed_with_images(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """Embed input_ids [B, L] with image_features [M, N, D], whose numbers match, or None -> [B, L, D].

        ValueError: the model has no image token.
        """
        is_image = input_ids == self._image_token(image_features)
        # The image token may be new and without an embedding: look up row 0 instead.
        inputs_embeds = self.embed_tokens(input_ids.masked_fill(is_image, 0))
        if image_features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_features.to(inputs_embeds.dtype))


def number_images(input_ids: Tensor, image_token_id: int, num_image_tokens: int) -> Tensor:
    """Return for each token of input_ids [B, L] the number of its image within the row, -1 for text: [B, L].

    Images may be adjacent: each has `num_image_tokens` tokens.
    """
    is_image = input_ids == image_token_id
    numbers = (is_image.cumsum(dim=1) - 1) // max(num_image_tokens, 1)
    return torch.where(is_image, numbers, -1)


class ImageGeneration(_CausalLM):
    """Mixin for a CausalLM whose `base_class` is an ImageInjection: `forward` and `generate` take `image_features`."""

    base_class: type

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self.base_class(config)
        self.loss_type = "ForCausalLM"  # the library guesses it from the class's name, which fails for Qwen v1
        self.post_init()

    # `generate` reads the signatures of the next two methods to find out which arguments the model accepts, so they list
    # transformers' own.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the library's forward, which passes `image_features` [M, N, D] to the base model."""
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
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # Later steps read the images from the cache. Without a cache, every step computes the whole prompt again.
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["image_features"] = image_features
        return inputs

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> ModelOutput:
        # The library would pass all features to every chunk: it does not know which images a chunk contains.
        image_features = model_kwargs.get("image_features")
        has_images = image_features is not None and len(image_features) > 0
        if has_images and generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size: a prompt with images cannot be read in chunks; leave it out.")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[LongTensor, dict[str, Any]]:
        # The library repeats every tensor along its first dimension. Features need more: a row may have no image or
        # several, and each copy of a row (a beam or a sample) needs all images of the row, in order.
        image_features = model_kwargs.pop("image_features", None)
        if image_features is not None and expand_size > 1:
            assert input_ids is not None  # features come with ids
            is_image = input_ids == self.config.image_token_id
            check_image_tokens(is_image, image_features)
            images_per_row = (is_image.sum(dim=1) // max(image_features.shape[1], 1)).tolist()
            rows = image_features.split(images_per_row)
            image_features = torch.cat([row.repeat(expand_size, 1, 1) for row in rows])
        ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return ids, model_kwargs | {"image_features": image_features}


def check_image_tokens(is_image: Tensor, image_features: Tensor | None) -> None:
    """Check that `is_image` [B, L] marks M * N tokens in total and a multiple of N in every row; else ValueError."""
    images, tokens = (0, 0) if image_features is None else image_features.shape[:2]
    per_row = is_image.sum(dim=1)
    matches = per_row.sum() == images * tokens
    if images * tokens > 0:
        matches &= (per_row % tokens == 0).all()
    if not matches:
        raise ValueError(
            f"image tokens per row: {per_row.tolist()}, {int(per_row.sum())} in total; image features: {images} images of "
            f"{tokens}, {images * tokens} in total. Every image needs its {tokens} tokens in one row."
        )
