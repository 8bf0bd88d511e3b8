"""Builds the whole model from plain values, for training and for answering alike; and what precision means on a device."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase

import qwen
from config import InputError, frozen_error
from model.checkpoint import has_adapter, load_adapter, load_trained, refuse_other_sizes
from model.model import VisionLanguageModel
from model.projector import build_projector, count_tokens
from model.trainable import add_lora, set_trainable
from qwen.attention import PACKED_SDPA
from visual.encoders import count_image_tokens, load_vision_tower
from visual.images import read_image
from visual.processor import ImageProcessor, load_image_processor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Processors:
    """What reads pictures and text for a model; no weights among it."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor
    num_image_tokens: int  # that one image takes

    def chat_values(self) -> dict:
        """The values that `dataset.conversation.ChatFormat` takes, but for the system prompt."""
        return {
            "encode_text": functools.partial(qwen.encode_text, self.tokenizer),
            "im_start_id": self.tokenizer.convert_tokens_to_ids("<|im_start|>"),
            "im_end_id": self.tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "end_of_text_id": self.tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "image_token_id": qwen.image_token_id(self.tokenizer),
            "num_image_tokens": self.num_image_tokens,
        }


@dataclass(frozen=True)
class Built(Processors):
    """A model with what reads its pictures and its text."""

    model: VisionLanguageModel


def load_processors(
    vision_tower: str,
    image_size: int | None,
    language_model: str,
    checkpoint: Path | None = None,
    projector: str = "mlp",
    num_queries: int | None = None,
    any_tokenizer: bool = False,
) -> Processors:
    """Tokenizer and image processor of the encoder and the language model (folders or hub names), in seconds, whatever
    the size of the two, and how many tokens the projector makes of an image. checkpoint: its own are used instead of those
    beside the weights. any_tokenizer: the language model is a new one, `language_model` is where its tokenizer lies (see
    `qwen.load_tokenizer`). Raises InputError."""
    tokenizer = qwen.load_tokenizer(str(checkpoint / "tokenizer") if checkpoint else language_model, any_tokenizer)
    image_processor = load_image_processor(vision_tower, image_size=image_size)
    if checkpoint:
        own, size = load_image_processor(checkpoint / "image_processor"), image_processor.image_size
        if own.image_size != size:
            raise InputError(
                f"{checkpoint / 'image_processor'}: makes images of {own.image_size} pixels, but {vision_tower} takes "
                f"{size}; the checkpoint was trained with another encoder, or is damaged."
            )
        image_processor = own
    num_patches = count_image_tokens(vision_tower, image_size)
    return Processors(tokenizer, image_processor, count_tokens(projector, num_patches, num_queries))


def build_model(
    processors: Processors,
    vision_tower: str,
    vision_feature_layer: int,
    image_size: int | None,
    projector: str,
    projector_hidden_size: int | None,
    language_model: str | None,
    trainable: dict[str, str],
    lora: dict,
    dtype: torch.dtype,
    seed: int,
    checkpoint: Path | None = None,
    attn_implementation: str = PACKED_SDPA,
    num_queries: int | None = None,
    from_scratch: dict | None = None,
    attention: str = "causal",
    freeze_random: Collection[str] = (),
) -> Built:
    """Load encoder and language model (folders or hub names) in `dtype`, make the projector, add LoRA, fill in what
    `checkpoint`, which the caller has verified, trained, and let train what `trainable` (part -> word) says, in float32.
    A language model from scratch is float32 as a whole: its weights are nowhere but in what this project writes.

    processors: as `load_processors` returns them. lora: r, alpha, dropout, target_modules. from_scratch: instead of a
    language_model the sizes of a new one, as `qwen.new_language_model` takes them. attention: causal or mixed.
    freeze_random: parts that may be frozen though their weights are random. Raises InputError for whatever is missing or
    does not fit.
    """
    transformers.utils.logging.disable_progress_bar()  # one bar a part of the model says nothing
    tower = load_vision_tower(vision_tower, feature_layer=vision_feature_layer, image_size=image_size, dtype=dtype)
    if from_scratch is None:
        lm = qwen.load_language_model(language_model, dtype, attn_implementation)
    else:
        sizes = from_scratch | {"attn_implementation": attn_implementation}
        vocabulary = 1 + max(processors.tokenizer.get_vocab().values())  # ids may have gaps
        if checkpoint is not None:
            refuse_other_sizes(checkpoint, vocabulary, sizes)
        lm = qwen.new_language_model(vocabulary, seed, **sizes)
    qwen.set_image_attention(lm, attention)
    qwen.attach_tokenizer(lm, processors.tokenizer)

    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)  # the projector's and LoRA's first weights depend on the seed and on nothing before
    widths = tower.hidden_size, projector_hidden_size, lm.config.hidden_size
    model = VisionLanguageModel(tower, build_projector(projector, *widths, num_queries), lm)
    if from_scratch is not None:
        model.is_from_scratch = True
        model.untrained |= {"language_model", "embeddings"}
        model.trained_before["language_model"] = {name for name, _ in lm.named_parameters()}
    if checkpoint is not None:
        load_trained(model, checkpoint)
    if trainable["language_model"] == "lora":
        names = qwen.lora_target_modules(lm, lora["target_modules"])
        add_lora(model, lora["r"], lora["alpha"], lora["dropout"], names)
    if checkpoint is not None and has_adapter(checkpoint):
        if not model.has_lora:
            raise InputError(
                f'{checkpoint}: holds LoRA weights, but "train.trainable.language_model" is {trainable["language_model"]}; '
                "set it to lora, with the same lora.r and lora.target_modules."
            )
        load_adapter(model, checkpoint)
    torch.set_rng_state(generator_state)

    set_trainable(model, trainable)
    if left := sorted(model.untrained - set(freeze_random), reverse=True):
        raise frozen_error(left[0], trainable[left[0]])
    return Built(**vars(processors), model=model.train())


def checkpoint_activations(model: VisionLanguageModel) -> None:
    """Let each of the language model's layers be computed a second time in the backward, instead of kept."""
    with warnings.catch_warnings():  # the newer name of this method is not in every version 5
        warnings.simplefilter("ignore", FutureWarning)
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})


def read_pixels(image_processor: ImageProcessor, path: Path) -> torch.Tensor:
    """An image file -> [3, S, S], as the encoder takes it: the one way from a file to the model. Raises ImageError."""
    return image_processor([read_image(path)])[0]


def resolve_precision(word: str, device: torch.device) -> str:
    """`auto` -> bf16 where the device computes in it, else fp16 on a GPU, else fp32. A word that the device cannot do
    raises InputError."""
    native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    if word == "auto":
        return "bf16" if native_bf16 else "fp16" if device.type == "cuda" else "fp32"
    if word == "fp16" and device.type != "cuda":
        raise InputError('"train.precision" is fp16, which needs a GPU; on this machine use auto, bf16 or fp32.')
    return word


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False


def autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """A function that makes the context in which the model runs at `precision`: the same for training and answering."""
    return lambda: torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def save_processors(processors: Processors, folder: Path) -> None:
    """Put tokenizer and image processor into a checkpoint, so that it answers as it was trained."""
    processors.tokenizer.save_pretrained(folder / "tokenizer")
    processors.image_processor.save(folder / "image_processor")
