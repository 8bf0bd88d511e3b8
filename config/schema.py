"""The contents of a config: one frozen dataclass for each section. config.yaml explains every key beside its value.

Upper bounds are far beyond any use. They exist because a checkpoint's config may come from a stranger, and a number in it
must not fill the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config.typed_yaml import FolderOrHub, Switch, Trainable, bounds

STAGES_FOLDER = "stages"  # inside a run's folder, with one folder for each stage
IGNORE_INDEX = -100  # the label that torch's cross entropy ignores


@dataclass(frozen=True)
class ColumnsConfig:
    id: str | None = None
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    caption: str | None = None
    text: str | None = None
    conversations: str | None = None
    system: str | None = None
    type: str | None = None
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceConfig:
    name: str
    annotations: Path
    format: str = "auto"
    images: Path | None = None
    limit: int | None = bounds(None, low=1)
    weight: float = bounds(1.0, low=0.0)
    captions: Literal["all", "one_per_epoch"] = "all"
    split: Literal["auto", "train", "validation"] = "auto"
    columns: ColumnsConfig | None = None
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class AugmentConfig:
    crop: float = bounds(0.0, low=0.0, high=0.9)
    rotate: float = bounds(0.0, low=0.0, high=180.0)
    color: float = bounds(0.0, low=0.0, high=0.9)
    blur: float = bounds(0.0, low=0.0, high=32.0)
    views: int | None = bounds(None, low=1, high=2**10)

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each change, by name."""
        return {name: float(getattr(self, name)) for name in ("crop", "rotate", "color", "blur")}


@dataclass(frozen=True)
class DataConfig:
    qa_file: Path
    sources: tuple[SourceConfig, ...] = ()
    demo_folder: Path | None = None
    validation_file: Path | None = None
    validation_fraction: float = bounds(0.01, low=0.0, high=0.9)
    max_refused: float = bounds(0.01, low=0.0, high=1.0)
    verify_images: bool = True
    on_bad_image: Literal["stop", "skip"] = "stop"
    augment: AugmentConfig | None = None
    max_length: int = bounds(1024, low=8, high=2**20)
    system_prompt: str | None = "You are a helpful assistant."


@dataclass(frozen=True)
class ScratchConfig:
    tokenizer: FolderOrHub
    hidden_size: int = bounds(low=8, high=2**14)
    num_hidden_layers: int = bounds(low=1, high=2**9)
    num_attention_heads: int = bounds(low=1, high=2**9)
    architecture: Literal["qwen2_moe", "qwen3_moe", "qwen2", "qwen3"] = "qwen2_moe"
    vocab_size: int | None = bounds(None, low=300, high=2**18)
    num_key_value_heads: int | None = bounds(None, low=1, high=2**9)
    intermediate_size: int | None = bounds(None, low=1, high=2**17)
    num_experts: int | None = bounds(None, low=2, high=2**10)
    num_experts_per_tok: int | None = bounds(None, low=1, high=2**10)
    moe_intermediate_size: int | None = bounds(None, low=1, high=2**17)
    shared_expert_intermediate_size: int | None = bounds(None, low=1, high=2**17)
    rope_theta: float = bounds(10_000.0, low=1.0)
    initializer_range: float = bounds(0.02, low=1e-6, high=1.0)
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class ModelConfig:
    vision_tower: FolderOrHub
    language_model: FolderOrHub | None = None
    from_scratch: ScratchConfig | None = None
    attention: Literal["causal", "mixed"] = "causal"
    vision_feature_layer: int = -2
    vision_features: Literal["hidden_state", "normed_without_first"] = "hidden_state"
    image_size: int | None = bounds(None, low=1, high=2**11)
    projector: str = "mlp"
    projector_hidden_size: int | None = bounds(None, low=1, high=2**16)
    pixel_shuffle_factor: int | None = bounds(None, low=2, high=2**4)
    num_queries: int | None = bounds(None, low=1, high=2**12)
    start_from: Path | None = None


@dataclass(frozen=True)
class LoraConfig:
    r: int = bounds(16, low=1, high=2**16)
    alpha: float = bounds(32.0, low=0.0)
    dropout: float = bounds(0.0, low=0.0, high=0.99)
    target_modules: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True)
class TrainableConfig:
    vision_tower: Trainable = Trainable("frozen")
    projector: Trainable = Trainable("full")
    language_model: Trainable = Trainable("lora")
    embeddings: Trainable = Trainable("frozen")


@dataclass(frozen=True)
class StageConfig:
    name: str
    config: Config  # complete: each stage is a run with its own folder


@dataclass(frozen=True)
class TrainConfig:
    trainable: TrainableConfig = TrainableConfig()
    freeze_random: tuple[Literal["projector", "language_model", "embeddings"], ...] = ()
    projector_start: Literal["words", "calibrated", "random"] = "words"
    projector_lr: float | None = bounds(None, low=0.0)
    lora_lr: float | None = bounds(None, low=0.0)
    language_model_lr: float | None = bounds(None, low=0.0)
    embeddings_lr: float | None = bounds(None, low=0.0)
    vision_tower_lr: float | None = bounds(None, low=0.0)
    router_aux_loss_coef: float | None = bounds(None, low=0.0)
    num_train_epochs: float = bounds(1.0, low=0.0)
    steps_per_epoch: int | None = bounds(None, low=1)
    max_steps: int | None = bounds(None, low=1)
    per_device_train_batch_size: int = bounds(4, low=1)
    gradient_accumulation_steps: int = bounds(1, low=1)
    warmup_ratio: float = bounds(0.03, low=0.0, high=1.0)
    weight_decay: float = bounds(0.0, low=0.0)
    image_noise: float = bounds(0.0, low=0.0)
    max_grad_norm: float | None = bounds(1.0, low=0.0)
    max_bad_steps: int = bounds(3, low=1)
    fsdp: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    packing: Switch = Switch("auto")
    cache_features: Switch = Switch("auto")
    fused_lora: Switch = Switch("auto")
    compile: Switch = Switch("auto")
    activation_checkpointing: Switch = Switch("auto")
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    liger_kernels: Switch = Switch("auto")
    num_threads: int | None = bounds(None, low=1, high=2**10)
    num_workers: int = bounds(2, low=0, high=2**10)
    logging_steps: int = bounds(10, low=1)
    eval_steps: int | None = bounds(None, low=1)
    eval_samples: int | None = bounds(512, low=1)
    score_samples: int | None = bounds(None, low=1)
    save_steps: int | None = bounds(500, low=1)
    save_total_limit: int | None = bounds(2, low=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    stages: tuple[StageConfig, ...] = ()


@dataclass(frozen=True)
class TestConfig:
    images: Path | None = None
    questions: tuple[str, ...] = ("Describe this image.",)
    max_new_tokens: int = bounds(128, low=1, high=2**16)
    batch_size: int = bounds(8, low=1, high=2**16)
    num_beams: int = bounds(1, low=1, high=2**10)


@dataclass(frozen=True)
class Config:
    data: DataConfig
    model: ModelConfig
    output_dir: Path
    seed: int = bounds(0, low=0, high=2**32 - 1)
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    test: TestConfig = TestConfig()
