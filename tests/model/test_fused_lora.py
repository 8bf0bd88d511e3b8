"""Fused LoRA and feed-forward blocks, compiled element-wise operations and Liger's kernels give the same numbers as PEFT's
own computation on transformers' own modules.

Run: python -m pytest tests/model/test_fused_lora.py
"""

from __future__ import annotations

import copy
import sys
import tempfile
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen3Config

from model import elementwise, fused_lora
from model.elementwise import compile_elementwise, use_liger
from model.fused_lora import FusedLoraLinear, FusedMLP, fuse_lora
from qwen.modeling import Qwen2ForCausalLM, Qwen3ForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = {"qwen2": (Qwen2ForCausalLM, Qwen2Config), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
WIDTH, LAYERS, RANK = 32, 2, 4


def build(family: str = "qwen2", dtype=torch.float32, **lora_settings) -> nn.Module:
    """Return a tiny model with LoRA. All weights are random, also biases and lora_B; LoRA is float32."""
    torch.manual_seed(0)
    model_class, config_class = FAMILIES[family]
    model = model_class(
        config_class(
            vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, head_dim=WIDTH // 4, initializer_range=0.08, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype)
    settings = {"r": RANK, "lora_alpha": 10, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**settings | lora_settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, dtype=dtype if dtype.itemsize == 8 else torch.float32)
    return model.train()


def fuse(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    assert fuse_lora(model) == len(TARGETS) * LAYERS
    return model


def step(model: nn.Module, bf16: bool = False, rows: int = 2, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Run forward and backward. Returns the output and, by name, the gradients of the input and of all trained weights."""
    generator = torch.Generator().manual_seed(5)
    dtype = model.get_base_model().lm_head.weight.dtype
    x, weight = (torch.randn(rows, tokens, WIDTH, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model.get_base_model().model(inputs_embeds=x, use_cache=False).last_hidden_state
    y.backward(weight)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"output": y.detach(), "input": x.grad, **gradients}


def step_with_one_token(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the results of `step` for one token, without the gradients of queries and keys: these are zero up to rounding,
    because a softmax over one token is constant."""
    results = step(model, rows=1, tokens=1)
    zeros = [name for name in results if "q_proj" in name or "k_proj" in name]
    assert max(results.pop(name).abs().max() for name in zeros) < 1e-6
    return results


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def assert_equal_to_rounding(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and found[name].is_contiguous(), name
        assert error(found[name], expected[name]) < 1e-6, name


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_all_gradients_equal_pefts(family):
    model = build(family)
    assert_equal_to_rounding(step(fuse(model)), step(model))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp"])
def test_bf16_is_as_exact_as_pefts(name):
    """Output and every gradient. Base weights are bfloat16, LoRA's weights and gradients float32."""
    model = build(dtype=torch.bfloat16)
    errors = []
    for one in (fuse(model), model):
        module = one.get_base_model().model.layers[0].get_submodule(name)
        exact = copy.deepcopy(module).double()
        x, dy = (torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (7, 8))
        results = []
        for part, inputs in ((module, x), (exact, x.double())):
            inputs.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=part is module):
                y = part(inputs)
            y.backward(dy.to(y.dtype))
            results.append([y, inputs.grad, *(p.grad for p in part.parameters() if p.requires_grad)])
        assert [found.dtype for found in results[0]] == [torch.bfloat16] * 2 + [torch.float32] * (len(results[0]) - 2)
        errors.append([error(*pair) for pair in zip(*results, strict=True)])
    assert all(ours < 1.05 * pefts for ours, pefts in zip(*errors, strict=True)), errors
    assert max(errors[1]) < 0.02


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj"], ["up_proj", "down_proj", "o_proj"]])
def test_lora_on_some_of_the_layers(targets):
    model = build(target_modules=targets)
    other = copy.deepcopy(model)
    assert fuse_lora(other) == len(targets) * LAYERS
    assert_equal_to_rounding(step(other), step(model))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp"])
def test_gradients_equal_numerical_derivatives(name):
    module = fuse(build(dtype=torch.float64)).get_base_model().model.layers[0].get_submodule(name)
    assert isinstance(module, FusedLoraLinear if name.endswith("q_proj") else FusedMLP)
    weights = [p for p in module.parameters() if p.requires_grad]
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *weights))


def test_a_layer_used_twice_in_a_graph_accumulates_gradients():
    model = build()
    results = []
    for one in (model, fuse(model)):
        layer, mlp = (one.get_base_model().model.layers[0].get_submodule(n) for n in ("self_attn.q_proj", "mlp"))
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = mlp(layer(mlp(layer(x)))).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append({"x": x.grad} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert len(results[0]) == 1 + 2 * 4
    assert_equal_to_rounding(results[1], results[0])


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name, products, saved", [("self_attn.q_proj", 8, 2), ("mlp", 3 * 8, 2 * 2)])
def test_a_frozen_input_takes_fewer_products(name, products, saved):
    """A linear layer has 3 products forward; backward 1 for the low rank, 2 for LoRA's gradients and 2 for the input's."""
    module = fuse(build()).get_base_model().model.layers[0].get_submodule(name)
    for requires_grad in (True, False):
        x = torch.randn(3, WIDTH, requires_grad=requires_grad)
        with Products() as counted:
            module(x).sum().backward()
        assert counted.count == products - (0 if requires_grad else saved)


def test_activation_checkpointing_gives_the_same_gradients():
    model = fuse(build())
    expected = step(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    found = step(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_generated_tokens_are_equal():
    model = build().eval()
    other = fuse(model)
    ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))
    with torch.no_grad():
        a, b = (one.get_base_model()(ids[:, :1]).logits for one in (other, model))
    assert error(a, b) < 1e-6


def add_adapter(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])


def train_base(model):
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.base_layer.weight.requires_grad_(True)


NOT_PLAIN = {
    "dora": ({"use_dora": True}, lambda model: None),
    "LoRA's own bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, lambda model: None),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "merged": ({}, lambda model: model.merge_adapter()),
    "two adapters": ({}, add_adapter),
    "a base that trains": ({}, train_base),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_any_other_case_is_computed_by_peft(case, monkeypatch):
    """Bit for bit, and the fused functions are not called."""
    settings, change = NOT_PLAIN[case]
    model = build(**settings)
    other = copy.deepcopy(model)
    fuse_lora(other)
    for function in (fused_lora._LoraLinear, fused_lora._LoraMLP):
        monkeypatch.setattr(function, "apply", lambda *_: pytest.fail("fused"))
    results = []
    for one in (model, other):
        torch.manual_seed(3)
        change(one)
        x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
        y = one.get_base_model().model(inputs_embeds=x, use_cache=False).last_hidden_state
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in one.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_draws_and_scales_as_pefts(family):
    model = build(family, lora_dropout=0.5)
    results = []
    for one in (fuse(model), model):
        torch.manual_seed(3)
        results.append(step(one))
    assert_equal_to_rounding(*results)
    assert error(step(model)["output"], results[1]["output"]) > 1e-3, "another seed, another mask"


def test_dropout_is_off_in_eval_mode():
    model = build(lora_dropout=0.5).eval()
    assert_equal_to_rounding(step(fuse(model)), step(model))


def test_bf16_outside_autocast_is_computed_by_peft():
    model = build(dtype=torch.bfloat16)
    assert torch.equal(step(fuse(model))["output"], step(model)["output"])


def test_names_stay_the_same_and_merging_works():
    model = build()
    other = fuse(model)
    assert list(other.state_dict()) == list(model.state_dict())
    assert list(get_peft_model_state_dict(other)) == list(get_peft_model_state_dict(model))
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(other)
    assert isinstance(copied.get_base_model().model.layers[0].mlp, FusedMLP)
    expected = step(other)["output"]
    other.merge_adapter()
    assert 0 < error(step(other)["output"], expected) < 1e-5
    other.unmerge_adapter()
    assert error(step(other)["output"], expected) < 1e-5
    assert not any(isinstance(module, lora.Linear) for module in copied.merge_and_unload().modules())


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder as the system's temporary folder and home, and no environment variables of compilers."""
    torch.compiler.reset()
    folder = tmp_path / "temporary"
    folder.mkdir()
    for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("CXX", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # monkeypatch then removes what the code sets
        monkeypatch.delenv(name)
    yield folder
    torch.compiler.reset()


def test_compiled_once_for_any_number_of_rows_and_equal_to_plain(temporary, tmp_path):
    """Four operations make four graphs for all lengths. Nothing is written outside the folder."""
    model = build()
    other = fuse(model)
    reports = []
    assert compile_elementwise(other, "cpu", tmp_path / "cache", reports.append)
    torch._dynamo.utils.counters.clear()
    for tokens in (9, 23, 4):
        assert_equal_to_rounding(step(other, tokens=tokens), step(model, tokens=tokens))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert_equal_to_rounding(step_with_one_token(other), step_with_one_token(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not reports and any((tmp_path / "cache" / "inductor").iterdir()) and not list(temporary.rglob("*"))


def test_a_missing_compiler_is_reported_once(temporary, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = build()
    other = fuse(model)
    reports = []
    assert not compile_elementwise(other, "cpu", tmp_path / "cache", reports.append)
    assert len(reports) == 1 and "no-such-compiler" in reports[0]
    assert_equal_to_rounding(step(other), step(model))


def test_a_compiler_that_fails_is_reported_once(temporary, tmp_path, monkeypatch):
    def fail(*arguments):
        raise torch._dynamo.exc.TorchDynamoException("the compiler\nis broken")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    model = build()
    other = fuse(model)
    reports = []
    assert compile_elementwise(other, "cpu", tmp_path / "cache", reports.append)
    for _ in range(2):
        assert_equal_to_rounding(step(other), step(model))
    assert len(reports) == 1 and "\n" not in reports[0] and "the compiler" in reports[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operations_equal_the_librarys_and_their_derivatives(dtype):
    generator = torch.Generator().manual_seed(6)
    gate, up, dy = (torch.randn(5, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3))
    expected = nn.functional.silu(gate) * up
    derivatives = torch.autograd.grad(expected, (gate, up), dy)
    with torch.no_grad():
        assert error(elementwise.silu_mul(gate, up), expected) < 1e-6
        *found, hidden = elementwise.silu_mul_backward(dy, gate, up)
        assert torch.equal(hidden, elementwise.silu_mul(gate, up))
        assert max(map(error, found, derivatives)) < 1e-6

    norm = elementwise.Qwen2RMSNorm(8).to(dtype)
    norm.weight.data.normal_(generator=generator)
    expected = norm(gate)
    (derivative,) = torch.autograd.grad(expected, gate, dy)
    with torch.no_grad():
        y, scale = elementwise.rms_norm(gate, norm.weight, norm.variance_epsilon)
        assert error(y, expected) < 1e-6
        assert error(elementwise.rms_norm_backward(dy, gate, norm.weight, scale), derivative) < 1e-6


def test_a_norm_that_trains_uses_the_librarys_forward(temporary, tmp_path, monkeypatch):
    monkeypatch.setattr(elementwise, "_missing_compiler", lambda device: None)
    model = build()
    other = copy.deepcopy(model)
    compile_elementwise(other, "cpu", tmp_path / "cache", pytest.fail)
    for one in (model, other):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("norm" in name)
    monkeypatch.setattr(elementwise._RMSNorm, "apply", lambda *_: pytest.fail("compiled"))
    found, expected = step(other), step(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and len(expected) == 2 + 2 * LAYERS + 1


# ---------------------------------------------------------------------------------------------------------------------
# Liger


@pytest.mark.parametrize("family", FAMILIES)
def test_ligers_kernels_are_applied_without_its_loss(family, monkeypatch):
    calls = []
    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    setattr(module, f"apply_liger_kernel_to_{family}", lambda **options: calls.append(options))
    package.transformers = module
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    causal_lm = build(family).get_base_model()
    assert use_liger(causal_lm)
    assert calls == [
        {
            "rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False,
            "fused_linear_cross_entropy": False, "model": causal_lm,
        }
    ]  # fmt: skip


def test_without_liger_nothing_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert not use_liger(build().get_base_model())
