"""Mixtures of experts: the layer is transformers' own, and the balance loss trains the routers and is logged separately.

Shapes: T tokens, E experts, k experts per token, D hidden size.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen2_moe import modeling_qwen2_moe

import qwen
from config import IGNORE_INDEX, InputError
from dataset.batch import collate
from model.build import Built, checkpoint_activations
from model.loss import balance_loss
from tests.runs.test_training import assert_equal_files, rows
from tests.toy_batches import CPU, PAD, samples_of
from tests.toy_language import scratch_sizes, write_qwen2_moe, write_qwen3_moe
from tests.toy_model import build_toy, train_config
from tests.toy_project import run_training, write_project
from tests.toy_towers import write_clip
from training.memory import activation_bytes_per_token

WRITERS = {"qwen2_moe": write_qwen2_moe, "qwen3_moe": write_qwen3_moe}
SIZES = {
    "architecture": "qwen2_moe", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


def build(folders, family: str = "qwen2_moe", **settings) -> Built:
    return build_toy(folders, family, train=train_config(language_model="full"), **settings)


def routers(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")}


# --- the layer


def by_hand(block, tokens: torch.Tensor) -> torch.Tensor:
    """The layer computed token by token: the k most likely experts weighted by probability, and the shared expert.

    tokens [T, D] -> [T, D].
    """
    found = []
    for token in tokens:
        probabilities = (block.gate.weight @ token).softmax(0)
        shares, chosen = probabilities.topk(block.gate.top_k)
        if block.gate.norm_topk_prob:
            shares = shares / shares.sum()
        total = torch.zeros_like(token)
        for share, expert in zip(shares, chosen.tolist(), strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            total += share * (block.experts.down_proj[expert] @ (F.silu(gate) * up))
        if hasattr(block, "shared_expert"):
            shared = block.shared_expert
            passed = shared.down_proj.weight @ (
                F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            )
            total += torch.sigmoid(block.shared_expert_gate.weight @ token) * passed
        found.append(total)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("family", [*WRITERS, "from scratch"])
def test_the_layer_is_the_weighted_sum_of_its_experts(folders, family):
    if family == "from scratch":
        model = qwen.new_language_model(scratch_sizes(**SIZES), vocab_size=500, seed=0)
    else:
        model = qwen.load_language_model(folders / family, torch.float32)
    block, width = model.model.layers[1].mlp.double(), model.config.hidden_size
    tokens = 2 * torch.randn(1, 30, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # the library computes the weights of the chosen experts in float32
    torch.testing.assert_close(block(tokens)[0], by_hand(block, tokens[0]), rtol=1e-6, atol=5e-6)


@torch.no_grad()
def test_a_new_layer_equals_transformers():
    ours = qwen.new_language_model(scratch_sizes(**SIZES), vocab_size=500, seed=0)
    theirs = modeling_qwen2_moe.Qwen2MoeForCausalLM(type(ours.config).from_dict(ours.config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    block, other = ours.model.layers[0].mlp, theirs.model.layers[0].mlp
    tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    other.experts.config._experts_implementation = "eager"
    assert type(block) is type(other) and torch.equal(block(tokens), other(tokens))


# --- the balance loss


def balance_by_hand(logits: tuple, is_read: list[bool], top_k: int) -> float:
    """E times the sum over experts of (share of tokens that chose it) x (its mean probability), over all layers together."""
    experts = logits[0].shape[1]
    chosen, probability, count = [0.0] * experts, [0.0] * experts, 0
    for layer in logits:
        for token, read in zip(layer.double(), is_read, strict=True):
            if read:
                count += 1
                for expert in token.topk(top_k).indices.tolist():
                    chosen[expert] += 1
                for expert, value in enumerate(token.softmax(0).tolist()):
                    probability[expert] += value
    return experts * sum(c / count * p / count for c, p in zip(chosen, probability, strict=True))


@pytest.mark.parametrize("family", WRITERS)
def test_the_balance_loss_equals_transformers_and_the_formula(folders, family):
    """For a padded batch, whose padding is not counted."""
    built = build(folders, family)
    batch = collate(samples_of(qwen.image_token_id(built.tokenizer), images=(0, 0, 0)), PAD)
    inputs = batch.model_inputs(CPU)
    found = built.model(**inputs).balance
    theirs = AutoModelForCausalLM.from_pretrained(folders / family, dtype=torch.float32, experts_implementation="eager")
    output = theirs(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_router_logits=True)
    assert abs(float(found - output.aux_loss)) < 1e-6
    is_read = inputs["attention_mask"].flatten().bool().tolist()
    assert not all(is_read)
    assert float(found) == pytest.approx(balance_by_hand(output.router_logits, is_read, 2), rel=1e-6)
    assert float(found) != pytest.approx(balance_by_hand(output.router_logits, [True] * len(is_read), 2), rel=1e-4)


@pytest.mark.parametrize("attention", ["causal", "mixed"])
def test_packed_and_padded_batches_have_the_same_balance_loss_and_gradients(folders, attention):
    """The tokens that fill up a packed row are not counted either."""
    built = build(folders, attention=attention)
    samples = samples_of(qwen.image_token_id(built.tokenizer))
    found = []
    for packed in (True, False):
        built.model.zero_grad()
        batch = collate(samples, PAD, packed=packed)
        assert not packed or len(batch.lengths) > len(samples)  # there are tokens that fill up the row
        loss = built.model(**batch.model_inputs(CPU)).balance
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in routers(built.model).values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_balance_loss_is_k_for_evenly_used_experts_and_higher_otherwise():
    config = qwen.new_language_model(scratch_sizes(**SIZES), vocab_size=500, seed=0).config
    even = torch.tensor([[9.0, 9, 0, 0], [0, 0, 9, 9], [9, 0, 9, 0], [0, 9, 0, 9]])
    assert float(balance_loss((even, even), None, config)) == pytest.approx(2.0)
    assert float(balance_loss((even[:1], even[:1]), None, config)) == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_the_balance_loss_reaches_every_router_and_lowers_it(folders, precision, checkpointing):
    """The gradient of the balance loss only, also in half precision and with activation checkpointing."""
    built = build(folders)
    if checkpointing:
        checkpoint_activations(built.model)
    batch = collate(samples_of(qwen.image_token_id(built.tokenizer)), PAD, packed=True)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return built.model(**batch.model_inputs(CPU)).balance

    weights = routers(built.model)
    favour_one_expert(built, batch)
    first = loss()
    first.backward()
    assert len(weights) == 2 and all(p.grad.abs().sum() > 1e-6 for p in weights.values())
    for _ in range(20):
        with torch.no_grad():
            for weight in weights.values():
                weight -= 0.05 * weight.grad
                weight.grad = None
        last = loss()
        last.backward()
    assert float(first.detach()) > 2.1 and float(last.detach()) < float(first.detach()) - 0.1


def favour_one_expert(built, batch) -> None:
    """Change each router so that the first expert is more likely: add the mean of the batch's tokens to its row."""
    gates = [layer.mlp.gate for layer in built.model.causal_lm.model.layers]
    means = {}
    hooks = [gate.register_forward_hook(lambda gate, args, _: means.update({gate: args[0].mean(0)})) for gate in gates]
    with torch.no_grad():
        built.model(**batch.model_inputs(CPU))
        for gate, hook in zip(gates, hooks, strict=True):
            hook.remove()
            gate.weight[0] += 0.1 * means[gate]


