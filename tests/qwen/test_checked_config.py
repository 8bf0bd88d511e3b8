"""A config.json from a stranger: one message, before the model is built.

Run: python -m pytest tests/qwen/test_checked_config.py
"""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedModel

import qwen
from config import InputError
from qwen.checked_config import count_weights
from tests.toy_language import WRITERS, scratch_sizes
from tests.toy_project import SIZES

NO_TYPES = {"layer_types": None}  # a list with one entry per layer would contradict the number first

REFUSED = {
    "qwen2": [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number from 1"),
        ({"num_attention_heads": 5}, "hidden_size 64 cannot be divided into 5 heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide the 4 heads"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 15}, "cannot be used .*even rotary dimension"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": "x"}, "cannot be used .*hidden_size"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        (
            {"num_hidden_layers": 20_000, **NO_TYPES},
            "num_hidden_layers is 20000; expected a whole number from 1 to 512",
        ),
        ({"num_hidden_layers": 512, **NO_TYPES}, "describes 15,7.*weights, but .* files have .* bytes"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"vocab_size": 2**22}, "describes 268,.* weights"),
        ({"rope_parameters": {"rope_type": "nope"}}, "rope_type 'nope' is unknown"),
        ({"rope_scaling": {"type": "nope"}}, "rope_type 'nope' is unknown"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "cannot be used .*factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'; expected a number"),
        ({"hidden_act": "nope"}, "hidden_act 'nope' is unknown"),
        ({"dtype": "nope"}, "cannot be used .*nope"),
        ({"dtype": "int64"}, "dtype is torch.int64; expected float32"),
        ({"_attn_implementation": "some/kernel"}, "_attn_implementation is 'some/kernel', which names a kernel"),
        ({"_experts_implementation": "a/b@main"}, "_experts_implementation is 'a/b@main', which names a kernel"),
    ],
    "qwen3_moe": [
        ({"num_local_experts": 10**6}, "num_experts is 1000000"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok 9 is more than there are experts \(4\)"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"moe_intermediate_size": 2**19}, "describes 8.* weights"),
    ],
    "qwen": [
        ({"num_attention_heads": -4, "kv_channels": -16}, "num_attention_heads is -4"),
        ({"intermediate_size": 1}, "intermediate_size is 0"),
        ({"rotary_emb_base": "x"}, "rope_theta is 'x'"),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers is 20000"),
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: WRITERS[family](tmp_path_factory.mktemp(family)) for family in WRITERS}


@pytest.mark.parametrize(
    "family, changes, words", [(family, *case) for family, cases in REFUSED.items() for case in cases], ids=str
)
def test_a_strange_config_is_one_message_before_a_model_is_made(folders, monkeypatch, family, changes, words):
    path = folders[family] / "config.json"
    text = path.read_text()
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was made"))
    path.write_text(json.dumps(json.loads(text) | changes))
    try:
        with pytest.raises(InputError, match=words) as caught:
            qwen.load_language_model(folders[family])
    finally:
        path.write_text(text)
    assert (
        str(caught.value).startswith(f"language model {folders[family]}: config.json: ")
        and len(str(caught.value)) < 600
    )


@pytest.mark.parametrize("family", WRITERS)
def test_the_counted_weights_are_those_of_the_model(folders, family):
    """Without norms, biases and routers, and without a head that may be tied."""
    model = qwen.load_language_model(folders[family])
    routers = ("mlp.gate.weight", "shared_expert_gate.weight")
    matrices = {name: p for name, p in model.model.named_parameters() if p.ndim > 1 and not name.endswith(routers)}
    assert count_weights(model.config) == sum(parameter.numel() for parameter in matrices.values())


def test_a_new_model_of_20000_layers_is_refused_before_it_is_made():
    """Its sizes may be those of a stranger's checkpoint."""
    sizes = scratch_sizes(**SIZES | {"num_hidden_layers": 20_000})
    with pytest.raises(InputError, match="model.from_scratch: num_hidden_layers is 20000; expected a whole number"):
        qwen.new_language_model(sizes, vocab_size=300, seed=0)
