"""One process, two that each hold the model, two that share it: the same losses, gradients, weights and checkpoints.
`sh tests/run.sh tests/test_parallel.py`

The two processes are real (torchrun, gloo): this file is also what they run, once for all tests. What they find out about
themselves they assert; what is compared with one process they write into a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from config import IGNORE_INDEX, InputError
from model.build import autocast, build_model, checkpoint_activations, load_processors
from model.checkpoint import load_state, save_state, save_trained
from model.checkpoint_folder import write_folder
from model.generate import Prompt, generate
from training.parallel import check_equal_weights, clip_grad_norm, sum_gradients
from training.sharding import (gathered_for_inference, idle_batch, laid_out_as, shard, gathered_for_saving)
from tests.toy_language import write_qwen1, write_qwen2, write_qwen2_moe
from tests.toy_towers import write_clip

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
KINDS = {  # what trains, and in which language model
    "full": ("qwen2", {"vision_tower": "frozen", "language_model": "full"}),
    "experts": ("qwen2_moe", {"vision_tower": "frozen", "language_model": "full"}),
    "lora": ("qwen1", {"vision_tower": "top:1", "language_model": "lora"}),
}
# Pictures a micro-batch. In step 1 the second process sees none; in step 2 it has one micro-batch where the first has two.
STEPS = [[2, 1, 0, 1], [1, 0, 2, 0], [1, 2, 1]]
MAX_NORM = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# One training run, on any number of processes


def build(folder: Path, kind: str, checkpoint: Path | None = None, dtype=torch.float32):
    language_model, words = KINDS[kind]
    paths = {"vision_tower": str(folder / "tower"), "language_model": str(folder / language_model)}
    processors = load_processors(image_size=None, checkpoint=None, **paths)
    model = build_model(
        processors, **paths, vision_feature_layer=-2, image_size=None, projector="mlp", projector_hidden_size=None,
        trainable={"projector": "full", "embeddings": "frozen"} | words, dtype=dtype, seed=3, checkpoint=checkpoint,
        lora={"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "up_proj"]},
    ).model  # fmt: skip
    if kind == "lora":
        checkpoint_activations(model)
    return model


def micro_batch(step: int, micro: int, image_token_id: int) -> dict:
    """Two rows of 28 tokens, the first STEPS[step][micro] of them with a picture; some have more to learn than others."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    images = STEPS[step][micro]
    ids = torch.randint(1, 250, (2, 28), generator=generator)
    ids[:images, 2:18] = image_token_id
    labels = torch.full_like(ids, IGNORE_INDEX)
    answer = 3 + 2 * micro
    labels[:, -answer:] = ids[:, -answer:]
    pixels = torch.randn(images, 3, 28, 28, generator=generator) if images else None
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def make_optimizer(model) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return parameters, torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.1)


