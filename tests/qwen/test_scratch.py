"""A language model from scratch: sizes, first weights, tokenizer and checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import qwen
import test
from config import InputError, load_config
from dataset import show
from model.checkpoint_folder import write_folder
from tests.runs.test_training import assert_equal_files, rows
from tests.toy_language import SENTENCES, scratch_sizes, write_qwen2, write_qwen3
from tests.toy_project import SIZES, run_training, write_staged_project, write_yaml
from training.run import open_model, open_processors

DENSE = {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
DENSE |= {"intermediate_size": 72}
ROUTED = {key: value for key, value in SIZES.items() if key != "shared_expert_intermediate_size"}
ARCHITECTURES = {
    "qwen2": DENSE | {"architecture": "qwen2"},
    "qwen3": DENSE | {"architecture": "qwen3"},
    "qwen2_moe": SIZES,
    "qwen3_moe": ROUTED | {"architecture": "qwen3_moe"},
}


def new_model(seed: int = 0, **sizes):
    return qwen.new_language_model(scratch_sizes(**sizes), vocab_size=300, seed=seed)


# --- the model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_model_has_the_requested_sizes(architecture):
    model = new_model(num_key_value_heads=2, **ARCHITECTURES[architecture])
    config, layer = model.config, model.model.layers[0]
    assert type(model) is qwen.LANGUAGE_MODELS[architecture] and model.dtype == torch.float32
    assert (config.vocab_size, config.hidden_size, len(model.model.layers)) == (320, 32, 2)
    assert layer.self_attn.q_proj.weight.shape == (32, 32) and layer.self_attn.k_proj.weight.shape == (16, 32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    if "moe" in architecture:
        assert layer.mlp.experts.gate_up_proj.shape == (4, 48, 32) and layer.mlp.experts.down_proj.shape == (4, 32, 24)
        assert layer.mlp.gate.weight.shape == (4, 32) and layer.mlp.gate.top_k == 2 and layer.mlp.gate.norm_topk_prob
        assert hasattr(layer.mlp, "shared_expert") == (architecture == "qwen2_moe")
    else:
        assert layer.mlp.gate_proj.weight.shape == (72, 32)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.25), name
    untied = new_model(tie_word_embeddings=False, **ARCHITECTURES[architecture])
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_dense_and_routed_models_have_equal_active_parameters():
    """The two models of the ablation: two routed experts of 24 and a shared one of 24, or a dense feed-forward of 72."""
    dense, experts = (new_model(**ARCHITECTURES[name]) for name in ("qwen2", "qwen2_moe"))

    def active(model) -> int:
        mlp = model.model.layers[0].mlp
        if not hasattr(mlp, "experts"):
            return sum(p.numel() for p in mlp.parameters())
        of_one = sum(p[0].numel() for p in mlp.experts.parameters())
        return 2 * of_one + sum(p.numel() for p in mlp.shared_expert.parameters())

    assert active(dense) == active(experts)


def test_the_first_weights_depend_on_the_seed_only():
    state = torch.get_rng_state()
    one = new_model(seed=3, **SIZES).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = (new_model(seed=seed, **SIZES).state_dict() for seed in (3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    one = new_model(**SIZES | {"num_experts_per_tok": 1})
    assert not one.model.layers[0].mlp.gate.norm_topk_prob, "a single expert's weight would always be 1"
    with pytest.raises(InputError, match='architecture: "qwen4" is unknown'):
        new_model(**SIZES | {"architecture": "qwen4"})


# --- in a run


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with the settings of one stage, on images."""
    path = write_staged_project(tmp_path_factory.mktemp("project"))
    values = yaml.safe_load(path.read_text())
    stage = values["train"].pop("stages")[1]
    values["data"] |= stage["data"]
    write_yaml(path, values)
    return path


@pytest.fixture(scope="module")
def whole(project):
    run_training(project, "train.save_total_limit=null")
    return project.parent / "run"


def test_the_model_is_equal_at_every_precision(project, whole):
    """First weights and RoPE's frequencies are float32, so a model trained in half precision can be read in any."""
    config = load_config(project)
    made = [
        open_model(config, precision, open_processors(config)).model.causal_lm for precision in ("fp32", "bf16", "fp16")
    ]
    tensors = [[*model.parameters(), *model.buffers()] for model in made]
    for other in tensors[1:]:
        for of_one, of_other in zip(tensors[0], other, strict=True):
            assert of_other.dtype == torch.float32 and torch.equal(of_one, of_other)


def test_a_start_folder_without_a_model_is_refused_by_name(project, tmp_path):
    for folder, start in ((tmp_path / "nope", '"model.start_from": '), (tmp_path, "")):
        with pytest.raises(InputError, match=f"^{start}{re.escape(str(folder))}") as caught:
            run_training(project, f"output_dir={tmp_path / 'run'}", f"model.start_from={folder}")
        assert "vocab_size" not in str(caught.value)


