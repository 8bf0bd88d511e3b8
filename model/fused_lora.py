"""Fused LoRA: each linear layer with LoRA, and each feed-forward block of three, is one autograd function instead of PEFT's
separate casts, scalings and additions. The sums are the same in another order, so results are equal up to rounding.

Modules keep their parameters, names, state_dict and PEFT's methods (save, load, merge, disable). Only `forward` changes, and
it calls PEFT's own unless the case is a plain one (`_plain`). Knows no config and no loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from model.elementwise import Elementwise

# Internals of other libraries used here, to check when upgrading:
# peft.tuners.lora.Linear: base_layer, lora_A, lora_B, lora_dropout, lora_variant, scaling, active_adapters,
# disable_adapters, merged; transformers' Qwen2MLP, Qwen3MLP and LlamaMLP: gate_proj, up_proj, down_proj, config.hidden_act.


def fuse_lora(language_model: nn.Module) -> int:
    """Fuse every linear layer with LoRA, and every feed-forward block whose three linear layers have LoRA, in place.

    Call it after LoRA is added. Returns the number of linear layers with LoRA.
    """
    layers = [module for module in language_model.modules() if type(module) is lora.Linear]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    module: Any  # a type checker takes the attributes of an nn.Module for tensors
    for module in language_model.modules():
        if type(module) in _MLPS and module.config.hidden_act == "silu":
            module.__class__ = _MLPS[type(module)]
    return len(layers)


def fused_layers(language_model: nn.Module, dtype: torch.dtype) -> int:
    """Return how many linear layers with LoRA compute as one function in `dtype`; the others compute as PEFT does. Call it
    within the run's autocast, after `fuse_lora`."""
    return sum(_plain(module, dtype) is not None for module in language_model.modules())


class FusedLoraLinear(lora.Linear):
    """PEFT's linear layer, with base and LoRA in one autograd function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in] -> [..., out]."""
        dtype = _compute_dtype(x)
        weights = None if args or kwargs else _plain(self, dtype)
        if weights is None:
            return super().forward(x, *args, **kwargs)
        x = x.to(dtype)
        dropped = self.lora_dropout[self.active_adapters[0]](x) if _drops(self) else None
        return _LoraLinear.apply(x, dropped, weights.scaling, *weights[1:])


class FusedMLP(nn.Module):
    """Mixin before a dense feed-forward block: down(silu(gate(x)) * up(x)) with LoRA in one autograd function."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    elementwise = Elementwise()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., D]."""
        dtype = _compute_dtype(x)
        layers = self.gate_proj, self.up_proj, self.down_proj
        weights = [w for layer in layers if (w := _plain(layer, dtype)) is not None and w.bias is None]
        if len(weights) < len(layers) or any(map(_drops, layers)):
            return super().forward(x)
        scalings = tuple(one.scaling for one in weights)
        return _LoraMLP.apply(
            x.to(dtype), self.elementwise, scalings, *(w for one in weights for w in (one.base, one.a, one.b))
        )


class FusedQwen2MLP(FusedMLP, Qwen2MLP):
    """Fused block of Qwen2 and Qwen v1."""


class FusedQwen3MLP(FusedMLP, Qwen3MLP):
    """Fused block of Qwen3."""


class FusedLlamaMLP(FusedMLP, LlamaMLP):
    """Fused block of Llama."""


_MLPS = {Qwen2MLP: FusedQwen2MLP, Qwen3MLP: FusedQwen3MLP, LlamaMLP: FusedLlamaMLP}


# ---------------------------------------------------------------------------------------------------------------------
# The plain case


class Weights(NamedTuple):
    """Weights of y = x base^T + bias + scaling (x a^T) b^T: base [out, in], bias [out] or None, a [r, in], b [out, r]."""

    scaling: float
    base: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that a linear layer computes in: autocast's within autocast, else the input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _plain(layer: nn.Module, dtype: torch.dtype) -> Weights | None:
    """Return the layer's weights if it computes just the sum of `Weights`, over a frozen base of type `dtype`; else None."""
    if type(layer) is not FusedLoraLinear or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name, base = layer.active_adapters[0], layer.base_layer
    if name not in layer.lora_A or name in layer.lora_variant or type(base) is not nn.Linear:
        return None
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None:
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    # outside autocast, PEFT computes LoRA in LoRA's own type, which may differ from the base's
    is_cast = torch.is_autocast_enabled(weight.device.type)
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype) or not (is_cast or a.weight.dtype == dtype):
        return None
    return Weights(layer.scaling[name], weight, bias, a.weight, b.weight)


