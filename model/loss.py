"""The vocabulary's head and the cross entropy of supervised tokens, in one function that never holds all of their logits.

For a vocabulary of 151,936 the logits of a thousand tokens take 0.6 GB in float32, and their gradient as much again.
Here they are made a chunk of tokens at a time, and each chunk's gradient is taken on the spot, so one chunk is all that
there ever is. The order of the sums is that of one cross entropy; only their rounding differs. Knows no model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