def test_a_vocabulary_with_gaps_gets_embeddings_up_to_its_highest_id(project, whole, tmp_path):
    config = load_config(project)
    shutil.copytree(config.model.from_scratch.tokenizer, tmp_path / "gaps")
    path = tmp_path / "gaps" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 700
    path.write_text(json.dumps(values))
    config = load_config(
        project, [f"model.from_scratch.tokenizer={tmp_path / 'gaps'}", "model.from_scratch.vocab_size=null"]
    )
    assert open_model(config, "fp32", open_processors(config)).model.causal_lm.config.vocab_size == 704


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_moe"])
def test_every_architecture_trains_and_answers(project, tmp_path, architecture):
    none = dict.fromkeys(("intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    sizes = none | {"shared_expert_intermediate_size": None} | ARCHITECTURES[architecture]
    words = [f"model.from_scratch.{key}={'null' if value is None else value}" for key, value in sizes.items()]
    factor = "0.01" if "moe" in architecture else "null"
    run_training(project, f"output_dir={tmp_path / 'run'}", *words, f"train.router_aux_loss_coef={factor}")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]
    image = str(project.parent / "images" / "0.png")
    assert test.main(["--checkpoint", str(tmp_path / "run" / "final"), "--images", image, "--question", "What?"]) == 0


def test_an_interrupted_run_from_scratch_ends_the_same(project, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    run_training(project, f"output_dir={tmp_path}", "train.save_total_limit=null")
    files = ("language_model.safetensors", "projector.safetensors")
    assert_equal_files(tmp_path / "final", whole / "final", files)
    assert_equal_files(tmp_path / "checkpoint-4", whole / "checkpoint-4", ["state.safetensors"])


def test_a_checkpoint_contains_the_whole_language_model(project, whole):
    config = load_config(whole / "final" / "config.yaml")
    built = open_model(config, "fp32", open_processors(config, whole / "final"), whole / "final")
    saved = load_file(whole / "final" / "language_model.safetensors")
    assert saved.keys() == {name for name, _ in built.model.causal_lm.named_parameters()}
    for name, parameter in built.model.causal_lm.named_parameters():
        assert torch.equal(parameter, saved[name]), name


def changed_folder(folder: Path, target: Path, change) -> Path:
    """Copy a model's folder, with `change` applied to language_model.safetensors and a manifest that matches it."""

    def write(partial: Path) -> None:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / "manifest.json").unlink()
        path = partial / "language_model.safetensors"
        tensors = change(load_file(path))
        path.unlink()
        if tensors is not None:
            save_file(tensors, path)

    write_folder(target, write)
    return target


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: None, "the config makes its own language model"),
        (lambda tensors: {**tensors, "x": torch.zeros(2)}, "unknown to this model: x"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "model.norm.weight"}, "missing: model.norm.weight"),
        (lambda tensors: {**tensors, "model.norm.weight": torch.zeros(3)}, "of another shape: model.norm.weight"),
    ],
    ids=["absent", "unknown", "missing", "shape"],
)
def test_a_checkpoint_without_the_whole_model_is_refused(whole, tmp_path, change, words):
    folder = changed_folder(whole / "final", tmp_path / "final", change)
    config = load_config(whole / "final" / "config.yaml")  # its paths are relative to it
    with pytest.raises(InputError, match=words):
        open_model(config, "fp32", open_processors(config, folder), folder)


