"""`packed_sdpa`, an attention function for transformers that takes several documents in one row without padding.

Without `lengths` it is transformers' `sdpa`, so one name serves training and answering. With `lengths`, each token attends
to the tokens of its own document up to itself. Each document is a causal attention by itself: a row costs the sum of its
documents' costs, not the square of its length. With `masks`, the tokens of one image attend to each other too.

Importing this module registers the function under the name PACKED_SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cuda
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwen.cpu_attention import causal_documents

PACKED_SDPA = "packed_sdpa"
NO_GROUPS = nn.Module()  # stands for an attention layer whose keys are repeated already; the library would repeat them


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lengths: Sequence[int] | None = None,
    masks: Sequence[Tensor] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend: query [B,H,L,d], key and value [B,K,L,d] -> ([B,L,H,d], None). The signature is transformers'.

    lengths: tokens of each document in the one row (B is 1), in total L; `attention_mask` is ignored then.
    masks: for each document the mask from `document_masks`; None for causal attention.
    """
    groups = query.shape[1] // key.shape[1]
    shares_keys = can_share_keys(query, key, value, dropout=dropout)
    if lengths is None:
        if attention_mask is None and groups > 1 and query.shape[2] > 1 and not shares_keys:
            key, value = (_repeat(tensor, groups) for tensor in (key, value))
            module = NO_GROUPS
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    is_plain = masks is None and dropout == 0.0 and sliding_window is None
    if on_cpu and is_plain:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return causal_documents(query[0], key[0], value[0], lengths=lengths, scale=scale)[None], None
    outputs = []
    # split, not slices: its backward writes each gradient once; each slice's backward would fill a whole row
    documents = zip(*(tensor.split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
    for number, (queries, keys, values) in enumerate(documents):
        mask = _band(queries, sliding_window) if masks is None else masks[number]
        shared = mask is None and shares_keys  # GPU kernels take a mask or heads that share keys, not both
        if not shared and groups > 1:
            keys, values = _repeat(keys, groups), _repeat(values, groups)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=shared,
        )
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def can_share_keys(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Return whether torch has a fast kernel for causal attention in which several heads of queries share one of keys.

    On a GPU only the flash and cuDNN kernels take such heads, and they need half precision and compute capability 8.0.
    Without them torch would use plain products, which hold all scores of a head at once; with repeated keys, it uses the
    memory-efficient kernel.
    """
    if query.device.type != "cuda":
        return True
    params = cuda.SDPAParams(query, key, value, None, dropout, True, True)  # no mask, causal, with shared heads
    return cuda.can_use_flash_attention(params) or cuda.can_use_cudnn_attention(params)


def _repeat(tensor: Tensor, groups: int) -> Tensor:
    """Return [B,K,L,d] with every head `groups` times: [B,K*groups,L,d]."""
    return tensor.repeat_interleave(groups, dim=1)


def document_masks(images: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return one mask per document of a row, bool [length, length], True where the query (first) attends to the key.

    A token attends to itself, to all tokens before it and to all tokens of its own image.
    images [L]: the number of the image that each token belongs to, -1 for text.
    """
    causal = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=images.device).tril_()
    masks = []
    for numbers in images.split(list(lengths)):
        is_same = (numbers[:, None] == numbers) & (numbers[:, None] >= 0)
        masks.append(is_same | causal[: len(numbers), : len(numbers)])
    return masks


def _band(queries: Tensor, sliding_window: int | None) -> Tensor | None:
    """Return the mask of a sliding window shorter than the document, or None where plain causal attention is the same."""
    length = queries.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    positions = torch.arange(length, device=queries.device)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < sliding_window)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
