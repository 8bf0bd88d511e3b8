"""One process, two that each hold the model, two that share it: the same losses, gradients, weights and checkpoints.

Run: python -m pytest tests/training/test_parallel.py

The two processes are real (torchrun, gloo). They run this file as a script, once for all tests: they assert what they can
check themselves, and write what is compared with one process into a folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from config import IGNORE_INDEX, InputError, LoraConfig
from dataset.batch import Batch
from model.build import Built, autocast, checkpoint_activations
from model.checkpoint import save_trained
from model.checkpoint_folder import write_folder
from model.generate import Prompt, generate
from model.trainable import WeightOrigins, parameters_without_lora
from tests.toy_batches import CPU
from tests.toy_language import write_qwen1, write_qwen2, write_qwen2_moe
from tests.toy_model import build_toy, train_config
from tests.toy_project import fresh_accelerate
from tests.toy_towers import write_clip
from training.digests import equal_sha256
from training.parallel import check_equal_weights, clip_grad_norm, sum_gradients
from training.sharding import gathered_for_inference, gathered_for_saving, idle_batch, laid_out_as, shard
from training.state import load_state, save_state

ROOT = Path(__file__).parents[2]
KINDS = {  # language model and what trains
    "full": ("qwen2", {"language_model": "full"}),
    "experts": ("qwen2_moe", {"language_model": "full"}),
    "lora": ("qwen1", {"vision_tower": "top:1", "language_model": "lora"}),
}
# Images of each micro-batch. In step 1 the second process has none; in step 2 it has one micro-batch and the first has two.
STEPS = [[2, 1, 0, 1], [1, 0, 2, 0], [1, 2, 1]]
MAX_NORM = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# One training run, on any number of processes


def build(folder: Path, kind: str, checkpoint: Path | None = None, dtype=torch.float32) -> Built:
    language_model, words = KINDS[kind]
    lora = LoraConfig(r=4, alpha=8.0, target_modules=("q_proj", "up_proj"))
    train = train_config(**words)
    built = build_toy(folder, language_model, "tower", train=train, lora=lora, dtype=dtype, start_from=checkpoint)
    if kind == "lora":
        checkpoint_activations(built.model)
    return built


def micro_batch(step: int, micro: int, image_token_id: int) -> Batch:
    """Return two rows of 28 tokens. The first STEPS[step][micro] of them have an image; the number of supervised tokens
    differs from micro-batch to micro-batch."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    images = STEPS[step][micro]
    ids = torch.randint(1, 250, (2, 28), generator=generator)
    ids[:images, 2:18] = image_token_id
    labels = torch.full_like(ids, IGNORE_INDEX)
    answer = 3 + 2 * micro
    labels[:, -answer:] = ids[:, -answer:]
    return Batch(
        input_ids=ids,
        labels=labels,
        attention_mask=torch.ones_like(ids),
        lengths=None,
        pixel_values=torch.randn(images, 3, 28, 28, generator=generator) if images else None,
        patch_features=None,
        image_keys=[None] * images,
        is_cached=[False] * images,
        images_in_sample=[int(row < images) for row in range(2)],
        ids=["0", "1"],
        replaced=[],
        pad_token_id=0,
    )


def make_optimizer(model) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return parameters, torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.1)