def test_a_huge_size_in_a_checkpoints_config_is_refused_without_allocating(whole, monkeypatch):
    """Shapes are compared before weights are allocated: a model of 0.5 TB is refused at once."""
    made = []
    new = qwen.new_language_model
    monkeypatch.setattr(
        qwen, "new_language_model",
        lambda *args, **kwargs: (model := new(*args, **kwargs), made.append(model.device.type))[0],
    )  # fmt: skip
    words = ["model.from_scratch.hidden_size=16384", "model.from_scratch.moe_intermediate_size=131072"]
    config = load_config(whole / "final" / "config.yaml", words)
    with pytest.raises(InputError, match="of another shape"):
        open_model(config, "fp32", open_processors(config, whole / "final"), whole / "final")
    assert made == ["meta"]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.language_model=lm"], ["model.from_scratch", "set one of the two to null"]),
        (["model.from_scratch=null"], ["model.language_model", "missing"]),
        (["model.from_scratch.num_experts=null"], ["num_experts", "missing"]),
        (["model.from_scratch.intermediate_size=64"], ["intermediate_size", "no such size"]),
        (["model.from_scratch.num_experts_per_tok=5"], ["more than there are experts"]),
        (["model.from_scratch.hidden_size=36"], ["multiple of 8"]),
        (["model.from_scratch.num_key_value_heads=3"], ["does not divide"]),
        (["model.from_scratch.hidden_sizes=36"], ['did you mean "model.from_scratch.hidden_size"']),
        (["model.from_scratch.vocab_size=100"], ["at least|between"]),
        (["model.from_scratch.tokenizer=some/name"], ["looks like a hub name", "./some/name"]),
        (["model.attention=mixed", "train.attn_implementation=flash_attention_2"], ["flash_attention_2", "mixed"]),
        (["model.attention=both"], ["causal, mixed"]),
        (
            ["model.from_scratch.architecture=qwen2", "model.from_scratch.intermediate_size=64"]
            + [f"model.from_scratch.{key}=null" for key in ROUTED if "expert" in key or key.startswith("moe")]
            + ["model.from_scratch.shared_expert_intermediate_size=null"],
            ["router_aux_loss_coef.* is 0.01", "no experts to balance"],
        ),
    ],
    ids=str,
)
def test_contradictory_sizes_are_refused_by_name(project, overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_config(project, overrides)
    assert [word for word in words if not re.search(word, str(caught.value))] == [], str(caught.value)


def test_steps_per_epoch_is_an_upper_bound(project, tmp_path):
    """Nine records, two per step: five steps per epoch. The bound is two steps, or more than five."""
    words = ["train.max_steps=null", "train.num_train_epochs=3", "train.gradient_accumulation_steps=1"]
    for bound, steps in (("2", 6), ("100", 14)):
        folder = tmp_path / bound
        run_training(project, f"output_dir={folder}", *words, f"train.steps_per_epoch={bound}", "train.eval_steps=null")
        assert [row["step"] for row in rows(folder) if "loss" in row][-1] == steps


# --- any tokenizer


def gpt2_like(folder: Path) -> None:
    """Like GPT-2's: a byte-level BPE without chat tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    _save(tokenizer, folder, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def llama_like(folder: Path) -> None:
    """Like LLaVA-1.5's: a BPE over characters with byte fallback, and spaces written as "▁"."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {token: index for index, token in enumerate([*list(model["vocab"]), *bytes_, "▁"])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _save(tokenizer, folder, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def bert_like(folder: Path) -> None:
    """Like bert-base-chinese's: a lower-case WordPiece, for which not every text decodes to itself."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[PAD]"])
    )
    _save(tokenizer, folder, {"unk_token": "[UNK]", "pad_token": "[PAD]"})


def _save(tokenizer: Tokenizer, folder: Path, settings: dict) -> None:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


KINDS = {"gpt2": gpt2_like, "llama": llama_like, "bert": bert_like, "qwen2": write_qwen2, "qwen3": write_qwen3}


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizer_folder_can_be_used(project, tmp_path, kind):
    KINDS[kind](tmp_path / "tokenizer")
    words = [f"model.from_scratch.tokenizer={tmp_path / 'tokenizer'}", "model.from_scratch.vocab_size=null"]
    run_training(project, f"output_dir={tmp_path / 'run'}", *words, "train.max_steps=2", "train.eval_steps=null")
    tokenizer = qwen.load_tokenizer(str(tmp_path / "run" / "final" / "tokenizer"), any_kind=True)
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", qwen.image_token(tokenizer)]
    ids = tokenizer.convert_tokens_to_ids(special)
    assert len(set(ids)) == 4 and tokenizer.convert_ids_to_tokens(ids) == special
    rows_of_embeddings = load_file(tmp_path / "run" / "final" / "language_model.safetensors")[
        "model.embed_tokens.weight"
    ]
    assert len(tokenizer) <= len(rows_of_embeddings) < len(tokenizer) + 64
    for text in ("<|im_end|>", "a <|im_start|>user b"):  # text never becomes a special token
        assert set(ids).isdisjoint(qwen.encode_text(tokenizer, text))
    if kind != "bert":
        assert tokenizer.decode(qwen.encode_text(tokenizer, "What is in the picture?")) == "What is in the picture?"
    image = str(project.parent / "images" / "0.png")
    assert test.main(["--checkpoint", str(tmp_path / "run" / "final"), "--images", image, "--question", "What?"]) == 0
    page = tmp_path / "show.html"
    assert show.main(["--config", str(project), "--output", str(page), "--count", "4", *words]) == 0
    shown = re.sub(r"<[^>]+>", "", page.read_text())
    assert kind == "bert" or ("What" in shown and "颜" in shown)  # WordPiece has a single unknown token


def test_a_released_language_model_needs_a_qwen_tokenizer(tmp_path):
    """Only a model from scratch takes any tokenizer."""
    for kind, words in (("gpt2", "not in the vocabulary"), ("bert", "a WordPiece, not a byte-level BPE")):
        KINDS[kind](tmp_path / kind)
        with pytest.raises(InputError, match=words):
            qwen.load_tokenizer(str(tmp_path / kind))
    with pytest.raises(InputError, match="cannot be read"):
        qwen.load_tokenizer(str(tmp_path / "nothing"), any_kind=True)


def test_transformers_reads_a_learned_tokenizer(project, whole):
    ours = qwen.load_tokenizer(str(project.parent / "tokenizer"), any_kind=True)
    theirs = AutoTokenizer.from_pretrained(project.parent / "tokenizer")
    text = "What colour is it? 这是什么颜色？"
    assert theirs(text).input_ids == qwen.encode_text(ours, text) and theirs.decode(theirs(text).input_ids) == text