def test_activation_checkpointing_keeps_the_gradients_of_both_losses(folders):
    found = []
    for checkpointing in (False, True):
        built = build(folders)
        if checkpointing:
            checkpoint_activations(built.model)
        batch = collate(samples_of(qwen.image_token_id(built.tokenizer)), PAD, packed=True)
        losses = built.model(**batch.model_inputs(CPU))
        (losses.answers + 10 * losses.balance).backward()
        found.append({name: p.grad for name, p in built.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_right_tokens_are_counted_without_gradients_and_a_dense_model_has_no_experts(folders):
    built = build(folders)
    batch = collate(samples_of(qwen.image_token_id(built.tokenizer)), PAD, packed=True)
    assert built.model(**batch.model_inputs(CPU)).right is None
    with torch.no_grad():
        right = built.model(**batch.model_inputs(CPU)).right
        inputs = batch.model_inputs(CPU)
        hidden = built.model.causal_lm.model(
            input_ids=inputs["input_ids"], lengths=inputs["lengths"],
            image_features=built.model.encode_images(inputs["pixel_values"]), use_cache=False,
        ).last_hidden_state  # fmt: skip
        guess = built.model.causal_lm.lm_head(hidden).argmax(-1)[:, :-1]
    wanted = batch.labels[:, 1:]
    assert int(right) == int(((guess == wanted) & (wanted != IGNORE_INDEX)).sum()) <= batch.num_targets

    dense = qwen.new_language_model(
        scratch_sizes(
            architecture="qwen2", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        ),
        vocab_size=500,
        seed=0,
    )
    built.model.language_model = dense
    assert not built.model.has_experts


# --- in a run


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project that trains the whole language model, Qwen1.5-MoE."""
    path = write_project(tmp_path_factory.mktemp("project"))
    write_qwen2_moe(path.parent / "moe")
    return path


MOE = ("model.language_model=moe", "train.trainable.language_model=full", "train.language_model_lr=1e-3")
MOE += ("train.lora_lr=null", "train.score_samples=2", "train.save_total_limit=null")


@pytest.fixture
def train(project, monkeypatch):
    monkeypatch.chdir(project.parent)
    return lambda *overrides: run_training(project, *MOE, *overrides)


def test_the_balance_loss_is_logged_separately_and_weighted_by_the_config(train, tmp_path):
    logged = {}
    for factor in (0, 5):
        train(f"output_dir={tmp_path / str(factor)}", f"train.router_aux_loss_coef={factor}", "train.max_steps=8")
        logged[factor] = rows(tmp_path / str(factor))
    losses = {factor: [row for row in found if "loss" in row] for factor, found in logged.items()}
    assert losses[0][0]["loss"] == losses[5][0]["loss"]  # the loss of the answers does not contain it
    assert losses[0][0]["balance_loss"] == losses[5][0]["balance_loss"] > 2
    assert losses[5][-1]["balance_loss"] < losses[0][-1]["balance_loss"] - 0.01
    validations = [row for row in logged[5] if "val_loss" in row]
    assert all({"val_balance_loss", "val_perplexity", "val_token_accuracy"} <= row.keys() for row in validations)
    scores = json.loads((tmp_path / "5" / "final" / "scores.json").read_text())
    assert {"loss", "perplexity", "token_accuracy", "balance_loss"} <= scores.keys()


def test_an_interrupted_run_ends_the_same(train, tmp_path):
    train(f"output_dir={tmp_path / 'whole'}")
    train(f"output_dir={tmp_path / 'parts'}", "train.max_steps=6", "--resume", "none")
    for name in ("final", "best", "checkpoint-6"):
        target = tmp_path / "parts" / name
        for path in sorted(target.rglob("*"), reverse=True) if target.exists() else ():
            path.unlink() if path.is_file() else path.rmdir()
        if target.exists():
            target.rmdir()
    train(f"output_dir={tmp_path / 'parts'}")
    names = ["language_model.safetensors", "projector.safetensors"]
    assert_equal_files(tmp_path / "whole" / "final", tmp_path / "parts" / "final", names)
    assert_equal_files(tmp_path / "whole" / "checkpoint-6", tmp_path / "parts" / "checkpoint-6", ["state.safetensors"])


def test_the_default_factor_is_the_models_own_and_a_dense_model_refuses_one(train, tmp_path):
    train(f"output_dir={tmp_path / 'own'}", "train.max_steps=2", "train.eval_steps=null")
    train(
        f"output_dir={tmp_path / 'said'}",
        "train.max_steps=2",
        "train.eval_steps=null",
        "train.router_aux_loss_coef=0.001",
    )
    names = ["language_model.safetensors", "projector.safetensors"]
    assert_equal_files(tmp_path / "own" / "final", tmp_path / "said" / "final", names)
    with pytest.raises(InputError, match='"train.router_aux_loss_coef" is 0.5, but the language model has no experts'):
        train(f"output_dir={tmp_path / 'dense'}", "model.language_model=lm", "train.router_aux_loss_coef=0.5")


def test_lora_on_a_mixture_of_experts_adapts_the_attention_only(train, tmp_path):
    lora = ("train.trainable.language_model=lora", "train.language_model_lr=null", "train.lora_lr=1e-3")
    train(f"output_dir={tmp_path}", *lora)
    adapter = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(InputError, match='lora.target_modules: "up_proj" is unknown'):
        train(f"output_dir={tmp_path / 'mlp'}", *lora, "lora.target_modules=[q_proj, up_proj]")


def test_liger_kernels_are_refused_with_experts(train, tmp_path):
    with pytest.raises(InputError, match="dense language models only"):
        train(f"output_dir={tmp_path}", "train.liger_kernels=on")


def test_activation_bytes_of_a_token_count_the_experts_that_it_uses(folders):
    """Two experts of 48 and one of 64, each forward and back; with twice as many experts they are the same."""
    built = build(folders)
    config = built.model.causal_lm.config
    before = activation_bytes_per_token(built.model)
    assert before == 2 * ((8 + 3 * 2) * 64 + 4 * (2 * 48 + 64)) * 4
    config.num_experts *= 2
    assert activation_bytes_per_token(built.model) == before
