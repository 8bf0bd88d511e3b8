"""The vocabulary's head and the cross entropy of supervised tokens, in one function that never holds all of their logits;
and what keeps experts evenly used.

For a vocabulary of 151,936 the logits of a thousand tokens take 0.6 GB in float32, and their gradient as much again.
Here they are made a chunk of tokens at a time, and each chunk's gradient is taken on the spot, so one chunk is all that
there ever is. The order of the sums is that of one cross entropy; only their rounding differs. Knows no model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

CHUNK_BYTES = 96 * 2**20  # of float32 logits at once


def summed_cross_entropy(hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
    """Summed cross entropy (float32 scalar). hidden [n, D] of the supervised places, targets [n] their token ids.

    A head that is more than a plain matrix (it has a bias, LoRA, or quantised weights) computes its logits itself.
    """
    if type(lm_head) is not nn.Linear or lm_head.bias is not None:
        return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _ChunkedCrossEntropy.apply(hidden.to(dtype), lm_head.weight, targets)


@torch.no_grad()
def count_right(hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
    """How many of the n places hold their target as the likeliest token (int64 scalar). Arguments as above."""
    right = torch.zeros((), dtype=torch.int64, device=hidden.device)
    size = chunk_rows(lm_head.weight.shape[0])
    for start in range(0, len(hidden), size):
        right += (lm_head(hidden[start : start + size]).argmax(dim=-1) == targets[start : start + size]).sum()
    return right


def balance_loss(router_logits: tuple[Tensor, ...], is_read: Tensor | None, config: PreTrainedConfig) -> Tensor:
    """The load-balancing loss of a mixture of experts (Switch Transformer, arXiv:2101.03961, equations 4 to 6; as
    transformers computes it, over all layers together): a float32 scalar, `config.num_experts_per_tok` where every expert
    gets as many tokens as the others, and up to `config.num_experts` where the same ones get all.

    router_logits: of each layer, [B*L, experts]. is_read: [B, L], true where a token is not padding; None for everywhere.
    Its gradient reaches the routers through the probabilities; how many tokens an expert got has none.
    """
    with torch.autocast(router_logits[0].device.type, enabled=False):
        logits = tuple(layer.float() for layer in router_logits)
        return load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok, is_read)


def chunk_rows(vocabulary: int) -> int:
    """How many tokens' logits are made at once: a multiple of 64."""
    return max(1, CHUNK_BYTES // (4 * 64 * vocabulary)) * 64


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(hidden.dtype)
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        # float32: the caller's factor may be a loss scale, with which half precision would overflow or lose bits
        hidden_grad = torch.empty_like(hidden, dtype=torch.float32) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        size = chunk_rows(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), size):
                chunk, ids = hidden[start : start + size], targets[start : start + size, None]
                logits = (chunk @ matrix.T).float()
                log_sum = logits.logsumexp(dim=1, keepdim=True)
                loss += (log_sum - logits.gather(1, ids)).sum()
                if not (wants_hidden or wants_weight):
                    continue
                grad = logits.sub_(log_sum).exp_()  # the softmax
                grad.scatter_add_(1, ids, torch.full_like(log_sum, -1.0))
                grad = grad.to(hidden.dtype)
                if wants_hidden:
                    hidden_grad[start : start + size] = grad @ matrix
                if wants_weight:
                    weight_grad += grad.T @ chunk
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, factor: Tensor) -> tuple:
        grads = [
            None if grad is None else (grad * factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None
