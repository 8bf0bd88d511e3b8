"""The same training in each of the ways that `benchmarks.gpu` compares: this project's, with each of its parts left out,
and what people take instead. A way makes its model, of random weights, and trains it on samples that are in memory.

A way is a function (Task, switches) -> Train. All start from the same weights and see the same samples, in float32 with
equal losses.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks.random_model import FEATURE_LAYER, IMAGE_TOKEN_ID, PAD_TOKEN_ID, RATES, WORDS, Sizes, random_model
from config import IGNORE_INDEX
from dataset.batch import collate
from model.build import checkpoint_activations
from model.elementwise import compile_elementwise, use_liger
from model.fused_lora import fuse_lora
from model.model import Losses, VisionLanguageModel
from model.trainable import param_groups
from qwen.attention import PACKED_SDPA
from qwen.lora import LINEARS
from training.step import Stepper, count_targets

MAX_GRAD_NORM = 1.0
SEED = 0
PADDED = ("input_ids", "attention_mask", "labels", "pixel_values")  # what LLaVA takes


class NotInstalled(Exception):
    """A way that needs a package which is not there."""


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    sizes: Sizes
    dtype: torch.dtype  # of what is frozen, and what is computed in; what trains is float32
    device: torch.device
    lora_rank: int
    batch_size: int
    samples: list[dict]  # as the dataset gives them, a multiple of batch_size
    folder: Path  # for what is compiled
    say: Callable[[str], None] = print  # what a way has to tell about itself

    @property
    def precision(self) -> str:
        """The word for it that accelerate takes."""
        return {torch.float32: "no", torch.bfloat16: "bf16"}[self.dtype]

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def model(self, attention: str = PACKED_SDPA) -> VisionLanguageModel:
        return random_model(self.sizes, self.dtype, self.device, self.lora_rank, attention)

    def batches(self, samples: Sequence[dict], packed: bool = False) -> list[dict]:
        """As a loader gives them, in memory that a GPU can copy from."""
        cut = [samples[first : first + self.batch_size] for first in range(0, len(samples), self.batch_size)]
        batches = [collate(part, PAD_TOKEN_ID, packed) for part in cut]
        if self.device.type != "cuda":
            return batches
        return [
            {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
            for batch in batches
        ]


# after_step(loss per answer token) -> whether to stop; train(after_step) goes round the batches until then
AfterStep = Callable[[Tensor | float], bool]
Train = Callable[[AfterStep], None]


# ------------------------------------------------------------------------------------------------------------------- ours


def ours(
    task: Task,
    packing: bool = True,
    fused_lora: bool = True,
    compiled: bool = True,
    cached: bool = False,
    checkpointing: bool = False,
    chosen_logits: bool = True,
    attention: str = PACKED_SDPA,
    liger: bool = False,
) -> Train:
    """Steps of `step.Stepper`, the ones that train.py takes."""
    if attention.startswith("flash_attention"):
        require("flash_attn")
    model = task.model(attention)
    if fused_lora:
        fuse_lora(model.language_model)
    if liger and not use_liger(model.causal_lm):
        raise NotInstalled("liger_kernel")
    if compiled:
        compile_elementwise(model.language_model, task.device.type, task.folder, task.say)
    if checkpointing:
        checkpoint_activations(model)
    if not chosen_logits:
        model.__class__ = AllLogits
    batches = task.batches(task.samples, packing)
    if cached:
        batches = [with_features(model, task, batch) for batch in batches]
    accelerator = Accelerator(cpu=task.device.type == "cpu", mixed_precision=task.precision)
    optimizer = torch.optim.AdamW(param_groups(model, WORDS, RATES, weight_decay=0.0))
    stepper = Stepper(
        model,
        accelerator.prepare_optimizer(optimizer),
        accelerator,
        task.autocast,
        SEED,
        MAX_GRAD_NORM,
        PAD_TOKEN_ID,
        encoder=(lambda batch: batch.patch_features.to(task.device, non_blocking=True)) if cached else None,
    )
    rates = [group["lr"] for group in optimizer.param_groups]

    def train(after_step: AfterStep) -> None:
        for step, batch in enumerate(itertools.cycle(batches)):
            outcome, _ = stepper(step, [batch], rates, stop=False)
            if stepper.pieces > 1:
                raise torch.OutOfMemoryError("out of memory with a whole batch at once")
            if after_step(outcome.loss):
                return

    return train


class AllLogits(VisionLanguageModel):
    """The loss made from the logits of every place, as transformers makes it."""

    def forward(
        self,
        input_ids,
        labels,
        attention_mask=None,
        lengths=None,
        num_tokens=None,
        pixel_values=None,
        patch_features=None,
    ):
        if patch_features is None:
            patch_features = self.patch_features(pixel_values)
        hidden = self.causal_lm.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            lengths=lengths,
            image_features=self.project(patch_features),
            use_cache=False,
        ).last_hidden_state
        logits = self.causal_lm.lm_head(hidden).float()  # [B, L, V]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(logits.device, non_blocking=True)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return Losses(loss)


@torch.no_grad()
def with_features(model: VisionLanguageModel, task: Task, batch: dict) -> dict:
    """The batch as it comes from the second epoch on, with features in the place of pixels."""
    with task.autocast():
        features = model.patch_features(batch.pixel_values.to(task.device)).cpu()
    if task.device.type == "cuda":
        features = features.pin_memory()
    return {**batch, "pixel_values": None, "patch_features": features}


# ----------------------------------------------------------------------------------------------------------------- others


def llava(task: Task, attention: str = "sdpa") -> nn.Module:
    """transformers' LLaVA with PEFT's LoRA and a projector that trains; its weights are those of `Task.model`."""
    twin = task.model()
    config = LlavaConfig(
        vision_config=task.sizes.vision_config(),
        text_config=task.sizes.text_config(),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=task.sizes.image_tokens,
        vision_feature_layer=FEATURE_LAYER,
        tie_word_embeddings=task.sizes.tied,
    )
    with torch.device(task.device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=task.dtype, attn_implementation=attention)
    linears = rf".*language_model\..*\.({'|'.join(LINEARS)})"
    settings = LoraConfig(r=task.lora_rank, lora_alpha=2 * task.lora_rank, target_modules=linears)
    wrapped = get_peft_model(model, settings)
    model.model.multi_modal_projector.requires_grad_(True).float()
    model.model.vision_tower.load_state_dict(twin.vision_tower.model.state_dict())
    model.model.multi_modal_projector.load_state_dict(twin.projector.state_dict())
    model.model.language_model.load_state_dict(twin.causal_lm.model.state_dict())
    model.lm_head.load_state_dict(twin.causal_lm.lm_head.state_dict())
    return wrapped.train()


def llava_optimizer(model: nn.Module, task: Task) -> torch.optim.AdamW:
    """Fused on a GPU, as Trainer's is."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    projector = [parameter for name, parameter in trained.items() if "projector" in name]
    lora = [parameter for name, parameter in trained.items() if "lora_" in name]
    assert len(projector) + len(lora) == len(trained)
    rates = {"projector_lr": projector, "lora_lr": lora}
    groups = [{"params": chosen, "lr": RATES[name]} for name, chosen in rates.items()]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=task.device.type == "cuda")