def _drops(layer: Any) -> bool:
    """Return whether LoRA's dropout is active in this LoRA layer."""
    return layer.training and getattr(layer.lora_dropout[layer.active_adapters[0]], "p", 0.0) > 0


# ---------------------------------------------------------------------------------------------------------------------
# The products, forward and backward. T tokens, r the rank. All tensors have one type, except the gradients of LoRA's two
# matrices, which are computed in that type and returned in the parameters' own. The base is frozen.


def _forward(x: Tensor, base: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, in] -> (y [T, out], x a^T [T, r]). b is already scaled."""
    low = x @ a.t()
    return F.linear(x, base, bias).addmm_(low, b.t()), low


def _input_gradient(dy: Tensor, dlow: Tensor, base: Tensor, a: Tensor) -> Tensor:
    """dy [T, out], dlow = dy b [T, r] -> the gradient of x [T, in]."""
    return (dy @ base).addmm_(dlow, a)


def _weight_gradients(dy: Tensor, dlow: Tensor, x: Tensor, low: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of a [r, in] and b [out, r], in float32 or wider."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    return (dlow.t() @ x).to(wide), (low.t() @ dy).t().to(wide).mul_(scaling)


def _cast(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return a.to(dtype), (b * scaling).to(dtype)


class _LoraLinear(torch.autograd.Function):
    """dropped: x after LoRA's dropout, which LoRA reads instead of x and which gets its own gradient; None: LoRA reads x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        scaling: float,
        base: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        read = rows if dropped is None else dropped.reshape(rows.shape)
        low_a, low_b = _cast(a, b, scaling, x.dtype)
        low = read @ low_a.t()
        y = F.linear(rows, base, bias).addmm_(low, low_b.t())
        ctx.save_for_backward(read, low, base, low_a, low_b)
        ctx.scaling, ctx.shape, ctx.is_dropped = scaling, x.shape, dropped is not None
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        read, low, base, a, b = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dlow = dy @ b
        dx = ddropped = None
        if ctx.needs_input_grad[0]:
            dx = dy @ base if ctx.is_dropped else _input_gradient(dy, dlow, base, a)
            dx = dx.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            ddropped = (dlow @ a).view(ctx.shape)
        return dx, ddropped, None, None, None, *_weight_gradients(dy, dlow, read, low, ctx.scaling)


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, elementwise: Elementwise, scalings: tuple[float, ...], *weights: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        bases: tuple[Tensor, ...] = weights[::3]
        cast: list[Tensor] = []
        for a, b, scaling in zip(weights[1::3], weights[2::3], scalings, strict=True):
            cast += _cast(a, b, scaling, x.dtype)
        gate, low_gate = _forward(rows, bases[0], None, *cast[0:2])
        up, low_up = _forward(rows, bases[1], None, *cast[2:4])
        y, low_down = _forward(elementwise.silu_mul(gate, up), bases[2], None, *cast[4:6])
        ctx.save_for_backward(rows, gate, up, low_gate, low_up, low_down, *bases, *cast)
        ctx.elementwise, ctx.scalings, ctx.shape = elementwise, scalings, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, low_gate, low_up, low_down, *saved = ctx.saved_tensors
        (base_gate, base_up, base_down), (a_gate, b_gate, a_up, b_up, a_down, b_down) = saved[:3], saved[3:]
        s_gate, s_up, s_down = ctx.scalings
        dy = dy.reshape(-1, dy.shape[-1])
        dlow = dy @ b_down
        dhidden = _input_gradient(dy, dlow, base_down, a_down)
        # recomputes hidden, which is not kept
        dgate, dup, hidden = ctx.elementwise.silu_mul_backward(dhidden, gate, up)
        down = _weight_gradients(dy, dlow, hidden, low_down, s_down)
        dlow_gate, dlow_up = dgate @ b_gate, dup @ b_up
        gate = _weight_gradients(dgate, dlow_gate, x, low_gate, s_gate)
        up = _weight_gradients(dup, dlow_up, x, low_up, s_up)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dgate, dlow_gate, base_gate, a_gate)
            dx = dx.addmm_(dup, base_up).addmm_(dlow_up, a_up).view(ctx.shape)
        return dx, None, None, None, *gate, None, *up, None, *down
