"""What a user would take instead: transformers' LLaVA with PEFT's LoRA, trained by transformers' Trainer or by TRL.

The peers get every advantage that costs nothing: token ids made beforehand, no logging, no saving. They start with the
weights of ours and see the same samples.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.annotations import SEED
from benchmarks.models import PAD_TOKEN_ID, TRAIN, Task
from benchmarks.ours import MAX_GRAD_NORM, AfterStep, Train, require
from config import TrainConfig
from dataset.batch import Batch, Sample
from qwen.lora import LINEARS

LLAVA_NAMES = {  # beginning of a weight's name in our model -> in LLaVA
    "vision_tower.model.": "model.vision_tower.",
    "projector.": "model.multi_modal_projector.",
    "language_model.base_model.model.model.": "model.language_model.",
    "language_model.base_model.model.lm_head.": "lm_head.",
}


@dataclass(frozen=True)
class Peer:
    """LLaVA, and what its trainer needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    read: Callable[[Sequence[int]], dict[str, Tensor]]  # numbers of samples -> LLaVA's inputs
    samples: int
    batch_size: int
    tokenizer: PreTrainedTokenizerBase


def add_lora(
    llava: Any, rank: int, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Add PEFT's LoRA to LLaVA's language model and make the projector train, in float32. trained, frozen: weights of our
    model by its names, which are loaded; the same ones must train in both."""
    linears = rf".*language_model.*\.({'|'.join(LINEARS)})"
    wrapped = peft.get_peft_model(llava, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears))
    llava.model.multi_modal_projector.requires_grad_(True).float()
    trains = {name for name, parameter in llava.named_parameters() if parameter.requires_grad}
    assert trains == set(map(llava_name, trained)), "other weights train than in ours"
    weights = {llava_name(name): weight for name, weight in {**trained, **(frozen or {})}.items()}
    assert not llava.load_state_dict(weights, strict=False).unexpected_keys
    return wrapped.train()


def llava_name(name: str) -> str:
    (prefix,) = [prefix for prefix in LLAVA_NAMES if name.startswith(prefix)]
    return LLAVA_NAMES[prefix] + name.removeprefix(prefix)


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW with our learning rates; fused, as Trainer's own is."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {"lora_": train.lora_lr, "multi_modal_projector": train.projector_lr}
    groups = [
        {"lr": rate, "params": [trained[name] for name in trained if part in name]} for part, rate in rates.items()
    ]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def padded_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return what LLaVA's forward takes of a padded batch."""
    inputs = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "labels", "pixel_values")}
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def sort_by_length(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Return the numbers of samples such that batches have similar lengths, the least padding possible; the batches are in
    a random order."""
    by_length = sorted(range(len(lengths)), key=lambda number: lengths[number])
    batches = [by_length[first : first + batch_size] for first in range(0, len(lengths), batch_size)]
    random.Random(SEED).shuffle(batches)
    return [number for batch in batches for number in batch]


def train_peer(peer: Peer, after_step: AfterStep, use_trl: bool = False, **arguments) -> None:
    """Train with transformers' Trainer, or with TRL's SFTTrainer at its defaults, until `after_step` is true.

    arguments: more of TrainingArguments or SFTConfig.
    """
    trainer_class: Any = Trainer
    arguments_class: Any = TrainingArguments
    rows: Any = [{"number": number} for number in range(peer.samples)]
    if use_trl:
        require("trl")
        require("datasets")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        trainer_class, arguments_class, rows = SFTTrainer, SFTConfig, Dataset.from_list(rows)
        arguments |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}  # samples are token ids
    losses: list[Tensor] = []

    def training_step(*given, **named) -> Tensor:
        losses.append(step(*given, **named))
        return losses[-1]

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **named) -> None:
            if after_step(losses.pop()):
                control.should_training_stop = True

    trainer = trainer_class(
        model=peer.model,
        args=arguments_class(
            per_device_train_batch_size=peer.batch_size,
            max_grad_norm=MAX_GRAD_NORM,
            use_cpu=next(peer.model.parameters()).device.type == "cpu",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
            **arguments,
        ),
        data_collator=lambda rows: peer.read([row["number"] for row in rows]),
        train_dataset=rows,
        optimizers=(peer.optimizer, None),
        callbacks=[Stops()],
        processing_class=peer.tokenizer,
    )
    step, trainer.training_step = trainer.training_step, training_step
    trainer.train()


def llava(task: Task, by_length: bool = False, attention: str = "sdpa", liger: bool = False, **options) -> Train:
    """Make the peers' way to train on samples in memory. by_length: see `sort_by_length`. options: see `train_peer`."""
    if attention.startswith("flash_attention"):
        require("flash_attn")
    if liger:
        require("liger_kernel")
    if options.get("use_trl"):
        require("trl")
    twin = task.model()
    trained = {name: parameter.detach() for name, parameter in twin.named_parameters() if parameter.requires_grad}
    frozen = {name: weight for name, weight in twin.state_dict().items() if name not in trained}
    with torch.device(task.device):
        plain: Any = LlavaForConditionalGeneration._from_config(
            task.sizes.llava_config(), dtype=task.dtype, attn_implementation=attention
        )
    model = add_lora(plain, task.sizes.lora_rank, trained, frozen)
    del twin, trained, frozen
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llava

        apply_liger_kernel_to_llava(model=plain)
    samples: list[Sample] = task.samples
    if by_length:
        samples = [samples[i] for i in sort_by_length([len(s.input_ids) for s in samples], task.sizes.batch_size)]
    batches = [padded_inputs(batch) for batch in task.batches(samples)]
    peer = Peer(
        model=model,
        optimizer=make_optimizer(model, TRAIN),
        read=lambda numbers: dict(batches[numbers[0] // task.sizes.batch_size]),
        samples=len(samples),
        batch_size=task.sizes.batch_size,
        # asked for nothing but its padding
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": PAD_TOKEN_ID}, "<pad>")), pad_token="<pad>"
        ),
    )
    options |= {"bf16": task.precision == "bf16", "lr_scheduler_type": "constant", "num_train_epochs": 1000}
    return functools.partial(train_peer, peer, output_dir=str(task.folder), **options)
