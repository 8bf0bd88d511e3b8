"""Projectors: what each computes from patches, how many tokens it makes; each trains, saves, resumes and answers.

Run: python -m pytest tests/model/test_projectors.py
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import test
from config import InputError, load_config, run_script
from dataset.conversation import question_parts
from model.answer import Request
from model.build import read_pixels
from model.projector import PROJECTORS, MLPProjector, build_projector, grid_positions, num_image_tokens
from tests.toy_project import run_training, write_project
from tests.toy_towers import write_clip
from training.run import chat_format, open_answerer, open_model, open_processors

IN, OUT, SIDE = 128, 24, 4  # two attention heads
TOKENS = {"mlp": 16, "low_rank_mlp": 16, "pixel_shuffle": 4, "resampler": 32}  # of 4 x 4 patches


BUFFERS = {"feature_mean", "feature_std", "output_scale"}  # measured before the first step


def make(kind: str, in_features: int = IN, **options) -> nn.Module:
    """Build a projector whose weights are all random, also those of the norms."""
    torch.manual_seed(0)
    projector = build_projector(kind, in_features, None, OUT, **options)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return projector


def patches(images: int = 3, side: int = SIDE, width: int = IN) -> torch.Tensor:
    return torch.randn(images, side * side, width, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and counts


@pytest.mark.parametrize("images", [3, 0])
@pytest.mark.parametrize("kind", PROJECTORS)
def test_the_number_of_tokens_is_known_without_weights(kind, images):
    features = make(kind)(patches(images))
    assert features.shape == (images, num_image_tokens(kind, SIDE * SIDE), OUT)
    assert num_image_tokens(kind, SIDE * SIDE) == TOKENS[kind]


def test_a_resampler_makes_one_token_per_query_for_any_grid():
    projector = make("resampler", num_queries=5)
    assert num_image_tokens("resampler", 729, num_queries=5) == 5
    assert {projector(patches(side=side)).shape for side in (1, 3, 8)} == {(3, 5, OUT)}


@pytest.mark.parametrize("width", [30, 33])
def test_a_resampler_takes_an_encoder_of_any_width(width):
    assert make("resampler", width)(patches(width=width)).shape == (3, 32, OUT)


def test_the_middle_width_is_as_configured_and_each_kind_has_a_default():
    widths = {kind: build_projector(kind, 8, None, OUT) for kind in ("mlp", "low_rank_mlp", "pixel_shuffle")}
    assert {kind: p.linear_1.out_features for kind, p in widths.items()} == {
        "mlp": OUT, "low_rank_mlp": 384, "pixel_shuffle": OUT,
    }  # fmt: skip
    assert build_projector("resampler", 8, None, OUT).mlp.linear_1.out_features == OUT
    assert build_projector("low_rank_mlp", 8, 10, OUT).linear_1.out_features == 10


@pytest.mark.parametrize("kind", ["mlp", "low_rank_mlp", "pixel_shuffle"])
def test_the_names_of_an_mlps_tensors_are_llavas(kind):
    assert {name for name, _ in make(kind).named_parameters()} == {
        f"linear_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")
    }


@pytest.mark.parametrize("kind", PROJECTORS)
def test_an_image_does_not_depend_on_the_others_of_the_batch(kind):
    projector, features = make(kind), patches()
    torch.testing.assert_close(projector(features)[1:2], projector(features[1:2]))


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_calibrated_projector_sees_all_encoders_alike(kind):
    """Features of another size, with a large common mean and unequal dimensions, give the same tokens as plain ones."""
    plain, other, features = make(kind), make(kind), patches(images=20)
    generator = torch.Generator().manual_seed(2)
    size, mean = 0.01 + torch.rand(IN, generator=generator), 5 * torch.randn(IN, generator=generator)
    plain.calibrate(features, output_rms=0.02)
    other.calibrate(features * size + mean, output_rms=0.02)
    torch.testing.assert_close(other(features * size + mean), plain(features), rtol=1e-3, atol=1e-5)
    assert plain(features).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)


def test_calibration_does_not_enlarge_a_constant_feature_without_bound():
    features = patches(images=20)
    features[..., 0] = 3.0
    features[..., 1] = 0.0
    projector = make("mlp")
    projector.calibrate(features, output_rms=1.0)
    assert projector.feature_std.min() >= 1e-4
    assert projector(features).isfinite().all()


def test_both_operations_fold_into_the_layers():
    features, projector = 4 + 0.2 * patches(images=20), make("mlp")
    projector.calibrate(features, output_rms=0.1)
    folded, projector, features = make("mlp").double(), projector.double(), features.double()
    with torch.no_grad():
        folded.linear_1.weight.copy_(projector.linear_1.weight / projector.feature_std)
        folded.linear_1.bias.copy_(projector.linear_1.bias - folded.linear_1.weight @ projector.feature_mean)
        folded.linear_2.weight.copy_(projector.linear_2.weight * projector.output_scale)
        folded.linear_2.bias.copy_(projector.linear_2.bias * projector.output_scale)
    torch.testing.assert_close(folded(features), projector(features))


# ---------------------------------------------------------------------------------------------------------------------
# Pixel shuffle


@pytest.mark.parametrize("factor", [2, 3])
def test_a_token_of_pixel_shuffle_joins_a_square_in_reading_order(factor):
    """By plain loops: for factor 2, the patches at (2r, 2c), (2r, 2c + 1), (2r + 1, 2c), (2r + 1, 2c + 1), then the MLP."""
    side, projector = 6, make("pixel_shuffle", 8, pixel_shuffle_factor=factor)
    features = patches(side=side, width=8)
    mlp = MLPProjector(factor**2 * 8, None, OUT)
    mlp.load_state_dict(dict(projector.named_parameters()), strict=False)
    expected = []
    for row in range(0, side, factor):
        for column in range(0, side, factor):
            square = [features[:, (row + i) * side + column + j] for i in range(factor) for j in range(factor)]
            expected.append(mlp(torch.cat(square, dim=-1)))
    torch.testing.assert_close(projector(features), torch.stack(expected, dim=1))
    assert num_image_tokens("pixel_shuffle", side**2, pixel_shuffle_factor=factor) == len(expected)


@pytest.mark.parametrize("patch", range(16))
def test_a_patch_changes_only_the_token_of_its_square(patch):
    projector, features = make("pixel_shuffle"), patches(1)
    changed = features.clone()
    changed[0, patch] += 1
    differs = (projector(features) != projector(changed)).any(-1)[0]
    row, column = divmod(patch, SIDE)
    assert differs.nonzero().flatten().tolist() == [row // 2 * (SIDE // 2) + column // 2]


# ---------------------------------------------------------------------------------------------------------------------
# Resampler


def test_the_resampler_equals_torchs_attention_with_the_same_weights():
    """Positions are added to queries and keys, not to values. The queries are added to the result, which is normalised and
    passes the MLP."""
    ours, features = make("resampler"), patches()
    attention = nn.MultiheadAttention(IN, IN // 64, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        attention.in_proj_bias.zero_()
        attention.out_proj.load_state_dict(ours.output.state_dict())
    values = ours.norm_patches(features)
    queries = (ours.queries + grid_positions(4, 8, side=SIDE, width=IN)).repeat(len(features), 1, 1)
    seen, _ = attention(queries, values + grid_positions(SIDE, SIDE, side=SIDE, width=IN), values)
    torch.testing.assert_close(ours(features), ours.mlp(ours.norm(ours.queries + seen)), rtol=1e-4, atol=1e-5)


def first_attention(num_queries: int, side: int) -> torch.Tensor:
    """Return [Q, side * side], the attention of each query of a new resampler to each patch, from positions only."""
    torch.manual_seed(0)
    projector = build_projector("resampler", IN, None, OUT, num_queries=num_queries)
    rows = next(rows for rows in range(math.isqrt(num_queries), 0, -1) if num_queries % rows == 0)
    queries = (
        projector.query(grid_positions(rows, num_queries // rows, side=side, width=IN))
        .unflatten(1, (-1, 64))
        .transpose(0, 1)
    )
    keys = projector.key(grid_positions(side, side, side=side, width=IN)).unflatten(1, (-1, 64)).transpose(0, 1)
    return (queries @ keys.mT / 8).softmax(-1).mean(0).detach()


@pytest.mark.parametrize("num_queries, side", [(16, 4), (32, 16), (4, 16)])
def test_each_query_first_attends_to_the_patches_near_it(num_queries, side):
    """With as many queries as patches or fewer, the patch with the most attention is among those nearest to the query."""
    rows = next(rows for rows in range(math.isqrt(num_queries), 0, -1) if num_queries % rows == 0)
    columns = num_queries // rows
    for query, seen in enumerate(first_attention(num_queries, side)):
        row, column = divmod(query, columns)
        place = (row + 0.5) * side / rows - 0.5, (column + 0.5) * side / columns - 0.5
        distance = torch.tensor([math.dist(place, divmod(patch, side)) for patch in range(side * side)])
        assert distance[seen.argmax()] <= distance.min() + 1.5
        near = distance <= side / 4
        assert seen[near].mean() > 1.2 * seen[~near].mean()


def test_the_resampler_depends_on_the_positions_of_patches():
    """Shuffled, mirrored or transposed, the same patches give other tokens; without positions they would not."""
    projector, features = make("resampler"), patches(1)
    grid = features.unflatten(1, (SIDE, SIDE))
    moved = {
        "shuffled": features[:, torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(2))],
        "mirrored": grid.flip(2).flatten(1, 2),
        "upside down": grid.flip(1).flatten(1, 2),
        "transposed": grid.transpose(1, 2).flatten(1, 2),
    }
    for how, other in moved.items():
        assert (projector(features) - projector(other)).abs().max() > 0.01, how


def test_only_the_positions_make_the_order_of_patches_matter(monkeypatch):
    """Patches reordered together with their positions give the same tokens; so do patches in any order without positions."""
    projector, features = make("resampler"), patches()
    order = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(2))
    places = grid_positions

    def moved(rows, columns, **grid):
        found = places(rows, columns, **grid)
        return found[order] if rows == columns == SIDE else found

    before = projector(features)
    assert (projector(features[:, order]) - before).abs().max() > 0.01
    monkeypatch.setattr("model.projector.grid_positions", moved)
    torch.testing.assert_close(projector(features[:, order]), before, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("model.projector.grid_positions", lambda *args, **grid: torch.zeros_like(places(*args, **grid)))
    torch.testing.assert_close(projector(features[:, order]), projector(features), rtol=1e-4, atol=1e-5)


def test_queries_reordered_with_their_positions_give_the_same_tokens_reordered(monkeypatch):
    projector, features = make("resampler"), patches()
    before, order = projector(features), torch.randperm(32, generator=torch.Generator().manual_seed(2))
    places = grid_positions
    projector.queries.data = projector.queries.data[order]
    assert (projector(features) - before[:, order]).abs().max() > 0.01  # a query also depends on its position
    monkeypatch.setattr(
        "model.projector.grid_positions",
        lambda rows, columns, **grid: places(rows, columns, **grid)[order if rows * columns == 32 else slice(None)],
    )
    torch.testing.assert_close(projector(features), before[:, order], rtol=1e-4, atol=1e-5)


def test_positions_are_sines_and_cosines_of_row_and_column():
    """With one point a patch they are the patch's row and column; fewer points are evenly spaced."""
    width, side = 8, 3
    frequencies = [math.pi / 2, math.pi / 2 / side]  # a quarter turn a patch, a quarter turn an image

    def waves(at: float) -> list[float]:
        return [2 * math.sin(f * at) for f in frequencies] + [2 * math.cos(f * at) for f in frequencies]

    found = grid_positions(3, 3, side=side, width=width)
    for place in range(9):
        row, column = divmod(place, 3)
        torch.testing.assert_close(found[place], torch.tensor(waves(row) + waves(column)))
    (middle, *_), (upper, lower) = (grid_positions(rows, 1, side=side, width=width) for rows in (1, 2))
    torch.testing.assert_close(middle, torch.tensor(waves(1) + waves(1)))
    torch.testing.assert_close(upper, torch.tensor(waves(0.25) + waves(1)))
    torch.testing.assert_close(lower, torch.tensor(waves(1.75) + waves(1)))
    many = grid_positions(27, 27, side=27, width=64)
    distances = torch.cdist(many, many) + torch.eye(27 * 27)
    assert distances.min() > 0.3  # no two positions are equal


