"""Build the whole model from the config's sections, for training and answering alike; say what a precision means on a
device."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

import qwen
from config import InputError, LoraConfig, ModelConfig, TrainConfig, frozen_error
from model.checkpoint import has_adapter, load_adapter, refuse_other_sizes
from model.checkpoint_folder import read_json, verify_folder
from model.model import VisionLanguageModel
from model.projector import build_projector, num_image_tokens
from model.start import load_start
from model.trainable import WeightOrigins, add_lora, halve_lora_base, set_trainable
from qwen.attention import PACKED_SDPA
from visual.encoders import load_vision_tower
from visual.encoders import num_image_tokens as num_patches
from visual.images import read_image
from visual.processor import ImageProcessor, load_image_processor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Processors:
    """Tokenizer and image processor of a model. Holds no weights."""

    tokenizer: PreTrainedTokenizerFast
    image_processor: ImageProcessor
    num_image_tokens: int  # that one image takes
    max_tokens: int | None = field(default=None, kw_only=True)  # longest input of the language model; None: no limit

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def token_id(self, token: str) -> int:
        """Return the id of a special token."""
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        return token_id


@dataclass(frozen=True)
class Built(Processors):
    """A model, the origins of its weights, and what reads its images and text."""

    model: VisionLanguageModel
    origins: WeightOrigins
    is_projector_new: bool  # its weights are random, not a checkpoint's
    start_report: tuple[str, ...] = ()  # lines: what was taken from a checkpoint, what is new, what was left


def load_processors(model: ModelConfig, checkpoint: Path | None = None) -> Processors:
    """Load the tokenizer and the image processor, and count the tokens of an image. Takes seconds: no weight is read.

    checkpoint: a verified folder whose own tokenizer and image processor are used instead of those beside the weights. A
    language model from scratch keeps the tokenizer of the checkpoint that it starts from. Raises InputError.
    """
    new, own = model.from_scratch, checkpoint
    if checkpoint is None and new is not None and model.start_from is not None:
        verify_folder(model.start_from)  # its error names the folder; the tokenizer's would not
        own = model.start_from
    named = new.tokenizer if new is not None else model.language_model
    assert named is not None  # config.rules refuses a config without a language model
    tokenizer = qwen.load_tokenizer(str(own / "tokenizer") if own else named, any_kind=new is not None)
    image_processor = load_image_processor(model.vision_tower, image_size=model.image_size)
    if own:
        saved, size = load_image_processor(own / "image_processor"), image_processor.image_size
        if saved.image_size != size:
            raise InputError(
                f"{own / 'image_processor'}: makes images of {saved.image_size} pixels, but {model.vision_tower} takes "
                f"{size}; the checkpoint was trained with another encoder, or is damaged."
            )
        image_processor = saved
    patches = num_patches(
        model.vision_tower,
        model.vision_feature_layer,
        image_size=model.image_size,
        normed_without_first=takes_normed(model),
    )
    return Processors(
        tokenizer,
        image_processor,
        num_image_tokens(
            model.projector,
            patches,
            num_queries=model.num_queries,
            pixel_shuffle_factor=model.pixel_shuffle_factor,
        ),
        max_tokens=None if model.language_model is None else qwen.longest_input(model.language_model),
    )


def takes_normed(model: ModelConfig) -> bool:
    """Return whether the features are those after the encoder's last norm, without the first vector. Raises InputError for a
    projector that needs a whole grid of patches."""
    if model.vision_features == "hidden_state":
        return False
    if model.projector not in ("mlp", "low_rank_mlp"):
        raise InputError(
            f'"model.vision_features" is {model.vision_features}, which leaves no square grid of patches, but '
            f"model.projector {model.projector} needs one; use mlp or low_rank_mlp, or hidden_state."
        )
    return True


def build_model(
    processors: Processors,
    settings: ModelConfig,
    lora: LoraConfig,
    train: TrainConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    attn_implementation: str = PACKED_SDPA,
) -> Built:
    """Load encoder and language model in `dtype`, make the projector, add LoRA, fill in the weights that
    `settings.start_from` (a verified checkpoint) has trained, and enable what `train.trainable` says, in float32.

    Parts of the language model that an earlier run trained or that began at random are float32 too; the matrices below LoRA
    are not. Raises InputError for whatever is missing or does not fit.
    """
    transformers.utils.logging.disable_progress_bar()
    checkpoint, new = settings.start_from, settings.from_scratch
    tower = load_vision_tower(
        settings.vision_tower,
        feature_layer=settings.vision_feature_layer,
        image_size=settings.image_size,
        dtype=dtype,
        normed_without_first=takes_normed(settings),
    )
    if new is None:
        assert settings.language_model is not None
        lm = qwen.load_language_model(settings.language_model, dtype, attn_implementation)
    else:
        vocab_size = 1 + max(processors.tokenizer.get_vocab().values())  # ids may have gaps
        if checkpoint is not None:
            refuse_other_sizes(checkpoint, new, vocab_size=vocab_size)
        lm = qwen.new_language_model(new, vocab_size=vocab_size, seed=seed, attn_implementation=attn_implementation)
    qwen.set_image_attention(lm, settings.attention)
    qwen.attach_tokenizer(lm, processors.tokenizer)

    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)  # the initial weights of the projector and LoRA depend on the seed and nothing else
    projector = build_projector(
        settings.projector,
        in_features=tower.hidden_size,
        hidden_size=settings.projector_hidden_size,
        out_features=lm.config.hidden_size,
        num_queries=settings.num_queries,
        pixel_shuffle_factor=settings.pixel_shuffle_factor,
    )
    model = VisionLanguageModel(tower, projector, lm, image_noise=train.image_noise)
    origins, start = WeightOrigins.new(model, from_scratch=new is not None), None
    if checkpoint is not None:
        start = load_start(model, origins, checkpoint, settings=settings)
        origins = start.origins
    if train.trainable.language_model.kind == "lora":
        add_lora(model, lora, qwen.lora_target_modules(lm, list(lora.target_modules)))
    if checkpoint is not None and has_adapter(checkpoint):
        if not model.has_lora:
            raise InputError(
                f'{checkpoint}: holds LoRA weights, but "train.trainable.language_model" is '
                f"{train.trainable.language_model}; set it to lora, with the same lora.r and lora.target_modules."
            )
        load_adapter(model, checkpoint)
    torch.set_rng_state(generator_state)
    report = start.report(checkpoint, model) if checkpoint is not None and start is not None else []

    is_projector_new = "projector" in origins.random
    set_trainable(model, train.trainable)
    if model.has_lora:
        halve_lora_base(model, dtype)
    origins = origins.after_training(model, train.trainable)
    if random := sorted(origins.random - set(train.freeze_random), reverse=True):
        raise frozen_error(random[0], getattr(train.trainable, random[0]))
    return Built(
        **vars(processors),
        model=model.train(),
        origins=origins,
        is_projector_new=is_projector_new,
        start_report=tuple(report),
    )


def checkpoint_activations(model: VisionLanguageModel) -> None:
    """Make the backward pass recompute each layer of the language model instead of keeping its activations."""
    with warnings.catch_warnings():  # the newer name of this method is missing in some 5.x versions
        warnings.simplefilter("ignore", FutureWarning)
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})


def read_pixels(
    image_processor: ImageProcessor, path: Path, view: Callable[[Image.Image], Image.Image] | None = None
) -> torch.Tensor:
    """Read an image file as [3, S, S]: the only way from a file to the model. view: changes the RGB image first. Raises
    ImageError."""
    image = read_image(path)
    return image_processor([image if view is None else view(image)])[0]


def resolve_precision(word: str, device: torch.device) -> str:
    """Resolve `auto` to bf16 where the device computes in it natively, else fp16 on a GPU, else fp32.

    Raises InputError for fp16 without a GPU.
    """
    native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    if word == "auto":
        return "bf16" if native_bf16 else "fp16" if device.type == "cuda" else "fp32"
    if word == "fp16" and device.type != "cuda":
        raise InputError('"train.precision" is fp16, which needs a GPU; on this machine use auto, bf16 or fp32.')
    return word


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() if hasattr(torch.cpu, "_is_avx512_bf16_supported") else False


def autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a function that makes the context in which the model runs, the same for training and answering."""
    return functools.partial(torch.autocast, device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def save_processors(processors: Processors, folder: Path) -> None:
    """Write tokenizer/ and image_processor/ into `folder`, for `load_processors(..., checkpoint=folder)`."""
    processors.tokenizer.save_pretrained(folder / "tokenizer")
    processors.image_processor.save(folder / "image_processor")


# ---------------------------------------------------------------------------------------------------------------------
# Files of a released model


def weight_files(path: str) -> dict[str, Path] | None:
    """Return {name: file} of config.json and the safetensors files of a folder or cached hub model; None if any is missing.

    Raises InputError if the index of a model in several files is damaged.
    """

    def find(name: str) -> Path | None:
        options = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(path, name, **options)
        return None if found is None else Path(found)

    names = [SAFE_WEIGHTS_NAME]
    if find(SAFE_WEIGHTS_NAME) is None:
        index = find(SAFE_WEIGHTS_INDEX_NAME)
        names = [] if index is None else _shards(index)
    files = {name: file for name in ["config.json", *names] if (file := find(name)) is not None}
    return files if names and len(files) == 1 + len(names) else None


def _shards(index: Path) -> list[str]:
    """Return the names of the files that a model.safetensors.index.json lists."""
    values = read_json(index, "use another model")
    listed = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f'{index}: "weight_map" is not an object of file names; use another model.')
    return sorted(set(listed.values()))
