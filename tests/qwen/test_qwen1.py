"""Qwen v1 in the Qwen2 network equals the original code, and unsupported checkpoints are refused.

`fixtures/qwen1-tiny` is a tiny random checkpoint in the published layout. Its `golden.safetensors` was computed by Qwen's
own modeling_qwen.py in fp32 on a processor with AVX-512. There the logits are equal bit for bit. A processor with other
matrix kernels rounds differently (3e-6 with AVX2), so the tests allow ROUNDING; a wrong weight differs by more than 1.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import qwen
from config import InputError
from qwen.configuration import QWenConfig
from qwen.modeling import QWenModel
from tests.toy_language import WRITERS

TINY = Path(__file__).parent.parent / "fixtures" / "qwen1-tiny"
ROUNDING = 1e-5  # of logits up to 6.6


def assert_equal_to_rounding(found: torch.Tensor, golden: torch.Tensor) -> None:
    assert found.shape == golden.shape and (found - golden).abs().max() <= ROUNDING


@pytest.fixture(scope="module")
def golden():
    return load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return qwen.load_language_model(TINY)


def released_weights():
    return {name: tensor for shard in TINY.glob("model-*.safetensors") for name, tensor in load_file(shard).items()}


def copy_with(folder, **changes):
    """Copy the tiny checkpoint to `folder` with `changes` in its config.json (None removes a key)."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@torch.no_grad()
def test_logits_and_loss_equal_the_originals(model, golden):
    output = model(golden["input_ids"], attention_mask=golden["attention_mask"], labels=golden["labels"])
    assert_equal_to_rounding(output.logits, golden["logits"])
    assert_equal_to_rounding(output.loss, golden["loss"][0])


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["gate and up swapped", "key and value swapped"])
def test_a_wrong_weight_is_far_beyond_rounding(golden, wrong):
    model = qwen.load_language_model(TINY)
    for layer in model.model.layers:
        if wrong == "gate and up swapped":
            layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
        else:
            layer.self_attn.k_proj, layer.self_attn.v_proj = layer.self_attn.v_proj, layer.self_attn.k_proj
    logits = model(golden["input_ids"], attention_mask=golden["attention_mask"]).logits
    assert (logits - golden["logits"]).abs().max() > 1


@torch.no_grad()
def test_logits_without_a_mask_equal_the_originals(model, golden):
    assert_equal_to_rounding(model(golden["input_ids"][:1]).logits, golden["logits_nomask_row0"])


@torch.no_grad()
def test_left_padded_logits_equal_the_originals(model, golden):
    mask = golden["attention_mask_left"]
    logits = model(golden["input_ids_left"], attention_mask=mask).logits
    assert_equal_to_rounding(logits[mask.bool()], golden["logits_left"][mask.bool()])


def test_generated_ids_equal_the_originals(model, golden):
    ids, mask = golden["input_ids_left"], golden["attention_mask_left"]
    out = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(out[:, ids.shape[1] :], golden["generated"])


@torch.no_grad()
def test_auto_classes_load_a_v1_folder_without_remote_code(golden):
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert_equal_to_rounding(model(golden["input_ids"][:1]).logits, golden["logits_nomask_row0"])
    base = AutoModel.from_pretrained(TINY)
    assert isinstance(base, QWenModel)
    assert_equal_to_rounding(model.lm_head(base(golden["input_ids"][:1])[0]), golden["logits_nomask_row0"])


def test_a_saved_model_is_a_v1_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved, released = load_file(tmp_path / "model.safetensors"), released_weights()
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)

    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, TINY))
    renewed = {"auto_map", "transformers_version", "torch_dtype", "max_position_embeddings"}
    assert {key: config.get(key) for key in original if key not in renewed} == {
        key: value for key, value in original.items() if key not in renewed
    }
    assert "auto_map" not in config  # the code that it would name is not in this folder

    ids = torch.arange(20)[None]
    assert torch.equal(qwen.load_language_model(tmp_path)(ids).logits, model(ids).logits)


def test_a_saved_configuration_loads_unchanged(tmp_path):
    config = QWenConfig.from_pretrained(copy_with(tmp_path / "m", rotary_emb_base=1000000, layer_norm_epsilon=1e-5))
    assert config.rope_parameters["rope_theta"] == 1000000 and config.rms_norm_eps == 1e-5
    assert (config.max_position_embeddings, config.intermediate_size) == (2048, 128)
    config.save_pretrained(tmp_path / "saved")
    for again in (QWenConfig.from_pretrained(tmp_path / "saved"), QWenConfig.from_dict(config.to_dict())):
        assert (again.rope_parameters, again.rms_norm_eps) == (config.rope_parameters, config.rms_norm_eps)
        assert (again.max_position_embeddings, again.intermediate_size) == (2048, 128)


# Beyond the trained length


