"""The cross entropy of supervised tokens, which never holds all of their logits; and the load-balancing loss of experts.
Knows no model.

With a vocabulary of 151,936 the logits of a thousand tokens take 0.6 GB in float32, and their gradient as much again. Here
they are computed a chunk of tokens at a time, and the chunk's gradient is taken at once, so only one chunk exists at any
time. The sums are those of one cross entropy up to rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

CHUNK_BYTES = 96 * 2**20  # of float32 logits at a time


def summed_cross_entropy(hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
    """Return the summed cross entropy, a float32 scalar.

    hidden: [n, D] at the supervised positions. targets: [n] token ids. A head that is more than a matrix (with a bias, LoRA
    or quantised weights) computes its logits itself, all at once.
    """
    if type(lm_head) is not nn.Linear or lm_head.bias is not None:
        return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    weight = (
        lm_head.weight if torch.is_grad_enabled() else lm_head.weight.detach()
    )  # no gradient of the vocabulary's size
    return _ChunkedCrossEntropy.apply(hidden.to(dtype), weight, targets)


@torch.no_grad()
def count_right(hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
    """Return at how many of the n positions the target is the most likely token, an int64 scalar. Arguments as above."""
    right = torch.zeros((), dtype=torch.int64, device=hidden.device)
    weight: Any = lm_head.weight
    size = chunk_rows(weight.shape[0])
    for start in range(0, len(hidden), size):
        right += (lm_head(hidden[start : start + size]).argmax(dim=-1) == targets[start : start + size]).sum()
    return right


def balance_loss(router_logits: tuple[Tensor, ...], is_read: Tensor | None, config: PreTrainedConfig) -> Tensor:
    """Return the load-balancing loss of a mixture of experts over all layers together, a float32 scalar.

    It is `config.num_experts_per_tok` if all experts get equally many tokens, and up to `config.num_experts` if the same
    ones get all. Gradients reach the routers through the probabilities; the token counts have none. (Switch Transformer,
    arXiv:2101.03961, equations 4 to 6; as computed by transformers.)

    router_logits: of each layer, [B*L, experts]. is_read: [B, L], true where a token is not padding; None: no padding.
    """
    with torch.autocast(router_logits[0].device.type, enabled=False):
        logits: Any = tuple(layer.float() for layer in router_logits)
        return cast(Tensor, load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok, is_read))


def chunk_rows(vocabulary: int) -> int:
    """Return for how many tokens logits are computed at a time: a multiple of 64."""
    return max(1, CHUNK_BYTES // (4 * 64 * vocabulary)) * 64


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        matrix = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        # Gradients are float32: the incoming factor may be a loss scale, which would overflow half precision or lose bits.
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden, dtype=torch.float32) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        size = chunk_rows(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                chunk, ids = hidden[start : start + size], targets[start : start + size, None]
                logits = (chunk @ matrix.T).float()
                log_sum = logits.logsumexp(dim=1, keepdim=True)
                loss += (log_sum - logits.gather(1, ids)).sum()
                if hidden_grad is None and weight_grad is None:
                    continue
                grad = logits.sub_(log_sum).exp_()  # the softmax
                grad.scatter_add_(1, ids, torch.full_like(log_sum, -1.0))
                unit = _unit_of_rows(grad, ids) if hidden.dtype == torch.float16 else None
                grad = (grad if unit is None else grad.div_(unit)).to(hidden.dtype)
                if hidden_grad is not None:
                    product = grad @ matrix
                    hidden_grad[start : start + size] = product if unit is None else product.float().mul_(unit)
                if weight_grad is not None:
                    _add_weight_gradient(weight_grad, grad, chunk, unit=unit)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple:
        # in place, so that a head that trains has one gradient of its size; torch refuses a second backward
        grads = [
            None if grad is None else grad.mul_(factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None


# ---------------------------------------------------------------------------------------------------------------------
# float16's smallest number is 6e-8, and a token that is almost right has smaller probabilities than that for the rest of the
# vocabulary. Each row of the softmax's gradient is therefore divided by a unit of its own before it is rounded, and the
# products are multiplied by it, both in float32. The incoming factor is a loss scale, but it is known too late: in the
# backward, when the logits are gone.

FP16_LARGEST = 16.0  # of a row in its unit; a product may add up to 4,094 times as much


def _unit_of_rows(grad: Tensor, ids: Tensor) -> Tensor:
    """Return [n, 1], powers of two. The largest absolute value of a row is the target's, which is the sum of the others."""
    return _power_of_two(grad.gather(1, ids).neg_().clamp_(min=2.0**-24) / FP16_LARGEST)


def _power_of_two(value: Tensor) -> Tensor:
    """Return the smallest powers of two that are not below `value`, by which a division is exact."""
    return value.log2().ceil_().exp2_()


def _add_weight_gradient(total: Tensor, grad: Tensor, chunk: Tensor, unit: Tensor | None) -> None:
    """Add grad^T chunk to `total` [V, D], so many of its rows at a time that a product takes CHUNK_BYTES.

    grad [n, V]: each row divided by its `unit` [n, 1], if there is one. chunk: [n, D].
    """
    inverse = None
    if unit is not None:
        # the largest possible sum of the n rows becomes 2^15, half of float16's largest number
        inverse = _power_of_two(FP16_LARGEST * unit.sum() * chunk.abs().amax().float().clamp_(min=2.0**-24) / 2.0**15)
        chunk = (chunk.float() * (unit / inverse)).to(chunk.dtype)
    size = chunk_rows(total.shape[1])
    for start in range(0, len(total), size):
        product = grad[:, start : start + size].T @ chunk
        total[start : start + size] += product if inverse is None else product.float().mul_(inverse)
