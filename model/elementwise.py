"""The element-wise parts of a decoder layer (norms, the gated activation) in one pass over memory each, where torch can
compile them or Liger's kernels are installed. Equal to the plain operations up to rounding. Knows no config and no loop.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

# ---------------------------------------------------------------------------------------------------------------------
# The operations. T rows of any width; every argument of T rows is 2-D. Compiled or not, these are what is computed.


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each [T, I]."""
    return F.silu(gate).mul_(up)


def silu_mul_backward(dhidden: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and of up, and silu_mul(gate, up) once more: each [T, I]."""
    silu = F.silu(gate)
    dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
    return dgate, dhidden * silu, silu.mul_(up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] -> its norm [T, D], and in float32 what each row was multiplied by, [T, 1]. (arXiv:1910.07467)"""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x [T, D]."""
    dnormed, normed = dy.float() * weight.float(), x.float() * scale
    return ((dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * scale).to(x.dtype)


class Elementwise(NamedTuple):
    silu_mul: Callable = silu_mul
    silu_mul_backward: Callable = silu_mul_backward
    rms_norm: Callable = rms_norm
    rms_norm_backward: Callable = rms_norm_backward


# ---------------------------------------------------------------------------------------------------------------------
# Compiling them


def compile_elementwise(language_model: nn.Module, device: str, folder: Path, say: Callable[[str], None]) -> bool:
    """Let the norms of `language_model`, and its feed-forward blocks if `fuse_lora` was there before, train on compiled
    operations. Returns whether a compiler is here; `say` gets one line where it is not, or where it fails later, in the
    middle of a step: that step and the rest of the run go on uncompiled.

    device: the type of the one that the model will train on. folder: for what is compiled, kept for the next run; nothing
    is written elsewhere.
    """
    if missing := _missing_compiler(device):
        say(f"element-wise parts: not compiled, there is no {missing}")
        return False
    import torch._inductor.config as inductor  # here, for it takes a second

    inductor.compile_threads = 1  # a handful of small kernels: no pool of processes
    inductor.cpp_cache_precompile_headers = False  # they would be written to the system's temporary folder
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    elementwise = _compiled(Elementwise(), device, say)
    for module in language_model.modules():
        if type(module) in _NORMS:
            module.__class__ = _NORMS[type(module)]
        if hasattr(module, "elementwise"):
            module.elementwise = elementwise
    return True


def _missing_compiler(device: str) -> str | None:
    if device == "cuda":
        return None if find_spec("triton") else "triton package"
    if device != "cpu":
        return f"compiler for {device}"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"C++ compiler ({compiler})"


def _compiled(operations: Elementwise, device: str, say: Callable[[str], None]) -> Elementwise:
    """The operations, compiled when they are first called, once for each type of their arguments."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    failed: list[str] = []

    def wrapped(plain: Callable) -> Callable:
        compiled = torch.compile(plain, fullgraph=True)

        def call(*arguments):
            if failed or arguments[0].shape[0] == 1:  # a single row would be compiled for itself
                return plain(*arguments)
            # one kernel for any number of rows, in autocast or out of it: the same whichever batch comes first
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
                say(f"element-wise parts: not compiled, the compiler fails ({reason.strip()[:200]})")
            return plain(*arguments)

        return call

    return Elementwise(*map(wrapped, operations))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, elementwise):
        rows = x.reshape(-1, x.shape[-1])
        y, scale = elementwise.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, scale)
        ctx.elementwise, ctx.shape = elementwise, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = ctx.elementwise.rms_norm_backward(dy.reshape(-1, dy.shape[-1]), *ctx.saved_tensors)
        return dx.view(ctx.shape), None, None, None


class CompiledNorm(nn.Module):
    """Mixin before a family's own norm. One that trains, and what is not training, keep the library's way."""

    elementwise = Elementwise()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [..., D] -> [..., D]."""
        if self.weight.requires_grad or not torch.is_grad_enabled():
            return super().forward(hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.elementwise)


class CompiledQwen2RMSNorm(CompiledNorm, Qwen2RMSNorm):
    """Qwen2's, and Qwen v1's."""


class CompiledQwen3RMSNorm(CompiledNorm, Qwen3RMSNorm):
    """Qwen3's."""


class CompiledQwen2MoeRMSNorm(CompiledNorm, Qwen2MoeRMSNorm):
    """Qwen2-MoE's."""


class CompiledQwen3MoeRMSNorm(CompiledNorm, Qwen3MoeRMSNorm):
    """Qwen3-MoE's."""


_NORMS = {
    Qwen2RMSNorm: CompiledQwen2RMSNorm,
    Qwen3RMSNorm: CompiledQwen3RMSNorm,
    Qwen2MoeRMSNorm: CompiledQwen2MoeRMSNorm,
    Qwen3MoeRMSNorm: CompiledQwen3MoeRMSNorm,
}


# ---------------------------------------------------------------------------------------------------------------------
# Or kernels from a library


def use_liger(causal_lm: nn.Module) -> bool:
    """Put Liger's kernels for norms, SwiGLU and rotary embedding into a Qwen language model on a GPU; not its loss. Returns
    False where liger_kernel is not installed. Its functions also change transformers' modules for models made later."""
    try:
        from liger_kernel import transformers as liger
    except ImportError:
        return False
    family = "qwen3" if causal_lm.config.model_type == "qwen3" else "qwen2"
    put_in = getattr(liger, f"apply_liger_kernel_to_{family}")
    put_in(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=causal_lm
    )
    return True