@torch.no_grad()
def test_input_longer_than_seq_length_is_refused(model, golden):
    ids = golden["long_input_ids"]
    with pytest.raises(InputError, match="2304 tokens, but seq_length is 2048"):
        model(ids)
    with pytest.raises(InputError, match="2304 tokens"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert model(ids[:, :2048], logits_to_keep=1).logits.isfinite().all()


@torch.no_grad()
def test_the_cache_counts_towards_seq_length(model, golden):
    ids = golden["long_input_ids"]
    cache = model(ids[:, :2047], logits_to_keep=1, use_cache=True).past_key_values
    cache = model(ids[:, 2047:2048], past_key_values=cache, use_cache=True).past_key_values
    with pytest.raises(InputError, match="2049 tokens"):
        model(ids[:, 2048:2049], past_key_values=cache, use_cache=True)


def test_generate_refuses_before_the_first_token(model):
    ids = torch.ones(1, 40, dtype=torch.long)
    with pytest.raises(InputError, match="40 prompt and 2009 new tokens.*seq_length is 2048"):
        model.generate(ids, max_new_tokens=2009)


@torch.no_grad()
def test_seq_length_applies_to_each_packed_document(tmp_path):
    model = qwen.load_language_model(copy_with(tmp_path / "m", seq_length=16))
    ids = torch.arange(30)[None]
    packed = torch.cat([torch.arange(16), torch.arange(14)])[None]
    logits = model(ids, position_ids=packed, use_cache=False).logits
    assert torch.allclose(logits[:, 16:], model(ids[:, 16:]).logits, atol=1e-5)
    with pytest.raises(InputError, match="17 tokens"):
        model(ids, position_ids=torch.cat([torch.arange(13), torch.arange(17)])[None], use_cache=False)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_bias": False}, "no_bias is False; only True"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5; only 1.0"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"kv_channels": 32}, "kv_channels 32 x num_attention_heads 4 is not hidden_size 64"),
        ({"seq_length": None, "rotary_emb_base": None}, "seq_length, rotary_emb_base missing"),
    ],
)
def test_a_v1_configuration_of_another_network_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        qwen.load_language_model(copy_with(tmp_path / "m", **changes))


@pytest.mark.parametrize("family", WRITERS)
def test_quantised_weights_are_refused_in_every_family(tmp_path, family):
    path = WRITERS[family](tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(InputError, match="quantization_config.*Use the unquantised release"):
        qwen.load_language_model(tmp_path)


@pytest.mark.parametrize("attention", ["flash_attention_2", "fast"])
def test_an_unavailable_attention_is_refused(attention):
    """The first needs a package and a GPU (ImportError in transformers), the second does not exist (ValueError)."""
    with pytest.raises(InputError, match="qwen1-tiny: cannot be loaded. .*[aA]ttention"):
        qwen.load_language_model(TINY, attn_implementation=attention)


def resave(folder, change):
    """Copy the tiny model to `folder`, with its weights after `change` in a single file."""
    copy_with(folder)
    for file in [*folder.glob("model-*"), folder / "model.safetensors.index.json"]:
        file.unlink()
    weights = released_weights()
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.h.1.mlp.w2.weight"), r"1 missing \(model.layers.1.mlp.gate_proj.weight\)"),
        (lambda w: w.pop("transformer.h.0.attn.c_attn.bias"), r"3 missing \(model.layers.0.self_attn.k_proj.bias,"),
        (lambda w: w.pop("lm_head.weight"), r"1 missing \(lm_head.weight\)"),
        (lambda w: w.update({"transformer.visual.proj": torch.ones(2)}), r"1 unexpected \(transformer.visual.proj\)"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(9, 64)}),
            r"1 of another shape \(lm_head.weight \(9, 64\) instead of \(512, 64\)\)",
        ),
    ],
)
def test_every_weight_is_accounted_for(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        qwen.load_language_model(resave(tmp_path / "m", change))


@torch.no_grad()
def test_constants_of_early_checkpoints_are_not_weights(tmp_path, golden):
    def change(weights):
        weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        weights["transformer.h.0.attn.rotary_emb.inv_freq"] = torch.ones(8)

    model = qwen.load_language_model(resave(tmp_path / "m", change))
    assert_equal_to_rounding(model(golden["input_ids"][:1]).logits, golden["logits_nomask_row0"])


def write_bin(folder, content):
    resave(folder, lambda weights: None)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def convert_as_advised(folder):
    with pytest.raises(InputError, match="never opened; in its folder") as refusal:
        qwen.load_language_model(folder)
    command = re.search(r'python -c "(.*)"$', str(refusal.value)).group(1)
    subprocess.run([sys.executable, "-c", command], cwd=folder, check=True)
    return qwen.load_language_model(folder)


@torch.no_grad()
def test_a_pickled_file_is_refused_with_the_command_that_converts_it(tmp_path, golden):
    model = convert_as_advised(write_bin(tmp_path / "good", released_weights()))
    assert_equal_to_rounding(model(golden["input_ids"][:1]).logits, golden["logits_nomask_row0"])


@torch.no_grad()
def test_the_command_converts_several_files_and_shared_tensors(tmp_path):
    folder = WRITERS["qwen2"](tmp_path)
    model = qwen.load_language_model(folder)
    weights = model.state_dict()
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    weights["model.norm.weight"] = weights["model.norm.weight"].repeat_interleave(2)[::2]  # not contiguous
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: weights[name] for name in part}, folder / f"pytorch_model-{number:05}-of-00002.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00002.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ids = torch.arange(20)[None]
    assert torch.equal(convert_as_advised(folder)(ids).logits, model(ids).logits)


