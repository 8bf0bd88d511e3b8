"""`python -m model.export`: what it refuses, the native format, and asking exported folders.

Run: python -m pytest tests/model/test_export_command.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import model
import model.export.__main__ as command
import test as asking
from config import DataConfig, InputError, LoraConfig, ModelConfig
from config.schema import SourceConfig, TrainableConfig, TrainConfig
from config.typed_yaml import FolderOrHub, Trainable
from model.checkpoint import TensorFiles
from model.checkpoint_folder import verify_folder, write_folder
from model.export import push as pushing
from model.export import stock
from model.export import weights as weights_module
from model.export.card import Story, model_card
from model.export.gguf_files import FileTensor, write_file
from model.export.llava import chat_template, refuse_inexpressible
from model.export.weights import Weight, folded_projector, write_weights
from model.projector import build_projector
from tests.toy_checkpoints import write_checkpoint, write_records
from tests.toy_language import WRITERS
from tests.toy_towers import write_clip, write_dinov2_registers, write_dinov3, write_siglip

LANGUAGE_MODELS = {name: WRITERS[name] for name in ("qwen", "qwen2", "qwen3_moe")}
TOWERS = {"clip": write_clip, "siglip": write_siglip, "registers": write_dinov2_registers, "dinov3": write_dinov3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for name, write in {**TOWERS, **LANGUAGE_MODELS}.items():
        write(folder / name)
    write_records(folder)
    return folder


def settings(parts: Path, tower: str = "clip", lm: str = "qwen2", **values) -> ModelConfig:
    return ModelConfig(FolderOrHub(parts / tower), FolderOrHub(parts / lm), **values)


@pytest.mark.parametrize(
    "values, reason, instead",
    [
        ({"tower": "registers"}, "has registers as well", "DINOv2 .without registers."),
        ({"tower": "dinov3"}, "has registers as well", "CLIP, SigLIP"),
        ({"attention": "mixed"}, "stock LLaVA is causal", "model.attention causal"),
        ({"lm": "qwen3_moe"}, "a mixture of experts", "a dense Qwen or Llama"),
        ({"projector": "pixel_shuffle"}, "one image token for every patch", "model.projector mlp"),
        ({"projector": "resampler"}, "one image token for every patch", "model.projector mlp"),
        ({"projector": "low_rank_mlp"}, "as wide as the language model, 64", "model.projector mlp"),
        (
            {"projector_hidden_size": 65},
            "middle width of 65 cannot .*: stock LLaVA's is as wide",
            "projector_hidden_size null",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_stock_llava_cannot_compute_is_refused_with_the_reason(parts, values, reason, instead):
    with pytest.raises(InputError, match=rf"{reason}.*Train .*{instead}.* instead.*--format native"):
        refuse_inexpressible(settings(parts, **values))
    refuse_inexpressible(settings(parts))
    refuse_inexpressible(settings(parts, projector="low_rank_mlp", projector_hidden_size=64))


def test_a_convolutional_encoder_is_refused(tmp_path, parts):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(InputError, match="resnet.*hidden states of a vision transformer.*CLIP, SigLIP"):
        refuse_inexpressible(ModelConfig(FolderOrHub(tmp_path), FolderOrHub(parts / "qwen2")))


def answers_of(checkpoint: Path, parts: Path, output: Path) -> list[str]:
    """Return the answers of test.py to two questions about three images."""
    words = ["--checkpoint", str(checkpoint), "--images", str(parts / "images"), "--output", str(output)]
    assert asking.main([*words, "--question", "What colour is it?", "--question", "这是什么颜色？"]) == 0
    return [json.loads(line)["answer"] for line in (output / "answers.jsonl").read_text().splitlines()]


ALL = TrainConfig(
    trainable=TrainableConfig(vision_tower=Trainable("full"), embeddings=Trainable("full")),
    projector_lr=1e-3,
    lora_lr=1e-3,
    embeddings_lr=1e-3,
    vision_tower_lr=1e-3,
    precision="fp32",
)
NATIVE = {
    "v1": ("clip", "qwen", {}),
    "trained encoder and embeddings": ("siglip", "qwen2", {"train": ALL, "projector": "pixel_shuffle"}),
    "registers, experts, mixed": (
        "registers",
        "qwen3_moe",
        {"attention": "mixed", "projector": "resampler", "lora": LoraConfig(target_modules=("o_proj",))},
    ),
}


@pytest.mark.parametrize("case", NATIVE)
def test_a_native_export_needs_nothing_else(parts, tmp_path, case, capsys):
    """It answers as the checkpoint does, also when it has been moved and the parts are gone."""
    tower, lm, values = NATIVE[case]
    for name in (tower, lm):
        shutil.copytree(parts / name, tmp_path / "parts" / name)
    write_checkpoint(tmp_path / "run", tmp_path / "parts" / tower, tmp_path / "parts" / lm, **values)
    checkpoint, output = tmp_path / "run" / "final", tmp_path / "exported"
    expected = answers_of(checkpoint, parts, tmp_path / "a")
    words = ["--checkpoint", str(checkpoint), "--output", str(output), "--format", "native", "--dtype", "fp32"]
    assert command.main(words) == 0
    proof = json.loads((output / "proof.json").read_text())
    assert proof["faults"] == [] and proof["logits_apart"] <= (1e-6 if lm == "qwen3_moe" else 0.0)
    assert proof["samples"] > 5 and (proof["logits_identical"] == proof["samples"] or lm == "qwen3_moe")
    assert "drawn image" in proof["kinds"]  # the run's data is not on this machine
    shutil.rmtree(tmp_path / "parts")
    shutil.rmtree(tmp_path / "run")
    output.rename(tmp_path / "moved")
    verify_folder(tmp_path / "moved")
    assert answers_of(tmp_path / "moved", parts, tmp_path / "b") == expected
    loaded = model.load(tmp_path / "moved")
    assert loaded.answer("What colour is it?", [parts / "images" / "0.png"]) == expected[0]
    assert isinstance(loaded.answer("这是什么颜色？"), str)
    assert not [name for name in (tmp_path / "moved").rglob("*.py")]
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "moved").glob("*.[jym]*"))


def compare_here(jobs):
    """Stand in for the process of stock transformers, whose start takes ten seconds."""
    for job in jobs:
        (job / "result.json").write_text(json.dumps(stock.compare(job)))


@pytest.fixture(scope="module")
def final(parts) -> Path:
    """A checkpoint."""
    write_checkpoint(parts / "run", parts / "clip", parts / "qwen")
    return parts / "run" / "final"


@pytest.fixture(scope="module")
def exported(final, tmp_path_factory) -> Path:
    """A LLaVA export of `final`, as the command writes it."""
    output = tmp_path_factory.mktemp("out") / "new" / "llava"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_stock", compare_here)
        assert command.main(["--checkpoint", str(final), "--output", str(output), "--dtype", "fp32"]) == 0
    return output


def test_test_py_asks_an_exported_folder(parts, final, exported, tmp_path):
    expected = answers_of(final, parts, tmp_path / "a")
    assert answers_of(exported, parts, tmp_path / "b") == expected
    assert model.load(exported).answer("What colour is it?", [parts / "images" / "0.png"]) == expected[0]
    assert model.load(exported).built.max_tokens == 512  # v1 fails beyond seq_length
    scored = ["--qa", str(parts / "validation.jsonl"), "--output"]
    for folder, name in ((final, "c"), (exported, "d")):
        assert asking.main(["--checkpoint", str(folder), *scored, str(tmp_path / name)]) == 0
    ours, theirs = (json.loads((tmp_path / name / "scores.json").read_text()) for name in "cd")
    assert ours["accuracy"] == theirs["accuracy"] and abs(ours["loss"] - theirs["loss"]) < 1e-5
    with pytest.raises(InputError, match="is an export already"):
        command.main(["--checkpoint", str(exported), "--output", str(tmp_path / "again")])


def test_the_folder_is_complete_and_names_no_path_of_this_machine(exported, tmp_path):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "config.yaml", "export.json", "generation_config.json",
        "manifest.json", "model.safetensors", "preprocessor_config.json", "processor_config.json", "proof.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for path in exported.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        if path.suffix != ".safetensors":
            assert "/tmp" not in path.read_text() and str(tmp_path) not in path.read_text(), path
    card = (exported / "README.md").read_text()
    assert "library_name: transformers" in card and "logits of" in card and "qwen (licence" in card


def test_a_card_tells_data_recipe_scores_and_licences(tmp_path):
    """In words, and in the front matter that the hub reads."""
    for name, licence in (("clip", "mit"), ("qwen", "apache-2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    colour = {"n": 4, "accuracy": 0.75, "blind": 0.25}
    scores = {"n": 8, "accuracy": 0.875, "blind": 0.5, "by_type": {"colour": colour}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    sources = [
        SourceConfig(name, tmp_path / "x.json", split=split)
        for name, split in (("scenes", "train"), ("more", "auto"), ("held", "validation"))
    ]
    data = DataConfig(tmp_path / "qa.jsonl", sources=tuple(sources))
    train = TrainConfig(
        projector_lr=0.001, lora_lr=0.0002, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    story = Story(settings(tmp_path, lm="qwen"), data, train, lora=LoraConfig(r=8, alpha=16.0), checkpoint=tmp_path)
    proof = {**FAILED, "dtype": "bf16", "answers_equal": {"single": 1}}

    def card() -> str:
        return model_card(story, format_name="llava", dtype="bf16", proof=proof)

    assert "Recipe" not in card()  # an imported checkpoint
    (tmp_path / "run.json").write_text(json.dumps([{"machine": {"processes": 1}}, {"machine": {"processes": 3}}]))
    text = card()
    for line in (
        "- Image encoder: clip (licence: mit)",
        "- Language model: qwen (licence: apache-2.0)",
        "- Recipe: 1 epochs of batches of 24; projector_lr 0.001, lora_lr 0.0002; weight_decay 0",
        "- Data: scenes, more",
        "- Held out: held",
        "| all | 8 | 0.875 | 0.500 |",
        "| colour | 4 | 0.750 | 0.250 |",
        "3. Greedy answers equal, of 1: single 1.",
    ):
        assert f"\n{line}\n" in text, line
    assert "LoRA r 8 alpha 16" in text and "AutoModelForImageTextToText.from_pretrained" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text" and front["language"] == ["en", "zh"]
    (results,) = front["model-index"][0]["results"]
    assert [metric["value"] for metric in results["metrics"]] == [0.875, 0.5]
    hub = dataclasses.replace(story.model, language_model=FolderOrHub("Qwen/Qwen3-0.6B"))
    text = model_card(dataclasses.replace(story, model=hub), format_name="native", dtype="bf16", proof=proof)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == ["Qwen/Qwen3-0.6B"]


def check_keys(exported: Path) -> None:
    """Check the keys that transformers 5 does without: transformers 4, llama.cpp's converter, mlx, vLLM and Ollama read
    them, so no proof here finds one that is missing."""
    config = json.loads((exported / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert config == {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 423,
        "image_seq_length": 16,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    assert text["architectures"] == ["Qwen2ForCausalLM"] and text["model_type"] == "qwen2"
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000
    assert text["dtype"] == text["torch_dtype"] == vision["dtype"] == vision["torch_dtype"] == "float32"
    assert text["max_position_embeddings"] == 512  # v1's seq_length
    assert not text.keys() & {"image_attention", "image_token_id", "use_logn_attn", "seq_length", "kv_channels"}
    assert vision["model_type"] == "clip_vision_model" and "_name_or_path" not in vision
    assert "<|im_end|>" in tokenizer["additional_special_tokens"]
    assert tokenizer["padding_side"] == "left" and tokenizer["processor_class"] == "LlavaProcessor"
    assert tokenizer["chat_template"] == (exported / "chat_template.jinja").read_text()
    assert not tokenizer.keys() & {"extra_special_tokens", "is_local", "local_files_only", "backend"}
    processor = json.loads((exported / "processor_config.json").read_text())
    assert processor["processor_class"] == "LlavaProcessor" and processor["image_token"] == "<|extra_0|>"
    images = json.loads((exported / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "CLIPImageProcessor"
    names = load_file(exported / "model.safetensors").keys()
    prefixes = {".".join(name.split(".")[:2]) for name in names}
    assert prefixes == {
        "language_model.model", "language_model.lm_head", "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2", "vision_tower.vision_model",
    }  # fmt: skip


def test_keys_for_other_tools(exported):
    check_keys(exported)


# what is changed in an exported folder, one key at a time: (file, path of the key, its value; None: the key is removed)
OTHER_KEYS: list[tuple[str, tuple[str, ...], Any]] = [
    ("config.json", ("architectures",), None),
    ("config.json", ("image_seq_length",), 15),
    ("config.json", ("text_config", "architectures"), None),
    ("config.json", ("text_config", "model_type"), "qwen"),
    ("config.json", ("text_config", "rope_theta"), None),
    ("config.json", ("text_config", "max_position_embeddings"), 8192),
    ("config.json", ("text_config", "image_token_id"), 423),
    ("config.json", ("text_config", "seq_length"), 512),
    ("config.json", ("vision_config", "model_type"), "clip"),
    ("config.json", ("vision_config", "_name_or_path"), "clip"),
    ("tokenizer_config.json", ("additional_special_tokens",), []),
    ("tokenizer_config.json", ("extra_special_tokens",), ["<|im_end|>"]),
    ("tokenizer_config.json", ("chat_template",), "another"),
    ("tokenizer_config.json", ("padding_side",), "right"),
    ("tokenizer_config.json", ("processor_class",), None),
    ("tokenizer_config.json", ("is_local",), True),
    ("tokenizer_config.json", ("local_files_only",), False),
    ("tokenizer_config.json", ("backend",), "tokenizers"),
    ("processor_config.json", ("processor_class",), None),
    ("preprocessor_config.json", ("image_processor_type",), "CLIPImageProcessorPil"),
]


@pytest.mark.parametrize(
    "file, keys, value", OTHER_KEYS, ids=lambda value: ".".join(value) if type(value) is tuple else ""
)
def test_a_changed_key_for_other_tools_is_found(exported, tmp_path, file, keys, value):
    for path in exported.iterdir():
        (tmp_path / path.name).symlink_to(path)
    values = json.loads((exported / file).read_text())
    inner = values[keys[0]] if len(keys) == 2 else values
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises((AssertionError, KeyError)):
        check_keys(tmp_path)


def test_a_failed_proof_leaves_no_folder_and_a_foreign_one_is_kept(parts, final, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_stock", compare_here)
    output = tmp_path / "old"
    shutil.copytree(exported, output)
    before, words = (output / "export.json").read_bytes(), ["--samples", "1", "--checkpoint", str(final), "--output"]
    correct = command.write_llava

    def damaged(folder, *parts, **values):
        correct(folder, *parts, **values)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -1}))

    monkeypatch.setattr(command, "write_llava", damaged)
    for name in ("old", "new"):
        with pytest.raises(InputError, match="not exported: .*proof 1: the logits of"):
            command.main([*words, str(tmp_path / name), "--dtype", "fp32"])
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (output / "export.json").read_bytes() == before
    for foreign in (final, parts):
        with pytest.raises(InputError, match="was not written by an export"):
            command.main([*words, str(foreign)])
    monkeypatch.setattr(command, "write_llava", correct)
    (tmp_path / "empty").mkdir()
    assert command.main([*words, str(tmp_path / "empty")]) == 0
    assert command.main([*words, str(output), "--dtype", "fp16"]) == 0
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.float16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old"]


class Hub:
    """Stands in for the hub's client and records what it is asked for."""

    calls: list = []
    fails = False

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))
        return RepoUrl(f"https://huggingface.co/me/{name}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.fails:
            raise OSError("no route to host")
        self.calls.append(("upload_folder", repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_push_uploads_the_folder_after_the_proof(final, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pushing, "HfApi", Hub)
    monkeypatch.setattr(pushing, "get_token", lambda: "hf_x")
    words = ["--checkpoint", str(final), "--output", str(tmp_path / "out"), "--format", "native", "--samples", "1"]
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(InputError, match="exported and proven, but not uploaded to toy .no route.*hf upload toy"):
        command.main([*words, "--push", "toy"])
    assert (tmp_path / "out" / "proof.json").exists()
    monkeypatch.setattr(Hub, "fails", False)
    Hub.calls.clear()
    assert command.main([*words, "--push", "toy"]) == 0
    create, upload = Hub.calls
    assert create == ("create_repo", "toy", {"private": True, "exist_ok": True})
    assert upload[:2] == ("upload_folder", "me/toy") and {"README.md", "proof.json", "manifest.json"} <= set(upload[2])
    assert "uploaded to https://huggingface.co/me/toy" in capsys.readouterr().out
    Hub.calls.clear()
    monkeypatch.setattr(command, "prove_native", lambda *a, **k: {**FAILED, "faults": ["proof 1: other logits"]})
    with pytest.raises(InputError, match="proof 1: other logits"):
        command.main([*words, "--push", "toy"])
    assert Hub.calls == []


FAILED = {
    "samples": 1,
    "kinds": {},
    "answers_equal": {},
    "logits_identical": 0,
    "logits_apart": 1.0,
    "merged_apart": 0.0,
}


def test_push_needs_a_name_and_a_login_before_anything_is_written(final, tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    words = ["--checkpoint", str(final), "--output", str(tmp_path / "out"), "--push"]
    with pytest.raises(InputError, match="not logged in to the Hugging Face hub; run `hf auth login`"):
        command.main([*words, "me/toy"])
    with pytest.raises(InputError, match="--push 'a/b/c': .*give a name such as user/my-model"):
        command.main([*words, "a/b/c"])
    assert not (tmp_path / "out").exists()


def test_weights_are_written_file_by_file(tmp_path, monkeypatch):
    """No tensor of an earlier file is alive when one of the next file is read."""
    alive: list[weakref.ref] = []
    most = 0

    def read():
        nonlocal most
        most = max(most, sum(found() is not None for found in alive))
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    correct = weights_module.save_file

    def save(tensors, *arguments, **options):
        alive.extend(map(weakref.ref, tensors.values()))
        return correct(tensors, *arguments, **options)

    monkeypatch.setattr(weights_module, "save_file", save)
    weights = [Weight(f"w{i}", (1000,), read) for i in range(20)]
    write_weights(weights, tmp_path, torch.float32, shard_bytes=8000)
    assert most == 0 and len(list(tmp_path.glob("model-*-of-00010.safetensors"))) == 10
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"] == {"total_size": 80000} and index["weight_map"]["w19"] == "model-00010-of-00010.safetensors"
    )
    with pytest.raises(InputError, match="big: holds a value that float16 cannot represent.*bf16 or fp32"):
        write_weights([Weight("big", (1,), lambda: torch.tensor([1e6]))], tmp_path, torch.float16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_writing_needs_one_file_and_one_tensor(tmp_path, kind):
    """The peak of resident memory, files that are mapped included."""
    count, rows = 24, 1024  # tensors of 4 MB
    save_file({f"w{i}": torch.full((rows, 1024), float(i)) for i in range(count)}, tmp_path / "model.safetensors")
    files = TensorFiles([tmp_path / "model.safetensors"])
    weights = [Weight(name, (rows, 1024), lambda name=name: files.read(name)) for name in files.names()]
    before = peak_megabytes(reset=True)
    if kind == "safetensors":
        write_weights(weights, tmp_path, torch.float32, shard_bytes=16 * 2**20)
    else:
        pytest.importorskip("gguf", reason="requirements-gguf.txt is not installed")
        tensors = [FileTensor(weight.name, weight, "Q8_0") for weight in weights]
        write_file(tmp_path / "x.gguf", "qwen2", [("add_block_count", 1)], tensors=tensors, kind="Q8_0")
    assert peak_megabytes() - before < 60  # of 96


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_writing_a_large_tensor_needs_it_twice(tmp_path):
    """As it is read and as it is written; the check for infinity needs no third."""
    size = (8192, 4096)  # 64 MB
    save_file({"w": torch.zeros(size, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    files = TensorFiles([tmp_path / "model.safetensors"])
    (tmp_path / "out").mkdir()
    before = peak_megabytes(reset=True)
    write_weights([Weight("w", size, lambda: files.read("w"))], tmp_path / "out", torch.bfloat16)
    assert peak_megabytes() - before < 150


def peak_megabytes(reset: bool = False) -> float:
    """Return the largest resident memory of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_keeps_the_projector_and_a_large_mean_costs_nothing(dtype):
    torch.manual_seed(0)
    projector = build_projector("mlp", in_features=32, hidden_size=None, out_features=48)
    projector.feature_mean.normal_(std=30.0)  # a hundred times the deviation, as in a few dimensions of CLIP
    projector.feature_std.uniform_(0.1, 0.5)
    projector.output_scale.fill_(0.3)
    features = projector.feature_mean + projector.feature_std * torch.randn(64, 1, 32)
    tensors = folded_projector(projector.state_dict(), dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    mean, bias = projector.feature_mean.double(), projector.linear_1.bias.double()
    bias = (
        bias - weights["linear_1.weight"] @ mean
    )  # with the rounded weight, so that rounding does not act on the mean
    assert torch.equal(tensors["linear_1.bias"], bias.to(dtype))
    hidden = torch.nn.functional.gelu(features.double() @ weights["linear_1.weight"].T + bias)
    found = hidden @ weights["linear_2.weight"].T + weights["linear_2.bias"]
    expected = projector.double()(features.double())
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 5e-3)


def test_the_template_is_valid_for_any_system_prompt():
    for prompt in ('a "quoted" \\n {{ x }} {% if %}', "多行\n提示 😀", "{# no comment #}"):
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            chat_template("<i>", prompt)
        )
        text = made.render(messages=[{"role": "user", "content": "x"}], add_generation_prompt=True)
        assert text == (
            f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        )


def test_transformers_does_not_open_a_checkpoint_as_its_base_model(final):
    """It would load the language model alone, which sees no image; the message says what to do instead."""
    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match=r"open it with model.load\(folder\).*python -m model.export"):
            kind.from_pretrained(final)
    adapter = json.loads((final / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "qwen"  # no path of this machine


def test_loading_lists_every_missing_and_unexpected_tensor(final, tmp_path):
    def change(folder):
        shutil.copytree(final, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        tensors = load_file(folder / "projector.safetensors")
        save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, folder / "projector.safetensors")

    write_folder(tmp_path / "changed", change)
    with pytest.raises(InputError) as raised:
        model.load(tmp_path / "changed")
    assert all(f"other.linear_{i}.{kind}" in str(raised.value) for i in (1, 2) for kind in ("weight", "bias"))
