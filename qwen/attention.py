"""Attention over several documents that stand one after the other in a row, without any padding between them.

`packed_sdpa` is transformers' `sdpa` where no `lengths` are given, so one name serves training and answering. With
`lengths`, each token sees the tokens of its own document up to itself: each document is a causal attention of its own,
and what the row costs is the sum of what they cost, not the square of its length. With `masks`, the tokens of one image in a
document see each other too. Registered by importing this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "packed_sdpa"


def packed_sdpa(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lengths: Sequence[int] | None = None,
    masks: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers. query [B,H,L,d], key and value [B,K,L,d] -> ([B,L,H,d], None).

    lengths: of the documents in the one row (B is 1), together L; `attention_mask` is not looked at then. masks: of each
    document what its tokens see, as `document_masks` makes them; None for causal attention.
    """
    if lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    is_plain = masks is None and dropout == 0.0 and sliding_window is None
    if on_cpu and is_plain:  # 1.7 times as fast as torch's kernel, forward and backward
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _CausalDocuments.apply(query[0], key[0], value[0], tuple(lengths), scale)[None], None
    outputs = []
    # split, not slices: its backward writes each gradient once, where every slice's would fill a whole row
    documents = zip(*(tensor.split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
    groups = query.shape[1] // key.shape[1]
    for number, (queries, keys, values) in enumerate(documents):
        mask = _band(queries, sliding_window) if masks is None else masks[number]
        if mask is not None and groups > 1:  # a GPU's kernels take a mask, or heads that share keys, but not both
            keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
        attended = F.scaled_dot_product_attention(
            queries, keys, values, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=mask is None
        )
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


BLOCK = 128  # queries at once: what lies above the diagonal is left out in steps of it


class _CausalDocuments(torch.autograd.Function):
    """Causal attention of documents in a row by plain products, a block of queries at a time. T tokens; H heads, of which
    groups of g share one of the K heads of keys and values. Nothing of the size of a document squared is kept: the
    backward computes the probabilities again. Products are of the input's type, scores and softmax in float32, and what
    several blocks add to a key's gradient is added in float32, which torch's kernel for CPUs does not do."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        """query [H,T,d], key and value [K,T,d] -> [T,H,d]."""
        heads, tokens, width = query.shape
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale = lengths, scale
        out, mask = query.new_empty(tokens, heads, width), _later(query)
        for rows, columns in _blocks(lengths):
            _, probabilities = _probabilities(query[:, rows], key[:, columns], scale, mask)
            _ungrouped(torch.bmm(probabilities.to(value.dtype), value[:, columns]), out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        query, key, value = ctx.saved_tensors
        dtype = query.dtype
        gradient = gradient.transpose(0, 1)  # [H, T, d]
        dquery = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        # in float32: every block of queries adds to the keys and values before it
        dkey, dvalue = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        mask = _later(query)
        for rows, columns in _blocks(ctx.lengths):
            scaled, wide = _probabilities(query[:, rows], key[:, columns], ctx.scale, mask)
            dout = _grouped(gradient[:, rows], len(key))
            dwide = torch.bmm(dout, value[:, columns].transpose(1, 2)).float()
            dvalue[:, columns] += torch.bmm(wide.to(dtype).transpose(1, 2), dout)
            dscores = torch._softmax_backward_data(dwide, wide, -1, torch.float32).to(dtype)
            _ungrouped(torch.bmm(dscores, key[:, columns]), dquery[rows])
            dkey[:, columns] += torch.bmm(dscores.transpose(1, 2), scaled)
        dquery = dquery.mul_(ctx.scale).transpose(0, 1)
        return dquery, dkey.to(dtype), dvalue.to(dtype), None, None


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that the last of them sees) of each block of each document."""
    start = 0
    for length in lengths:
        for first in range(start, start + length, BLOCK):
            last = min(first + BLOCK, start + length)
            yield slice(first, last), slice(start, last)
        start += length


def _later(like: Tensor) -> Tensor:
    """[BLOCK,BLOCK], to be added to scores: minus infinity where a key comes after the query."""
    return torch.full((BLOCK, BLOCK), -torch.inf, device=like.device).triu_(1)


def _probabilities(query: Tensor, key: Tensor, scale: float, later: Tensor) -> tuple[Tensor, Tensor]:
    """query [H,n,d] of the last n of the c tokens of key [K,c,d] -> the scaled query [K,g*n,d], and the probabilities
    [K,g*n,c] in float32. later: as `_later` makes it."""
    count, before = query.shape[1], key.shape[1] - query.shape[1]
    scaled = _grouped(query, len(key)) * scale
    scores = torch.bmm(scaled.float(), key.float().transpose(1, 2))
    scores.view(len(key), -1, count, key.shape[1])[..., before:] += later[:count, :count]
    return scaled, scores.softmax(dim=-1)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """[H,n,d] -> [K,g*n,d]: the heads that share keys are rows of one product."""
    return tensor.reshape(groups, -1, tensor.shape[2])


def _ungrouped(grouped: Tensor, out: Tensor) -> None:
    """[K,g*n,d] into [n,H,d]."""
    out.copy_(grouped.view(out.shape[1], out.shape[0], out.shape[2]).transpose(0, 1))


def document_masks(images: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """For each document of a row what its tokens see, bool [length, length]: themselves, what stands before them, and all
    of their own image. images [L]: the number of the image that a token belongs to, -1 for text."""
    causal = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=images.device).tril_()
    masks = []
    for numbers in images.split(list(lengths)):
        is_same = (numbers[:, None] == numbers) & (numbers[:, None] >= 0)
        masks.append(is_same | causal[: len(numbers), : len(numbers)])
    return masks


def _band(queries: Tensor, sliding_window: int | None) -> Tensor | None:
    """The mask of a sliding window that is shorter than the document; else None: plain causal attention."""
    length = queries.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=queries.device)
    distance = distance[:, None] - distance
    return (distance >= 0) & (distance < sliding_window)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
