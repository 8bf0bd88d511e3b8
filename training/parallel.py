"""One model on several processes: gradients added up, or the weights themselves shared out. Knows no config, no data and
no loop; every process calls these functions in the same order, and on one process they do the same without talking.

Replicated (the default): each process holds the whole model, and after a step's micro-batches `sum_gradients` adds up what
they computed. No hooks run inside backward, so processes need not have the same micro-batches, nor the same number of
them, and one of them may repeat a backward. What DDP's hooks would gain is that most of the exchange hides behind the last
backward; here it waits for it, once a step, which for LoRA and a projector (a few hundred MB at most) is milliseconds.

Sharded (`shard`, torch's FSDP2): each process holds a part of every weight, gradient and optimizer state, and gathers a
layer's weights when it needs them. That gathering is an exchange: every process must run the same number of forwards and
backwards (`idle_batch` is for one that has nothing to do), and what is not training happens inside `gathered`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from config import IGNORE_INDEX, InputError
from model.model import VisionLanguageModel

BUCKET_BYTES = 64 * 2**20  # of gradients exchanged at once: large enough for the network, small beside the model


# ---------------------------------------------------------------------------------------------------------------------
# Replicated


def sum_gradients(parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Make every `.grad` the sum over all processes, in place and in float32, equal on all of them to the last bit.

    A missing gradient counts as zeros, and is zeros afterwards: also on one process, so that the optimizer does the same
    whoever had the pictures. Gradients of a sharded model are summed already. parameters: the same on every process, in
    the same order.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if _processes() == 1:
        return
    waiting: list[tuple[list[Tensor], Tensor, dist.Work]] = []
    gradients = [parameter.grad for parameter in parameters if not isinstance(parameter, DTensor)]
    for bucket in _buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.reshape(-1).float() for gradient in bucket])
        waiting.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(waiting) == 2:  # one travels while the next is packed: two copies of a bucket, not of all gradients
            _unpack(*waiting.pop(0))
    for sent in waiting:
        _unpack(*sent)


def _buckets(tensors: list[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors in their order, cut into runs of at most `bucket_bytes` as float32 (a larger tensor is alone)."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + 4 * tensor.numel() > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += 4 * tensor.numel()
    if bucket:
        yield bucket


def _unpack(bucket: list[Tensor], flat: Tensor, work: dist.Work) -> None:
    work.wait()
    for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(total.view_as(gradient))


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The 2-norm of all gradients together; where it is above `max_norm`, they are scaled down to it, in place. The same
    number on every process, whether gradients are whole (after `sum_gradients`) or sharded."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


@torch.no_grad()
def check_equal_weights(model: nn.Module) -> None:
    """InputError, on every process, where processes hold other weights, frozen ones included: each loads its own files,
    and on two machines these can differ. To be called before `shard`."""
    if _processes() == 1:
        return
    mine = {
        name: (str(parameter.dtype), tuple(parameter.shape), _checksum(parameter))
        for name, parameter in model.named_parameters()
    }
    held: list = [None] * dist.get_world_size()
    dist.all_gather_object(held, mine)
    for rank, other in enumerate(held):
        different = [name for name in {**held[0], **other} if held[0].get(name) != other.get(name)]
        if different:
            raise InputError(
                f"process {rank} holds other weights than process 0: {len(different)} tensors, such as {different[0]}. "
                "Every machine must read the same encoder, language model and checkpoint, with the same library versions; "
                "copy the folders again."
            )


def _checksum(tensor: Tensor) -> int:
    """The sum of the bits as integers: reads the weights once where they are, and no single changed value escapes it."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))


def idle_batch(device: torch.device) -> dict[str, Tensor | None]:
    """A batch that supervises nothing: loss 0, zero gradients. For a process of a sharded model that has no micro-batch
    while others have one."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.full_like(ids, IGNORE_INDEX),
        "pixel_values": None,
    }


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# ---------------------------------------------------------------------------------------------------------------------
# Sharded


def shard(model: VisionLanguageModel, device: torch.device, dtype: torch.dtype) -> None:
    """Share out all parameters over all processes and `device`, in place: each decoder layer is gathered by itself, and
    encoder, projector, embeddings and head together once a forward, so that a process whose rows have no image takes part.

    What trains stays float32, is gathered and computed in `dtype`, and its gradients are added up in float32, after every
    micro-batch: to wait for the last one would keep a whole model of gradients. The sum, not the mean. Parameters are
    other objects afterwards: make the optimizer after this, and load weights before. On one process there is nothing to
    share out. InputError for float16, whose loss scaler does not know of shards.
    """
    if _processes() == 1:
        return
    if dtype == torch.float16:
        raise InputError('a sharded model does not train in fp16; set "train.precision" to bf16 or fp32.')
    mesh = init_device_mesh(device.type, (_processes(),))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    layers = list(model.causal_lm.model.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # its backward is next, it stays
    # What backward gathers ahead is said here. By default FSDP goes by the forwards since the last backward, and with
    # answers in between, which differ in length from process to process, two of them would wait for each other forever.
    for module, ahead in zip([*layers, model], [model, *layers], strict=True):
        module.set_modules_to_backward_prefetch([ahead])
    # A layer whose input needs no gradient gives up its own at another moment: text below frozen embeddings, where other
    # processes have pictures, would put their exchanges out of order.
    model.causal_lm.get_input_embeddings().register_forward_hook(_require_gradient)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # the other ways of dividing by 1 are NCCL's alone
    with torch.no_grad():
        model(**idle_batch(device))  # the first forward tells FSDP which module is the outermost: it must be this one
    model.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole model for computing (in its `dtype`), and may call it as often as it likes:
    for validation and answering, where each has its own questions. Outside of inference mode; a plain model is left as
    it is."""
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
def whole(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Inside, the main process's model and optimizer hold whole CPU tensors in place of the shards, so that saving them
    is the code that saves a plain model; on the other processes they stay as they are. A plain model is left as it is.

    Whole become the parameters in float32: all that trains or ever did (`VisionLanguageModel.trained_before`). They are
    gathered one at a time; the main process needs memory for all of them. Every process must enter.
    """
    shards: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight is gathered once, and stays tied
    state = {} if optimizer is None else optimizer.state
    for module in _sharded_modules(model):
        module.reshard()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter.dtype == torch.float32:
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
    """`tensor` on the device of `parameter`, and sharded as it is. tensor: whole, and the same on every process."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _require_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


@torch.no_grad()
def _full(tensor: Tensor) -> Tensor:
    """The whole of a shard, on the CPU of the main process; on the others nothing, but they send theirs."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu() if dist.get_rank() == 0 else torch.empty(0)