def one_step(model, parameters, optimizer, step: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Take a step, and return (loss per target, norm of the gradients, the gradients by name)."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    is_sharded = isinstance(parameters[0], DTensor)
    every = [micro_batch(step, micro, model.causal_lm.config.image_token_id) for micro in range(len(STEPS[step]))]
    targets = sum(batch.num_targets for batch in every)
    mine = every[rank::world]
    if is_sharded:
        mine += [idle_batch()] * (-(-len(every) // world) - len(mine))
    loss = torch.zeros(())
    for batch in mine:
        part = model(**batch.model_inputs(CPU)).answers / targets
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


def save(folder: Path, built: Built, optimizer: torch.optim.Optimizer, step: int) -> None:
    def write(partial: Path) -> None:
        save_trained(built.model, built.origins, partial)
        save_state(partial, built.model, optimizer, {"step": step})

    with gathered_for_saving(built.model, built.origins, optimizer):
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_folder(folder, write)


def train(folder: Path, name: str, kind: str, resume: Path | None = None) -> nn.Module:
    """Train three steps, or the last one from a checkpoint, and return the model.

    Writes to `folder`: name-kind.json with the losses and norms, name-kind.safetensors with the gradients, name-kind-<step>/
    with the checkpoints. name: alone, copies or shards.
    """
    built = build(folder, kind, resume)
    model = built.model
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
        save(folder / f"{name}-{kind}-{step + 1}", built, optimizer, step + 1)
        answer(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / f"{name}-{kind}.json").write_text(json.dumps(numbers))
        save_file(gradients, folder / f"{name}-{kind}.safetensors")
    return model


def answer(model) -> list[list[int]]:
    """Answer two questions, and one more on each later process, in answers of different lengths, as an evaluation does."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    image = model.causal_lm.config.image_token_id
    prompt = Prompt([5, *[image] * 16, 6, 7], [0])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(9))
    model.eval()
    with gathered_for_inference(model), torch.inference_mode():
        answers = [
            generate(model, [prompt], pixels, max_new_tokens=length, do_sample=False)[0].tolist()
            for length in range(2, 4 + rank)
        ]
    model.train()
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# The work of the two processes


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    check_sum_of_gradients(rank)
    check_that_different_weights_are_named(folder, rank)
    check_that_different_data_are_named(folder, rank)
    for kind in KINDS:
        copies = train(folder, "copies", kind)
        held: list = [None, None]
        dist.all_gather_object(held, [float(p.detach().double().sum()) for p in copies.parameters()])
        assert held[0] == held[1], "the copies differ"
        shards = train(folder, "shards", kind)
        assert all(isinstance(p, DTensor) for p in shards.parameters()), "every parameter is sharded"
        for name in ("copies", "shards"):
            train(folder, f"{name}-resumed", kind, folder / f"alone-{kind}-2")
        answers = answer(shards)
        dist.all_gather_object(held, answers)
        if rank == 0:
            (folder / f"answers-{kind}.json").write_text(json.dumps(held[1]))
    check_bf16(folder)
    with pytest.raises(InputError, match="fp16"):
        shard(build(folder, "lora").model, CPU, torch.float16)
    dist.destroy_process_group()


def check_sum_of_gradients(rank: int) -> None:
    """A missing gradient counts as zeros, on both processes too; bfloat16 is summed in float32; buckets have any size."""
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


def check_that_different_weights_are_named(folder: Path, rank: int) -> None:
    model = build(folder, "lora").model
    check_equal_weights(model)
    if rank == 1:
        weight = model.vision_tower.model.get_parameter(next(iter(dict(model.vision_tower.model.named_parameters()))))
        weight.data.view(-1)[0] = torch.nextafter(weight.data.view(-1)[0], torch.tensor(9.0))
    with pytest.raises(
        InputError, match="process 1 holds other weights than process 0: 1 tensors, such as vision_tower"
    ):
        check_equal_weights(model)


def check_that_different_data_are_named(folder: Path, rank: int) -> None:
    """Each machine may have its own copy of a file. A file that one of them lacks counts as another one."""
    for name, content in {"equal": "same", "other": f"of {rank}"}.items():
        (folder / f"{name}{rank}").write_text(content)
    (folder / "missing0").write_text("here")
    with fresh_accelerate():
        PartialState(cpu=True)
        assert len(equal_sha256(folder / f"equal{rank}")) == 64
        for name in ("other", "missing"):
            with pytest.raises(InputError, match=f"{name}{rank}: process 1 has another file there than process 0"):
                equal_sha256(folder / f"{name}{rank}")


def check_bf16(folder: Path) -> None:
    """A sharded model computes in bfloat16 what one process computes with autocast; what trains stays float32."""
    for kind in KINDS:
        built = build(folder, kind, dtype=torch.bfloat16)
        model = built.model
        inputs = micro_batch(0, 0, model.causal_lm.config.image_token_id).model_inputs(CPU)
        with autocast("bf16", CPU)():
            expected = model(**inputs).answers.item()
            shard(model, CPU, torch.bfloat16)
            loss = model(**inputs).answers
        loss.backward()
        assert abs(loss.item() - expected) < 2e-2 * expected, (loss.item(), expected)
        parameters, optimizer = make_optimizer(model)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
        optimizer.step()
        save(folder / f"bf16-{kind}-1", built, optimizer, 1)
        if kind == "lora":  # as if an earlier run had trained the whole language model
            trained = dict(built.origins.trained, language_model=frozenset(parameters_without_lora(model.causal_lm)))
            started = dataclasses.replace(built, origins=dataclasses.replace(built.origins, trained=trained))
            save(folder / "halved-1", started, optimizer, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the runs of one process and then those of two."""
    folder = tmp_path_factory.mktemp("parallel")
    write_clip(folder / "tower")
    write_qwen1(folder / "qwen1")
    write_qwen2(folder / "qwen2")
    write_qwen2_moe(folder / "qwen2_moe")
    for kind in KINDS:
        train(folder, "alone", kind)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    subprocess.run(
        [*command, "tests.training.test_parallel", str(folder)],
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
def test_two_processes_train_like_one(folder, kind, name):
    """Losses, norms and gradients of every step are equal, though the second process has no image in one step and one
    micro-batch less in another; then weights and optimizer."""
    expected, found = (json.loads((folder / f"{n}-{kind}.json").read_text()) for n in ("alone", name))
    for one, two in zip(expected, found, strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert min(norm for _, norm in expected) > MAX_NORM, "every step is clipped"
    assert_close(*(load_file(folder / f"{n}-{kind}.safetensors") for n in ("alone", name)), 1e-6)
    assert_same_checkpoint(folder / f"alone-{kind}-3", folder / f"{name}-{kind}-3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["copies", "shards"])
def test_a_run_of_one_process_resumes_on_two(folder, kind, name):
    assert_same_checkpoint(folder / f"alone-{kind}-3", folder / f"{name}-resumed-{kind}-3")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["copies", "shards"])
def test_a_run_of_two_processes_resumes_on_one(folder, kind, name):
    train(folder, f"alone-after-{name}", kind, folder / f"{name}-{kind}-2")
    assert_same_checkpoint(folder / f"{name}-{kind}-3", folder / f"alone-after-{name}-{kind}-3")


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Assert equal files, tensors, shapes and dtypes, values up to rounding, and headers that are equal byte for byte."""
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(path.name for path in b.iterdir())
    for name in files:
        if name.endswith(".safetensors"):
            one, two = load_file(a / name), load_file(b / name)
            for tensors in (one, two) if name == "vision_tower.safetensors" else ():
                # It changes all scores of a query equally, so its gradient is 0 up to rounding, which AdamW magnifies.
                del tensors["model.encoder.layers.2.self_attn.k_proj.bias"]
            assert_close(one, two, 1e-6)
            headers = [
                (f / name).read_bytes()[: 8 + int.from_bytes((f / name).read_bytes()[:8], "little")] for f in (a, b)
            ]
            assert headers[0] == headers[1], name
        elif name != "manifest.json":
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_answers_like_its_checkpoint(folder, kind):
    """Each process gives another number of answers of other lengths, and trained on after it."""
    model = build(folder, kind, folder / f"shards-{kind}-3").model
    found = json.loads((folder / f"answers-{kind}.json").read_text())
    assert found[:-1] == answer(model) and len(found[-1]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_trained_weights_are_saved_in_float32_after_bf16(folder, kind):
    for path in (folder / f"bf16-{kind}-1").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}, path.name


def test_a_sharded_language_model_below_lora_that_an_earlier_run_trained_is_saved_whole(folder):
    model = build(folder, "lora", dtype=torch.bfloat16).model
    expected = parameters_without_lora(model.causal_lm)
    found = load_file(folder / "halved-1" / "language_model.safetensors")
    assert found.keys() == expected.keys() and torch.bfloat16 in {tensor.dtype for tensor in found.values()}
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


def test_one_process_makes_missing_gradients_zero_and_needs_no_other():
    """A step without an image changes the projector in the same way on one process as on two."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), 5.0)
    sum_gradients(parameters)
    assert parameters[0].grad.tolist() == [5.0, 5.0] and parameters[1].grad.tolist() == [0.0, 0.0, 0.0]
    assert clip_grad_norm(parameters, 1.0) == pytest.approx(50**0.5)
    torch.testing.assert_close(parameters[0].grad, torch.full((2,), 0.5**0.5))


def test_a_plain_model_is_not_changed():
    model = nn.Linear(2, 2)
    before = list(model.parameters())
    with gathered_for_saving(model, WeightOrigins(frozenset(), {})), gathered_for_inference(model):
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    shard(model, CPU, torch.float32)
    check_equal_weights(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert laid_out_as(model.bias, torch.ones(2)).tolist() == [1.0, 1.0]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
