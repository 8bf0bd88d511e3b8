"""benchmarks.memory: what is counted without memory is what real tensors take.
Run: sh tests/run.sh tests/benchmarks/test_memory.py"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState

import qwen
from benchmarks import memory
from benchmarks.memory import count_bytes, kept_for_backward, new_model, saved_bytes, shapes_of, weight_items
from benchmarks.models import IMAGE_TOKEN_ID
from config import InputError, load_config
from model.build import checkpoint_activations

RECIPE = load_config(memory.RECIPE)
TINY = memory.tiny_shapes()


@pytest.mark.parametrize("attention", ["causal", "mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_without_memory_equals_that_of_a_real_forward(attention, checkpointing):
    """To the byte, wherever the router sends the tokens."""
    shapes = TINY._replace(model=dataclasses.replace(TINY.model, attention=attention))
    model = new_model(shapes, "cpu")
    lm = model.causal_lm
    if checkpointing:
        checkpoint_activations(model)
    ids = torch.randint(2, 300, (1, shapes.batch * shapes.length), generator=torch.Generator().manual_seed(0))
    for row in range(shapes.batch):
        ids[0, row * shapes.length : row * shapes.length + shapes.image_tokens] = IMAGE_TOKEN_ID
    features = torch.randn(shapes.batch, shapes.image_tokens, 64)
    found = saved_bytes(lm, ids, [shapes.length] * shapes.batch, features)
    assert found == kept_for_backward(shapes, checkpointing)
    assert found[0] > 0 and (found[1] > 0) == (not checkpointing)


def test_every_weight_is_in_one_item_and_none_is_allocated():
    meta, real = new_model(TINY, "meta"), new_model(TINY, "cpu")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert weight_items(meta) == weight_items(real)
    assert sum(weight_items(real).values()) == sum(p.nbytes for p in real.parameters())


def test_the_recipe_fits_into_eight_gigabytes():
    """DINOv2-base and the model of 14 layers, batch 4, length 768, the optimizer, and activation checkpointing, which `auto`
    switches on there. A gigabyte is left for CUDA's context and for fragmentation."""
    shapes = shapes_of(RECIPE, 4, 768)
    assert (shapes.new.hidden_size, shapes.new.num_hidden_layers) == (1024, 14)
    items, moments = count_bytes(shapes)
    encoder, *_ = (size for title, size in items.items() if "encoder" in title)
    assert encoder == pytest.approx(2 * 86.6e6, rel=0.01)  # DINOv2-base in half precision
    with torch.device("meta"):
        trained = sum(p.numel() for p in qwen.new_language_model(shapes.new, vocab_size=32_000, seed=0).parameters())
    assert items["AdamW: mean and mean square"] == pytest.approx(8 * trained, rel=0.02)
    assert max(moments["the same with activation checkpointing"], moments["in the optimizer's step"]) < 7 * 2**30
    assert moments["between forward and backward"] > 8 * 2**30, "so activation checkpointing is needed"


def test_prints_the_table_and_takes_real_steps(capsys):
    try:
        assert memory.main(["--tiny", "--measure", "--checkpointing"]) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    printed = capsys.readouterr().out
    assert "| weights: routed experts |" in printed and "| **in the optimizer's step** |" in printed
    assert "5 steps of 2 x 2 x 48 tokens with activation checkpointing" in printed


def test_mistakes_are_one_message(tmp_path):
    with pytest.raises(InputError, match="no model.from_scratch"):
        memory.main(["--config", str(memory.ROOT / "config.yaml")])
    with pytest.raises(InputError, match="an option of --measure"):
        memory.main(["--checkpointing"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs a GPU, or --tiny"):
            memory.main(["--measure"])