def one_step(model, parameters, optimizer, step: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss per target, norm of the gradients, the gradients by name) of a step, which is then taken."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    is_sharded = isinstance(parameters[0], DTensor)
    every = [micro_batch(step, micro, model.causal_lm.config.image_token_id) for micro in range(len(STEPS[step]))]
    targets = sum(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in every)
    mine = every[rank::world]
    if is_sharded:
        mine += [idle_batch(CPU)] * (-(-len(every) // world) - len(mine))
    loss = torch.zeros(())
    for batch in mine:
        part = model(**batch).answers / targets
        part.backward()
        loss += part.detach()
    if world > 1:
        dist.all_reduce(loss)
    sum_gradients(parameters, bucket_bytes=40_000)
    gradients = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.requires_grad}
    norm = clip_grad_norm(parameters, MAX_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm, gradients


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(folder: Path, model, optimizer, step: int) -> None:
    def write(partial: Path) -> None:
        save_trained(model, partial)
        save_state(partial, model, optimizer, {"step": step})

    with whole(model, optimizer):
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_folder(folder, write)


def train(folder: Path, name: str, kind: str, resume: Path | None = None) -> nn.Module:
    """Three steps (or the last one, from a checkpoint), written to `folder`: name-kind.json with the losses and norms,
    name-kind.safetensors with the gradients, name-kind-<step>/ with the checkpoints. name: alone, copies or shards."""
    model = build(folder, kind, resume)
    check_equal_weights(model)
    if name.startswith("shards"):
        shard(model, CPU, torch.float32)
    parameters, optimizer = make_optimizer(model)
    start = load_state(resume, model, optimizer)["step"] if resume else 0
    numbers, gradients = [], {}
    for step in range(start, len(STEPS)):
        loss, norm, found = one_step(model, parameters, optimizer, step)
        numbers.append([loss, norm])
        gradients |= {f"{step}/{key}": tensor for key, tensor in found.items()}
        save(folder / f"{name}-{kind}-{step + 1}", model, optimizer, step + 1)
        answer(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / f"{name}-{kind}.json").write_text(json.dumps(numbers))
        save_file(gradients, folder / f"{name}-{kind}.safetensors")
    return model


def answer(model) -> list[list[int]]:
    """Answers to as many questions as the process has a rank, each of another length, as after a validation."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    image = model.causal_lm.config.image_token_id
    prompt = Prompt([5, *[image] * 16, 6, 7], [0])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(9))
    model.eval()
    with gathered(model), torch.inference_mode():
        answers = [
            generate(model, [prompt], pixels, max_new_tokens=length, do_sample=False)[0].tolist()
            for length in range(2, 4 + rank)
        ]
    model.train()
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# What the two processes do


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    the_sum_of_gradients(rank)
    other_weights_are_named(folder, rank)
    for kind in KINDS:
        copies = train(folder, "copies", kind)
        held: list = [None, None]
        dist.all_gather_object(held, [float(p.detach().double().sum()) for p in copies.parameters()])
        assert held[0] == held[1], "the copies drift apart"
        shards = train(folder, "shards", kind)
        assert all(isinstance(p, DTensor) for p in shards.parameters()), "nothing stays whole"
        for name in ("copies", "shards"):
            train(folder, f"{name}-resumed", kind, folder / f"alone-{kind}-2")
        answers = answer(shards)
        dist.all_gather_object(held, answers)
        if rank == 0:
            (folder / f"answers-{kind}.json").write_text(json.dumps(held[1]))
    in_bf16(folder, rank)
    with pytest.raises(InputError, match="fp16"):
        shard(build(folder, "lora"), CPU, torch.float16)
    dist.destroy_process_group()


def the_sum_of_gradients(rank: int) -> None:
    """Missing ones are zeros; other dtypes are summed in float32; buckets of any size; a step on which nobody has one."""
    shapes = [(7, 5), (3,), (40, 40), (), (11,)]
    for bucket_bytes in (1, 100, 10**6):
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        parameters[4].data = parameters[4].data.bfloat16()
        every = [
            [torch.randn(shape, generator=torch.Generator().manual_seed(10 * r + i)) for i, shape in enumerate(shapes)]
            for r in (0, 1)
        ]
        for i, parameter in enumerate(parameters):
            if i != 1 and (i, rank) != (2, 1):
                parameter.grad = every[rank][i].to(parameter.dtype, copy=True)
        sum_gradients(parameters, bucket_bytes)
        assert torch.equal(parameters[0].grad, every[0][0] + every[1][0])
        assert torch.equal(parameters[1].grad, torch.zeros(3))
        assert torch.equal(parameters[2].grad, every[0][2])
        summed = every[0][4].bfloat16().float() + every[1][4].bfloat16().float()
        assert torch.equal(parameters[4].grad, summed.bfloat16())


def other_weights_are_named(folder: Path, rank: int) -> None:
    model = build(folder, "lora")
    check_equal_weights(model)
    if rank == 1:
        weight = model.vision_tower.model.get_parameter(next(iter(dict(model.vision_tower.model.named_parameters()))))
        weight.data.view(-1)[0] = torch.nextafter(weight.data.view(-1)[0], torch.tensor(9.0))
    with pytest.raises(
        InputError, match="process 1 holds other weights than process 0: 1 tensors, such as vision_tower"
    ):
        check_equal_weights(model)


def in_bf16(folder: Path, rank: int) -> None:
    """A sharded model computes in bfloat16 what one process computes with autocast; what trains stays float32."""
    for kind in KINDS:
        model = build(folder, kind, dtype=torch.bfloat16)
        batch = micro_batch(0, 0, model.causal_lm.config.image_token_id)
        with autocast("bf16", CPU)():
            expected = model(**batch).answers.item()
            shard(model, CPU, torch.bfloat16)
            loss = model(**batch).answers
        loss.backward()
        assert abs(loss.item() - expected) < 2e-2 * expected, (loss.item(), expected)
        parameters, optimizer = make_optimizer(model)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
        optimizer.step()
        save(folder / f"bf16-{kind}-1", model, optimizer, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of one process, then those of two."""
    folder = tmp_path_factory.mktemp("parallel")
    write_clip(folder / "tower")
    write_qwen1(folder / "qwen1")
    write_qwen2(folder / "qwen2")
    write_qwen2_moe(folder / "qwen2_moe")
    for kind in KINDS:
        train(folder, "alone", kind)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    subprocess.run(
        [*command, "tests.test_parallel", str(folder)],
        check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    return folder


def assert_close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["copies", "shards"])
def test_two_processes_train_as_one(folder, kind, name):
    """Losses, norms and gradients of every step, though in one step the second process has no picture and in another it
    has one micro-batch less; then weights and optimizer."""
    expected, found = (json.loads((folder / f"{n}-{kind}.json").read_text()) for n in ("alone", name))
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert min(norm for _, norm in expected) > MAX_NORM, "clipping has something to do"
    assert_close(*(load_file(folder / f"{n}-{kind}.safetensors") for n in ("alone", name)), 1e-6)
    assert_same_checkpoint(folder / f"alone-{kind}-3", folder / f"{name}-{kind}-3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["copies", "shards"])
def test_a_run_of_one_process_goes_on_with_two(folder, kind, name):
    assert_same_checkpoint(folder / f"alone-{kind}-3", folder / f"{name}-resumed-{kind}-3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["copies", "shards"])
def test_a_run_of_two_processes_goes_on_with_one(folder, kind, name):
    train(folder, f"alone-after-{name}", kind, folder / f"{name}-{kind}-2")
    assert_same_checkpoint(folder / f"{name}-{kind}-3", folder / f"alone-after-{name}-{kind}-3")


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """The same files, tensors, shapes and dtypes; values to rounding; a header that is equal byte for byte."""
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(path.name for path in b.iterdir())
    for name in files:
        if name.endswith(".safetensors"):
            one, two = load_file(a / name), load_file(b / name)
            for tensors in (one, two) if name == "vision_tower.safetensors" else ():
                # it moves all scores of a query alike, so its gradient is 0 but for rounding, which AdamW magnifies
                del tensors["model.encoder.layers.2.self_attn.k_proj.bias"]
            assert_close(one, two, 1e-6)
            headers = [
                (f / name).read_bytes()[: 8 + int.from_bytes((f / name).read_bytes()[:8], "little")] for f in (a, b)
            ]
            assert headers[0] == headers[1], name
        elif name == "adapter_config.json":  # PEFT writes target_modules in any order
            assert sorted((a / name).read_text()) == sorted((b / name).read_text())
        elif name != "manifest.json":
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_answers_as_its_checkpoint_does(folder, kind):
    """Each process its own number of answers, each in its own number of steps; the runs above went on after it."""
    model = build(folder, kind, folder / f"shards-{kind}-3")
    found = json.loads((folder / f"answers-{kind}.json").read_text())
    assert found[:-1] == answer(model) and len(found[-1]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_is_saved_in_float32_after_bf16(folder, kind):
    for path in (folder / f"bf16-{kind}-1").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}, path.name


def test_one_process_fills_in_what_is_missing_and_talks_to_nobody():
    """A step without a picture moves the projector in the same way on one process as on two."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), 5.0)
    sum_gradients(parameters)
    assert parameters[0].grad.tolist() == [5.0, 5.0] and parameters[1].grad.tolist() == [0.0, 0.0, 0.0]
    assert clip_grad_norm(parameters, 1.0) == pytest.approx(50**0.5)
    torch.testing.assert_close(parameters[0].grad, torch.full((2,), 0.5**0.5))


def test_a_plain_model_is_left_as_it_is():
    model = nn.Linear(2, 2)
    before = list(model.parameters())
    with whole(model), gathered(model):
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    shard(model, CPU, torch.float32)
    check_equal_weights(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert laid_out_as(model.bias, torch.ones(2)).tolist() == [1.0, 1.0]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
