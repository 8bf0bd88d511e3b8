"""Tests of benchmarks.limits and benchmarks.growth: counts, times, figures.

Run: sh tests/run.sh tests/benchmarks/test_limits.py
"""

import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.profiler import ProfilerActivity, profile

from benchmarks import growth, limits, measuring
from benchmarks.flops import Product, Work, attention_flops, linear_products, step_flops, torch_counter
from benchmarks.growth import Series
from benchmarks.limits import matrix_product, split_step
from benchmarks.models import PAD_TOKEN_ID, Sizes, random_model, random_sample
from dataset.batch import Batch, collate
from model.fused_lora import fuse_lora
from qwen.attention import packed_sdpa

CPU = torch.device("cpu")
SIZES = Sizes(
    vocabulary=130, width=64, layers=3, heads=4, kv_heads=2, mlp=96, vision_width=32, vision_layers=4, vision_heads=2,
    image_size=28, patch_size=7, lora_rank=4,
)  # fmt: skip
SHAPES = [(5, 7, 1), (3, 30, 2), (9, 1, 1)]  # question, answer, images


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_batch(packed: bool) -> Batch:
    chance = np.random.default_rng(0)
    return collate([random_sample(SIZES, chance, *shape) for shape in SHAPES], PAD_TOKEN_ID, packed)


def counted_by_torch(model, inputs: dict) -> tuple[int, int]:
    """Return (operations of linear layers and the convolution, of the attention's products) of a forward and a backward."""
    with torch_counter() as counter:
        model(**inputs).answers.backward()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in counts.items() if "bmm" in str(operation))
    return sum(counts.values()) - attention, attention


def sum_of(products) -> int:
    return sum(times * one.flops for one, times in products.items())


# ---------------------------------------------------------------------------------------------------------------------
# The operations of a step


@pytest.mark.parametrize("fused", [False, True], ids=["PEFT", "fused"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "cached"])
def test_the_products_of_linear_layers_are_those_that_torch_counts(fused, packed, cached):
    model, batch = random_model(SIZES, torch.float32, CPU), make_batch(packed)
    if fused:
        assert fuse_lora(model.language_model) == 7 * SIZES.layers
    inputs = batch.model_inputs(CPU)
    if cached:
        inputs |= {"patch_features": model.patch_features(inputs["pixel_values"]), "pixel_values": None}
    work = Work([batch.input_ids.numel()], len(batch.is_cached), batch.num_targets, cached)
    products = linear_products(model, work)
    assert counted_by_torch(model, inputs)[0] == sum_of(products)


def test_attention_is_what_torch_counts_if_every_pair_is_computed():
    model, batch = random_model(SIZES, torch.float32, CPU, attention="eager"), make_batch(packed=False)
    model.vision_tower.model.set_attn_implementation("eager")
    rows, length = batch.input_ids.shape
    expected = attention_flops(model, Work([length] * rows, len(batch.is_cached), targets=0), causal=False)
    assert counted_by_torch(model, batch.model_inputs(CPU))[1] == sum(expected.values())


def test_a_token_sees_itself_and_earlier_ones_of_its_document():
    model = random_model(SIZES, torch.float32, CPU)
    pairs = sum(1 for length in (3, 5) for query in range(length) for key in range(length) if key <= query)
    every_pair = attention_flops(model, Work([1] * pairs, images=0, targets=0))["decoder"]
    assert attention_flops(model, Work([3, 5], images=0, targets=0))["decoder"] == every_pair


def test_padding_does_not_count():
    model, batch = random_model(SIZES, torch.float32, CPU), make_batch(packed=True)
    work = Work(batch.lengths[: len(SHAPES)], len(batch.is_cached), batch.num_targets)
    parts = step_flops(model, work)
    products = linear_products(model, work)
    assert all(parts[part] > 0 for part in ("encoder", "projector", "decoder", "LoRA", "head", "attention"))
    assert sum(parts.values()) == sum_of(products) + sum(attention_flops(model, work).values())
    assert limits.sum_flops(model, [batch, batch]) == {part: 2 * count for part, count in parts.items()}
    assert limits.sum_flops(model, [make_batch(packed=False)]) == parts


# ---------------------------------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize("kind, shape", [("forward", (5, 2)), ("input", (5, 3)), ("weight", (2, 3))])
def test_a_product_is_computed_in_its_own_shape(kind, shape):
    product = Product("", kind, rows=5, in_features=3, out_features=2)
    compute = matrix_product(product, torch.float32)
    with torch_counter() as counter:
        result = compute()
    assert result.shape == shape and counter.get_total_flops() == product.flops == 2 * 5 * 3 * 2


