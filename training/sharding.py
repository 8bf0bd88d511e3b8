"""One model divided among several processes (torch's FSDP2): each holds a part of every weight, gradient and optimizer
state, and gathers a layer's weights when it needs them.

Gathering is an exchange, so every process must run the same number of forward and backward passes (`idle_batch` is a
batch for a process that has no other). Whatever is not training runs inside `gathered_for_inference`. On one process
these functions leave the model as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from config import IGNORE_INDEX, InputError
from dataset.batch import Batch
from model.checkpoint import saved_parameters
from model.model import VisionLanguageModel
from model.trainable import WeightOrigins
from training.parallel import num_processes


def idle_batch() -> Batch:
    """Return a batch without targets: loss 0, zero gradients. For a process that has no micro-batch while others have
    one."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_INDEX),
        attention_mask=torch.ones_like(ids),
        lengths=None,
        pixel_values=None,
        patch_features=None,
        image_keys=[],
        is_cached=[],
        images_in_sample=[0],
        ids=["idle"],
        replaced=[],
        pad_token_id=0,
    )


def shard(model: VisionLanguageModel, device: torch.device, dtype: torch.dtype) -> None:
    """Divide all parameters among all processes and `device`, in place.

    Each decoder layer is gathered on its own. Encoder, projector, embeddings and head are gathered together, once a forward
    pass, so that a process whose rows have no image takes part in the exchange.

    What trains stays float32, and is gathered and computed in `dtype`. Gradients are summed (not averaged) in float32 after
    every micro-batch; accumulating locally would need a full copy of the gradients. Parameters become other objects: load
    weights before this call, and make the optimizer after it. Raises InputError for float16, whose loss scaler cannot handle
    shards.
    """
    if num_processes() == 1:
        return
    if dtype == torch.float16:
        raise InputError('a sharded model does not train in fp16; set "train.precision" to bf16 or fp32.')
    mesh = init_device_mesh(device.type, (num_processes(),))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    layers = list(model.causal_lm.model.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # its backward pass comes next
    # Fix what the backward pass prefetches. By default FSDP follows the forward passes since the last backward pass. Answers
    # generated in between differ in length from process to process, and two processes would wait for each other forever.
    sharded: list[Any] = [*layers, model]  # fully_shard made each an FSDPModule too
    for module, ahead in zip(sharded, [model, *layers], strict=True):
        module.set_modules_to_backward_prefetch([ahead])
    # A layer whose input needs no gradient reduces its own at another moment. Text alone above frozen embeddings would then
    # exchange in another order than the processes that have images.
    model.causal_lm.get_input_embeddings().register_forward_hook(_require_gradient)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to divide by 1
    with torch.no_grad():
        # the first forward pass tells FSDP which module is the outermost: it must be this one
        model(**idle_batch().model_inputs(device))
    sharded[-1].reshard()


@contextlib.contextmanager
def gathered_for_inference(model: nn.Module) -> Iterator[None]:
    """Let every process hold the whole model for computing, in its `dtype`, and call it any number of times: for validation
    and answering, where each process has its own questions. Not inside inference mode. A plain model is left as it is."""
    modules = _sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


@contextlib.contextmanager
def gathered_for_saving(
    model: VisionLanguageModel, origins: WeightOrigins, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Let the main process's model and optimizer hold whole CPU tensors instead of shards, so that the code that saves
    a plain model saves this one. On the other processes nothing changes. A plain model is left as it is.

    Only the parameters that a checkpoint saves are gathered (`saved_parameters`): all that trains or has trained, also the
    matrices below LoRA that an earlier run trained, which are no longer float32. They are gathered one at a time, and the
    main process needs memory for all of them. Every process must enter.
    """
    if not _sharded_modules(model):
        yield
        return
    shards: list[tuple[nn.Module, str, Any, nn.Parameter]] = []
    made: dict[Tensor, nn.Parameter] = {}  # a tied weight is gathered once and stays tied
    state = {} if optimizer is None else optimizer.state
    for sharded in _sharded_modules(model):
        sharded.reshard()
    saved = set(saved_parameters(model, origins))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter in saved:
                if parameter not in made:
                    made[parameter] = nn.Parameter(_full(parameter), requires_grad=parameter.requires_grad)
                    whole_state = {key: _full(value) for key, value in state.get(parameter, {}).items()}
                    if whole_state and dist.get_rank() == 0:
                        state[made[parameter]] = whole_state
                shards.append((module, name, parameter, made[parameter]))
    if shards and dist.get_rank() == 0:
        for module, name, _, full in shards:
            module._parameters[name] = full
    try:
        yield
    finally:
        for module, name, parameter, full in shards:
            module._parameters[name] = parameter
            state.pop(full, None)


def laid_out_as(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Return `tensor` on the device of `parameter`, sharded like it. tensor: whole, and equal on every process."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules that are FSDPModules too. Any: no annotation says that a module is of both classes."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _require_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


@torch.no_grad()
def _full(tensor: Tensor) -> Tensor:
    """Gather a shard's whole tensor on the CPU of the main process. The others send their parts and get an empty tensor."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else torch.empty(0)