@pytest.mark.parametrize("kind", PROJECTORS)
def test_gradients_reach_every_weight_and_query(kind):
    projector = make(kind)
    projector(patches()).pow(2).sum().backward()
    still = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-3]
    assert still == [] and all(p.requires_grad for p in projector.parameters())
    if kind == "resampler":
        assert (projector.queries.grad.abs().sum(1) > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# In a run

KINDS = {"low_rank_mlp": [], "pixel_shuffle": ["model.pixel_shuffle_factor=4"], "resampler": ["model.num_queries=3"]}
TOY_TOKENS = {"low_rank_mlp": 16, "pixel_shuffle": 1, "resampler": 3}
PATCHES, WIDTH = 16, 32  # of the toy project's encoder
IMAGES_SEEN = 12  # nine that calibrate the projector, and three that are held out


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module", params=KINDS)
def trained(request, project):
    """Return (kind, the overrides that choose it, the folder of a run of two steps)."""
    kind = request.param
    words = [
        f"model.projector={kind}",
        *KINDS[kind],
        "train.max_steps=2",
        "train.save_steps=1",
        "train.eval_steps=null",
    ]
    folder = project.parent / kind
    run_training(project, *words, f"output_dir={folder}", "train.cache_features=on")
    return kind, words, folder


def test_each_kind_trains_all_its_tensors(trained):
    kind, _, folder = trained
    first, last = (load_file(folder / name / "projector.safetensors") for name in ("checkpoint-1", "final"))
    assert first.keys() == last.keys() == make(kind).state_dict().keys()
    assert {name for name in first if torch.equal(first[name], last[name])} == BUFFERS


def test_each_kind_resumes_bit_for_bit_and_answers(trained, project, tmp_path):
    kind, words, folder = trained
    again = tmp_path / "run"
    shutil.copytree(folder / "checkpoint-1", again / "checkpoint-1")
    run_training(project, *words, f"output_dir={again}", "train.cache_features=on")
    for name in ("projector.safetensors", "adapter_model.safetensors"):
        whole, resumed = load_file(folder / "final" / name), load_file(again / "final" / name)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole), name

    answers = []
    for final in (folder / "final", again / "final"):
        output = tmp_path / f"answers-{len(answers)}"
        assert test.main(["--checkpoint", str(final), str(project.parent / "images"), "--output", str(output)]) == 0
        rows = [json.loads(line) for line in (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
        answers.append([(row["image"], row["answer"]) for row in rows])
    assert len(answers[0]) == 12 and answers[0] == answers[1]


def test_an_image_takes_the_projectors_tokens_in_the_prompt_and_is_answered_from_them(trained, project):
    """The Answerer's text equals that of plain greedy decoding with the features passed in."""
    kind, _, folder = trained
    config = load_config(folder / "final" / "config.yaml")
    processors = open_processors(config, folder / "final")
    assert processors.num_image_tokens == TOY_TOKENS[kind]
    built = open_model(config, "fp32", processors, folder / "final")
    model, path = built.model.eval(), project.parent / "images" / "1.png"
    turns = [("user", question_parts("Which colour?", num_images=1))]
    ids = torch.tensor([chat_format(config, processors).encode_prompt(turns)])
    assert (ids == model.causal_lm.config.image_token_id).sum() == TOY_TOKENS[kind]

    answerer = open_answerer(config, built, "fp32", torch.device("cpu"))
    with torch.no_grad():
        features = model.projector(model.vision_tower(read_pixels(built.image_processor, path)[None]))
        assert features.shape == (1, TOY_TOKENS[kind], model.causal_lm.config.hidden_size)
        prompt = ids.shape[1]
        for _ in range(config.test.max_new_tokens):
            logits = model.causal_lm(input_ids=ids, image_features=features, use_cache=False).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            if ids[0, -1] in model.causal_lm.generation_config.eos_token_id:
                break
    expected = built.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).strip()
    assert answerer.answer([Request(turns, [path])]) == [expected]


def test_all_projectors_share_one_feature_cache(trained, project):
    """The cache holds the encoder's patches, so with another projector no image is encoded again."""
    (rows,) = (project.parent / "qa.features").glob("*/features.bin")
    assert rows.stat().st_size == IMAGES_SEEN * PATCHES * WIDTH * 4


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.fixture
def unbuilt(tmp_path):
    """A project whose encoder has a grid of 3 x 3 and whose weights are missing, so a refusal must precede reading."""
    path = write_project(tmp_path, images=4)
    write_clip(tmp_path / "tower", image_size=21)
    for part in ("tower", "lm"):
        (tmp_path / part / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.projector=resampel"], ['"resampel" is unknown', 'did you mean "resampler"', "pixel_shuffle"]),
        (["model.projector=pixel_shuffle"], ["3 x 3", "multiple of 2", "model.projector"]),
        (["model.pixel_shuffle_factor=3"], ["model.pixel_shuffle_factor", "3", "mlp", "null"]),
        (["model.projector=pixel_shuffle", "model.pixel_shuffle_factor=1"], ["model.pixel_shuffle_factor", "1"]),
        (["model.num_queries=8"], ["model.num_queries", "8", "mlp", "null"]),
        (["model.projector=resampler", "model.num_queries=0"], ["model.num_queries", "0"]),
        (["model.projector=resampler", "model.num_queries=4097"], ["model.num_queries", "4096"]),
        (["model.projector=resampler", "data.max_length=32"], ["data.max_length", "32 tokens", "projector"]),
    ],
)
def test_a_mistake_is_one_message_before_weights_are_read(unbuilt, capsys, overrides, words):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_training(unbuilt, *overrides))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.count("error:") == 1
    last = printed.splitlines()[-1]
    assert [word for word in words if word not in last] == [], last


def test_a_checkpoint_does_not_fit_another_projector(trained, project):
    kind, words, folder = trained
    for other in set(KINDS) - {kind}:
        config = load_config(
            project, [f"model.projector={other}", *KINDS[other], f"model.start_from={folder / 'final'}"]
        )
        with pytest.raises(InputError, match=r"final/projector.safetensors: .* another .*projector"):
            open_model(config, "fp32", open_processors(config))