def test_the_advice_for_a_hub_model_is_to_download_and_convert(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    advice = "instead of Qwen/Nothing: hf download Qwen/Nothing --local-dir Nothing && cd Nothing && python -c"
    with pytest.raises(InputError, match=advice):
        qwen.load_language_model("Qwen/Nothing")


def test_no_code_in_a_pickled_file_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    with pytest.raises(InputError, match="never opened"):
        qwen.load_language_model(write_bin(tmp_path / "bad", {"lm_head.weight": Payload()}))
    assert not (tmp_path / "executed").exists()


def test_paths_and_types_that_cannot_be_loaded_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="folder does not exist"):
        qwen.load_language_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json"):
        qwen.load_language_model(tmp_path)
    with pytest.raises(InputError, match='"qwen2_vl" is unknown; did you mean "qwen2"'):
        qwen.load_language_model(copy_with(tmp_path / "m", model_type="qwen2_vl"))
    with pytest.raises(InputError, match="Known: llama, qwen, qwen2, qwen2_moe, qwen3, qwen3_moe"):
        qwen.load_language_model(copy_with(tmp_path / "n", model_type="gemma"))
    (tmp_path / "no_weights").mkdir()
    shutil.copy(TINY / "config.json", tmp_path / "no_weights")
    with pytest.raises(InputError, match="cannot be read"):
        qwen.load_language_model(tmp_path / "no_weights")
    with (copy_with(tmp_path / "cut") / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="cannot be read"):
        qwen.load_language_model(tmp_path / "cut")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="Qwen/Nothing: cannot be read"):
        qwen.load_language_model("Qwen/Nothing")


def test_dtype_and_attention_are_as_requested(model):
    assert model.dtype == torch.float32 and not model.training
    other = qwen.load_language_model(TINY, dtype=torch.bfloat16, attn_implementation="eager")
    assert other.dtype == torch.bfloat16 and other.config._attn_implementation == "eager"


# Names for LoRA


def test_v1_lora_names_are_translated(model):
    def names(*written):
        return qwen.lora_target_modules(model, list(written))

    assert names("c_attn", "w1", "w2") == ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"]
    assert names("c_attn|w1 | w2") == names("c_attn", "w1", "w2")
    assert names("attn.c_proj") == ["o_proj"] and names("mlp.c_proj") == ["down_proj"]
    assert names("c_proj", "o_proj") == ["o_proj", "down_proj"]
    assert set(names("c_attn", "w1", "w2", "c_proj")) == set(names("all-linear"))
    assert qwen.lora_target_modules(model.config, ["v_proj"]) == ["v_proj"]


def test_unknown_lora_names_are_refused(tmp_path):
    modern = qwen.load_language_model(WRITERS["qwen2"](tmp_path))
    assert qwen.lora_target_modules(modern, ["q_proj", "down_proj"]) == ["q_proj", "down_proj"]
    with pytest.raises(InputError, match="c_attn.*Known: all-linear, down_proj, gate_proj"):
        qwen.lora_target_modules(modern, ["c_attn"])
    with pytest.raises(InputError, match='did you mean "q_proj"'):
        qwen.lora_target_modules(modern, ["q_porj"])


@pytest.mark.parametrize("family", WRITERS)
def test_all_linear_is_every_linear_of_a_decoder_layer(family, tmp_path):
    model = qwen.load_language_model(WRITERS[family](tmp_path))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = get_peft_model(model, LoraConfig(target_modules=qwen.lora_target_modules(model, ["all-linear"])))
    inside = {"self_attn"} if family.endswith("_moe") else {"self_attn", "mlp"}  # experts are not linear layers
    expected = {name for name in linears - {"lm_head"} if name.split(".")[3] in inside}
    assert set(adapted.targeted_module_names) == expected


@torch.no_grad()
def test_a_lora_adapter_on_v1_reloads(tmp_path):
    def adapted(model):
        return get_peft_model(model, LoraConfig(target_modules=qwen.lora_target_modules(model, ["c_attn", "w1"])))

    torch.manual_seed(0)
    trained = adapted(qwen.load_language_model(TINY))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    trained.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qwen.load_language_model(TINY), tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, trained.eval()(ids).logits)
    assert not torch.equal(again(ids).logits, qwen.load_language_model(TINY)(ids).logits)
