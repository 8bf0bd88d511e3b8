"""Faster element-wise parts of a decoder layer: norms and the gated activation, each in one pass over memory.

Compiled by torch, or replaced by Liger's kernels if they are installed. Equal to the plain operations up to rounding. Knows
no config and no loop.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

# Internals of other libraries used here, to check when upgrading:
# torch._inductor.config, torch._dynamo.mark_dynamic, torch._dynamo.exc; transformers' Qwen RMSNorm classes:
# weight, variance_epsilon.

# ---------------------------------------------------------------------------------------------------------------------
# The operations, compiled or not. T rows of any width; every tensor of T rows is 2-D.


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, each [T, I]."""
    return F.silu(gate).mul_(up)


def silu_mul_backward(dhidden: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and up, and silu_mul(gate, up) again: each [T, I]."""
    silu = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    return dgate, dhidden * silu, silu.mul_(up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise the rows of x [T, D] and multiply by weight [D] (arXiv:1910.07467).

    Returns the result [T, D] and the factor by which each row was normalised, float32 [T, 1].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of x [T, D]. scale [T, 1]: the factors that `rms_norm` returned."""
    dnormed, normed = dy.float() * weight.float(), x.float() * scale
    return ((dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * scale).to(x.dtype)


class Elementwise(NamedTuple):
    """The four operations, plain or compiled."""

    silu_mul: Callable = silu_mul
    silu_mul_backward: Callable = silu_mul_backward
    rms_norm: Callable = rms_norm
    rms_norm_backward: Callable = rms_norm_backward


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def compile_elementwise(language_model: nn.Module, device: str, folder: Path, report: Callable[[str], None]) -> bool:
    """Train the norms of `language_model`, and its feed-forward blocks if `fuse_lora` was called before, with compiled
    operations. Compilation happens at their first call.

    Returns False, and reports one line, if no compiler is found. If the compiler fails later, within a step, that is
    reported once, and the step and the rest of the run continue without compilation.

    device: the type of the device that the model will train on. folder: for compiled code, which the next run reuses;
    nothing is written elsewhere.
    """
    if missing := _missing_compiler(device):
        report(f"element-wise operations not compiled: {missing} not found")
        return False
    import torch._inductor.config as inductor  # this import takes a second

    inductor.compile_threads = 1  # a few small kernels need no pool of processes
    inductor.cpp_cache_precompile_headers = False  # these would be written to the system's temporary folder
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    elementwise = _compiled(Elementwise(), device, report)
    module: Any  # a type checker takes the attributes of an nn.Module for tensors
    for module in language_model.modules():
        if type(module) in _NORMS:
            module.__class__ = _NORMS[type(module)]
        if hasattr(module, "elementwise"):
            module.elementwise = elementwise
    return True


def _missing_compiler(device: str) -> str | None:
    """Return the name of what compiling for `device` lacks; None if nothing."""
    if device == "cuda":
        return None if find_spec("triton") else "triton package"
    if device != "cpu":
        return f"compiler for {device}"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"C++ compiler ({compiler})"


def _compiled(operations: Elementwise, device: str, report: Callable[[str], None]) -> Elementwise:
    """Return operations that are compiled at their first call, once for each type of arguments."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    failed: list[str] = []

    def wrapped(plain: Callable) -> Callable:
        compiled = torch.compile(plain, fullgraph=True)

        def call(*arguments: Any) -> Any:
            # torch would compile a kernel of its own for a single row
            if failed or arguments[0].shape[0] == 1:
                return plain(*arguments)
            # one kernel for any number of rows, within autocast or not, so that it does not depend on the first batch
            marked = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
            for tensor in marked:
                if isinstance(tensor, Tensor) and tensor.ndim == 2:
                    torch._dynamo.mark_dynamic(tensor, 0)
            try:
                with torch.no_grad(), torch.autocast(device, enabled=False):
                    return compiled(*marked)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                failed.append(str(error))
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                report(f"element-wise operations not compiled: the compiler failed ({reason.strip()[:200]})")
            return plain(*arguments)

        return call

    return Elementwise(*map(wrapped, operations))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, elementwise: Elementwise) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, scale = elementwise.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        ctx.elementwise, ctx.shape = elementwise, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        dx = ctx.elementwise.rms_norm_backward(dy.reshape(-1, dy.shape[-1]), *ctx.saved_tensors)
        return dx.view(ctx.shape), None, None, None


class CompiledNorm(nn.Module):
    """Mixin before a model family's RMSNorm. A norm that trains, and a pass without gradients, use the library's forward."""

    weight: nn.Parameter
    variance_epsilon: float
    elementwise = Elementwise()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., D] -> [..., D]."""
        if self.weight.requires_grad or not torch.is_grad_enabled():
            return super().forward(hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.elementwise)


class CompiledQwen2RMSNorm(CompiledNorm, Qwen2RMSNorm):
    """Compiled norm of Qwen2 and Qwen v1."""


class CompiledQwen3RMSNorm(CompiledNorm, Qwen3RMSNorm):
    """Compiled norm of Qwen3."""


class CompiledLlamaRMSNorm(CompiledNorm, LlamaRMSNorm):
    """Compiled norm of Llama."""


class CompiledQwen2MoeRMSNorm(CompiledNorm, Qwen2MoeRMSNorm):
    """Compiled norm of Qwen2-MoE."""


class CompiledQwen3MoeRMSNorm(CompiledNorm, Qwen3MoeRMSNorm):
    """Compiled norm of Qwen3-MoE."""


_NORMS = {
    Qwen2RMSNorm: CompiledQwen2RMSNorm,
    Qwen3RMSNorm: CompiledQwen3RMSNorm,
    LlamaRMSNorm: CompiledLlamaRMSNorm,
    Qwen2MoeRMSNorm: CompiledQwen2MoeRMSNorm,
    Qwen3MoeRMSNorm: CompiledQwen3MoeRMSNorm,
}


# ---------------------------------------------------------------------------------------------------------------------
# Liger's kernels


def use_liger(causal_lm: PreTrainedModel) -> bool:
    """Use Liger's kernels for norms, SwiGLU and rotary embedding in a dense language model on a GPU; not for the loss.

    Returns False if liger_kernel is not installed. Liger also changes transformers' modules for models made later.
    """
    try:
        from liger_kernel import transformers as liger
    except ImportError:
        return False
    kind = causal_lm.config.model_type
    family = kind if kind in ("qwen3", "llama") else "qwen2"  # Qwen v1 has Qwen2's layers
    apply = getattr(liger, f"apply_liger_kernel_to_{family}")
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=causal_lm)
    return True