def trainer_like(
    task: Task, by_length: bool = False, checkpointing: bool = False, liger: bool = False, attention: str = "sdpa"
) -> Train:
    """What transformers' Trainer does in a step, and nothing else: padded batches, the model's own loss over all answer
    tokens, clipping, AdamW (fused on a GPU). by_length: batches of samples that are equally long, as far as can be."""
    if attention.startswith("flash_attention"):
        require("flash_attn")
    model = llava(task, attention)
    if liger:
        require("liger_kernel.transformers").apply_liger_kernel_to_llava(model=model.get_base_model())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    samples = sorted(task.samples, key=lambda sample: len(sample.input_ids)) if by_length else task.samples
    batches = task.batches(samples)
    optimizer = llava_optimizer(model, task)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def train(after_step: AfterStep) -> None:
        for batch in itertools.cycle(batches):
            with task.autocast():
                inputs = {key: batch[key].to(task.device, non_blocking=True) for key in PADDED}
                loss = model(**inputs, use_cache=False, num_items_in_batch=batch.num_targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if after_step(loss.detach()):
                return

    return train


def trl(task: Task, checkpointing: bool = True) -> Train:
    """TRL's SFTTrainer (which makes checkpoints of activations by default) on the same padded batches."""
    for package in ("trl", "datasets"):
        require(package)
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = llava(task)
    batches = [{key: batch[key] for key in PADDED} for batch in task.batches(task.samples)]
    losses, after_steps = [], []
    tokenizer = PreTrainedTokenizerFast(  # the samples are tokens already: it is asked nothing but its padding
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": PAD_TOKEN_ID}, "<pad>")), pad_token="<pad>"
    )

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = after_steps[-1](losses.pop())

    class InOrder(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def train(after_step: AfterStep) -> None:
        after_steps.append(after_step)
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=task.batch_size,
                num_train_epochs=1000,
                bf16=task.dtype == torch.bfloat16,
                gradient_checkpointing=checkpointing,
                max_grad_norm=MAX_GRAD_NORM,
                lr_scheduler_type="constant",
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=task.device.type == "cpu",
            )
            trainer = InOrder(
                model=model,
                args=config,
                data_collator=lambda rows: dict(batches[rows[0]["place"] // task.batch_size]),
                train_dataset=Dataset.from_dict({"place": list(range(len(task.samples)))}),
                processing_class=tokenizer,
                callbacks=[Stops()],
                optimizers=(llava_optimizer(model, task), None),
            )
            trainer.train()

    return train


def require(name: str):
    """The module; NotInstalled where its package is not there."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(package)
    return importlib.import_module(name)
