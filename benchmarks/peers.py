"""The alternatives to this project: transformers' LLaVA with PEFT's LoRA, trained by transformers' Trainer or by TRL.

The peers get every advantage that costs nothing: token ids made beforehand, no logging, no saving. They start with the
weights of our model and see the same samples.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from benchmarks.annotations import SEED
from benchmarks.models import FEATURE_LAYER, PAD_TOKEN_ID, TRAIN, Task, require
from benchmarks.ours import MAX_GRAD_NORM, AfterStep, Train
from dataset.batch import Batch
from model.model import VisionLanguageModel
from qwen.lora import LINEARS

# transformers imports lazily: load these now, because memory is measured above that of the imports
LLAVA = transformers.LlavaForConditionalGeneration
TRAINER: tuple[Any, Any] = transformers.Trainer, transformers.TrainingArguments
EQUAL = {"max_grad_norm": MAX_GRAD_NORM, "seed": SEED, "train_sampling_strategy": "sequential"}  # to ours
QUIET = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
Read = Callable[[Sequence[int]], dict[str, Tensor]]


def llava_twin(ours: VisionLanguageModel, attention: str = "sdpa") -> nn.Module:
    """Make LLaVA with LoRA on its language model, of the sizes and weights of our model; the same weights train."""
    tower, lora = ours.vision_tower.model, ours.language_model.peft_config["default"]
    vision, text = copy.deepcopy(tower.config), copy.deepcopy(ours.causal_lm.config)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=text.image_token_id,
        image_seq_length=ours.vision_tower.num_image_tokens, vision_feature_layer=FEATURE_LAYER,
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    with torch.device(tower.device):
        plain: Any = LLAVA._from_config(config, dtype=tower.dtype, attn_implementation=attention)
    linears = rf".*language_model.*\.({'|'.join(LINEARS)})"
    settings = peft.LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=linears)
    model = peft.get_peft_model(plain, settings)
    plain.model.multi_modal_projector.requires_grad_(True).float()
    copies = (plain.model.vision_tower, plain.model.multi_modal_projector, plain.model.language_model, plain.lm_head)
    parts = (tower, ours.projector, ours.causal_lm.model, ours.causal_lm.lm_head)
    for theirs, part in zip(copies, parts, strict=True):
        weights = part.state_dict()
        if part is ours.projector:  # uncalibrated: its buffers change nothing
            weights = {name: value for name, value in weights.items() if name not in dict(part.named_buffers())}
        theirs.load_state_dict(weights)
        assert [p.requires_grad for p in theirs.parameters()] == [p.requires_grad for p in part.parameters()]
    return model.train()


def padded_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return what LLaVA's forward takes of a padded batch."""
    return {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "labels", "pixel_values")}


def sort_by_length(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Return an order of samples whose batches hold similar lengths; the batches are in a random order."""
    by_length = sorted(range(len(lengths)), key=lambda number: lengths[number])
    batches = [by_length[first : first + batch_size] for first in range(0, len(lengths), batch_size)]
    random.Random(SEED).shuffle(batches)
    return [number for batch in batches for number in batch]


def train_peer(
    model: nn.Module, read: Read, samples: int, after_step: AfterStep, use_trl: bool = False, **arguments: Any
) -> None:
    """Train with transformers' Trainer, or with TRL's SFTTrainer at its defaults, until `after_step` returns true.

    read: numbers of samples, which are taken in order -> LLaVA's inputs. arguments: of TrainingArguments or SFTConfig.
    """
    rows: Any = [{"number": number} for number in range(samples)]
    arguments["remove_unused_columns"] = False
    classes = TRAINER
    if use_trl:
        rows, trl = require("datasets").Dataset.from_list(rows), require("trl")
        classes = trl.SFTTrainer, trl.SFTConfig
        arguments |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}  # samples are token ids
    losses: list[Tensor] = []

    def training_step(*given: Any, **named: Any) -> Tensor:
        losses.append(step(*given, **named))
        return losses[-1]

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if after_step(losses.pop()):
                control.should_training_stop = True

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora, projector = ([trained[name] for name in trained if part in name] for part in ("lora_", "projector"))
    assert len(lora) + len(projector) == len(trained)
    groups = [{"params": lora, "lr": TRAIN.lora_lr}, {"params": projector, "lr": TRAIN.projector_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)  # fused, as Trainer's own
    tokenizer = Tokenizer(models.WordLevel({"<pad>": PAD_TOKEN_ID}, "<pad>"))  # asked for nothing but its padding
    trainer = classes[0](
        model=model,
        args=classes[1](use_cpu=next(model.parameters()).device.type == "cpu", **EQUAL, **QUIET, **arguments),
        data_collator=lambda rows: read([row["number"] for row in rows]),
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[Stops()],
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"),
    )
    step, trainer.training_step = trainer.training_step, training_step
    trainer.train()


def llava(task: Task, by_length: bool = False, liger: bool = False, **options: Any) -> Train:
    """Make the peers' way to train on samples in memory. by_length: see `sort_by_length`. options: see `train_peer`."""
    if options.get("use_trl"):  # before a model is made
        require("trl")
    model: Any = llava_twin(task.model(), "flash_attention_2" if task.flash else "sdpa")
    if liger:
        require("liger_kernel.transformers").apply_liger_kernel_to_llava(model=model.get_base_model())
    samples, size = task.samples, task.sizes.batch_size
    if by_length:
        samples = [samples[i] for i in sort_by_length([len(sample.input_ids) for sample in samples], size)]
    batches = [padded_inputs(batch) for batch in task.batches(samples)]

    options |= {"output_dir": str(task.folder), "per_device_train_batch_size": size, "bf16": task.precision == "bf16"}
    options |= {"lr_scheduler_type": "constant", "num_train_epochs": 1000}

    def read(numbers: Sequence[int]) -> dict[str, Tensor]:
        return dict(batches[numbers[0] // size])

    return lambda after_step: train_peer(model, read, len(samples), after_step, **options)