def test_the_fastest_call_is_reported():
    now, costs = [0.0], iter([0.06, 0.02, 0.03])

    def work():
        now[0] += next(costs)

    assert measuring.fastest(work, 3, clock=lambda: now[0]) == pytest.approx(0.02)


def test_the_first_computation_of_a_product_is_not_timed(monkeypatch):
    calls = []
    monkeypatch.setattr(limits, "fastest", lambda call, times: calls.append("timed") or 0.5)
    monkeypatch.setattr(limits.torch, "mm", lambda *pair, **options: calls.append("computed"))
    assert limits.own_rate({Product("", "input", 4, 4, 4): 3}, torch.float32) == 2 * 4**3 / 0.5
    assert calls == ["computed", "timed"]


def test_a_profile_is_divided_among_the_parts_without_a_rest():
    weight = torch.randn(400, 400, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    query = torch.randn(1, 4, 256, 32)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        (torch.randn(400, 400) @ weight).exp().sum().backward()
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        half = query.bfloat16().requires_grad_()
        packed_sdpa(None, half, half, half, None, lengths=(200, 56))[0].sum().backward()
        optimizer.step()
    names = {limits.part_of(event) for event in seen.events() if event.name in ("aten::mm", "aten::addmm")}
    assert names == {"matrix products"}
    parts = split_step(seen.events(), seconds=10.0)
    assert sum(parts.values()) == pytest.approx(10.0)
    assert all(parts[part] > 0 for part in limits.PARTS) and parts["Python"] > 9.0
    spent = {event.name: limits.part_of(event) for event in seen.events()}
    assert spent["aten::exp"] == "element by element" and spent["aten::addcdiv_"] == "optimizer"
    assert {limits.part_of(event) for event in seen.events() if event.name == "aten::bmm"} == {"attention"}
    assert any("scaled_dot_product" in name and part == "attention" for name, part in spent.items())


def test_measures_the_steps_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SQUARES", [Product("square", "input", 64, 64, 64)])
    arguments = Namespace(precision="fp32", threads=1, workers=0, steps=2, overrides=[])
    found = limits.measure(tmp_path, "tiny", arguments)
    assert len(found.step) == len(found.loading) == len(found.flops) == len(found.own_rates) == 2
    assert len(found.parts) == limits.PROFILED and min(found.step + found.loading) > 0
    assert found.counted == found.expected > 0
    text = limits.markdown(found, "fp32", 1)
    tables = re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE)
    assert len(tables) == 3
    assert all(line.count("|") == table.split("\n")[0].count("|") for table in tables for line in table.splitlines())
    shares = [float(share) for share in re.findall(r"([\d.]+)% \|$", tables[2], re.MULTILINE)]
    assert len(shares) == len(limits.PARTS) + 1 and sum(shares) == pytest.approx(100, abs=1)


def test_the_fraction_is_of_the_best_square_rate():
    found = limits.Findings(
        step=[2.0, 2.0], loading=[0.5, 0.5], flops=[{"a": 30, "b": 10}] * 2, square_rates=[25.0, 40.0], own_rates=[30.0],
        parts=[dict.fromkeys(limits.PARTS, 0.2)], counted=10, expected=10,
    )  # fmt: skip
    text = limits.markdown(found, "fp32", 1)
    assert re.search(r"\| the step \| [\d.]+ \| 50% \|", text)  # 40 in 2 seconds, of 40 a second
    assert re.search(r"\| the step with loading \| [\d.]+ \| 40% \|", text)
    assert re.search(r"\| the step's products, alone \| [\d.]+ \| 75% \|", text)
    assert "| a | 0.00 | 75.0% |" in text and "| attention | 400.0 | 16.0% |" in text


# ---------------------------------------------------------------------------------------------------------------------
# Growth


def test_an_exponent_is_that_of_the_last_points():
    work = [1, 2, 4, 8, 16]
    assert Series("", "", "", work, [9, 9] + [3 * n**1.5 for n in work[2:]]).exponent == pytest.approx(1.5)
    assert Series("", "", "", work, [2.0] * 5).exponent == pytest.approx(0)


def test_growth_draws_its_figure_and_prints_its_table(tmp_path, capsys):
    figure = tmp_path / "docs" / "growth.png"
    growth.main(["--quick", "--figure", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 20_000
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 7 and all(len(row) == 7 for row in rows)
    assert all(-1 < float(row[6]) < 3 for row in rows[2:])
