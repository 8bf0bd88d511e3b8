"""Several processes that each hold the whole model: sum their gradients, clip, check that their weights are equal.

Every process calls these functions in the same order; on one process they do the same without communication. No hook runs
inside the backward pass, so processes may have different numbers of micro-batches, and one of them may repeat a backward
pass. DDP's hooks would hide most of the exchange behind the last backward pass. Here it runs once a step, which for LoRA
and a projector (a few hundred MB at most) takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import InputError

BUCKET_BYTES = 64 * 2**20  # gradients exchanged at once: large for the network, small beside the model


def num_processes() -> int:
    """Return how many processes share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_gradients(parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Make every `.grad` the sum over all processes, in place and in float32, bit for bit equal on all of them.

    A missing gradient counts as zeros and becomes zeros, on one process too, so that the optimizer does the same whichever
    process had the images. Gradients of a sharded model are summed already. parameters: the same on every process, in the
    same order.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if num_processes() == 1:
        return
    waiting: list[tuple[list[Tensor], Tensor, dist.Work]] = []
    gradients = [p.grad for p in parameters if not isinstance(p, DTensor) and p.grad is not None]
    for bucket in _buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.reshape(-1).float() for gradient in bucket])
        waiting.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        if len(waiting) == 2:  # one is sent while the next is packed: two buckets are copied, not all gradients
            _unpack(*waiting.pop(0))
    for sent in waiting:
        _unpack(*sent)


def _buckets(tensors: list[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in runs of at most `bucket_bytes` as float32. A larger tensor is alone."""
    bucket: list[Tensor] = []
    size = 0
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
    """Return the 2-norm of all gradients together, and scale them down to `max_norm` if it is larger, in place.

    The norm is equal on every process, whether gradients are whole (after `sum_gradients`) or sharded.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


@torch.no_grad()
def check_equal_weights(model: nn.Module) -> None:
    """Raise InputError on every process if two processes hold different weights, frozen ones included.

    Each process loads its own files, and those of two machines may differ. Call it before `sharding.shard`.
    """
    if num_processes() == 1:
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
    """Return the sum of a tensor's bits as integers. It reads the weights once, and any single changed value changes it."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))
