"""Projectors: patch features -> image features in the language model's width, and how many tokens each kind makes of an
image. Knows no encoder and no language model.

A projector is a Projector with `__init__(in_features, hidden_size, out_features)`, where hidden_size None means its own
default; `num_tokens(num_patches)`, which needs no weights; and `project`, [M, N, in_features] -> [M, K, out_features], where
K is num_tokens(N).

Shapes: M images, N patches an image (a square grid, row by row), K image tokens an image, Q queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import InputError, choose

NUM_QUERIES = 32  # tokens of an image with a resampler, by default
SHUFFLE_FACTOR = 2  # side of pixel_shuffle's squares, by default
LOW_RANK = 384  # middle width of the low-rank MLP
PLACE_SCALE = 2.0  # amplitude of the resampler's positions: its first attention can separate neighbouring patches
HEAD_SIZE = 64  # of the resampler's attention; the widths of common encoders are multiples of it


class Projector(nn.Module):
    """Base of the projectors: standardised features in, image features as large as text embeddings out.

    Encoders differ: a feature's size is 0.15 in one and 3 in another, and a large part of it is a mean that all images
    share. So do the embeddings of language models. Learning rates would mean something else for each pair, and with small
    features or a large mean the output would hardly depend on the image for a long time. `calibrate` therefore measures the
    run's own images once, before the first step. The three buffers are saved with the weights; both operations are linear,
    so an export folds them into the layers before and after.

    forward: [M, N, in_features] -> [M, K, out_features]
    """

    feature_mean: Tensor  # [in_features]
    feature_std: Tensor  # [in_features]
    output_scale: Tensor  # []

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(in_features))
        self.register_buffer("feature_std", torch.ones(in_features))
        self.register_buffer("output_scale", torch.ones(()))

    @staticmethod
    def num_tokens(num_patches: int) -> int:
        return num_patches

    def project(self, features: Tensor) -> Tensor:
        """[M, N, in_features], standardised -> [M, K, out_features], before scaling."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        return self.project((features - self.feature_mean) / self.feature_std) * self.output_scale

    @torch.no_grad()
    def calibrate(self, features: Tensor, output_rms: float) -> None:
        """Set the buffers: features of these images get mean 0 and standard deviation 1 in each dimension; what the initial
        weights make of them gets the root mean square `output_rms`, that of the text embeddings.

        features: [M, N, in_features]. A dimension that hardly varies is not enlarged beyond a thousand times the others.
        """
        vectors = features.float().flatten(0, -2)
        std, mean = torch.std_mean(vectors, dim=0, correction=0)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp(min=max(1e-3 * float(std.square().mean().sqrt()), 1e-12)))
        self.output_scale.fill_(1.0)
        self.output_scale.fill_(output_rms / float(self(features.float()).float().square().mean().sqrt()))


class MLPProjector(Projector):
    """Linear, GELU, Linear, for each patch alone: the projector of LLaVA-1.5.

    Names and order are those of transformers' `LlavaMultiModalProjector`, so an export only renames tensors. hidden_size
    defaults to out_features.

    forward: [M, N, in_features] -> [M, N, out_features]
    """

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int, patches_per_token: int = 1):
        super().__init__(in_features)
        hidden_size = hidden_size or out_features
        self.linear_1 = nn.Linear(patches_per_token * in_features, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, out_features)

    def project(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class MLP(nn.Module):
    """Linear, GELU, Linear inside another projector. [..., in_features] -> [..., out_features]"""

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int):
        super().__init__()
        hidden_size = hidden_size or out_features
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, out_features)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class LowRankMLP(MLPProjector):
    """An MLPProjector with a narrow middle: a tenth of the weights for a language model of width 4096."""

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int):
        super().__init__(in_features, hidden_size or LOW_RANK, out_features)


class PixelShuffle(MLPProjector):
    """Fewer tokens: each square of factor x factor patches becomes one vector, row by row (with 2: top left, top right,
    bottom left, bottom right), of factor squared times the width, then the MLP.

    Nothing is averaged (space to depth, as in InternVL, SmolVLM and nanoVLM).

    forward: [M, N, in_features] -> [M, N / factor^2, out_features], row by row
    """

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int, factor: int = SHUFFLE_FACTOR):
        super().__init__(in_features, hidden_size, out_features, patches_per_token=factor**2)
        self.factor = factor

    @staticmethod
    def num_tokens(num_patches: int, factor: int = SHUFFLE_FACTOR) -> int:
        """Raises InputError if the grid cannot be divided into squares of factor x factor."""
        side = math.isqrt(num_patches)
        if side % factor:
            raise InputError(
                f'"model.projector" is pixel_shuffle, which joins squares of {factor} x {factor} patches, but the grid of '
                f"the encoder is {side} x {side}; use an encoder (or, where it allows several, a model.image_size) with a "
                f"multiple of {factor} patches a side, another model.pixel_shuffle_factor, or another projector, such as "
                "mlp or resampler."
            )
        return num_patches // factor**2

    def project(self, features: Tensor) -> Tensor:
        rows = math.isqrt(features.shape[1]) // self.factor
        squares = features.unflatten(1, (rows, self.factor, rows, self.factor)).transpose(2, 3)
        return super().project(squares.flatten(3).flatten(1, 2))  # [M, row * column, factor^2 * in]


class Resampler(Projector):
    """A fixed number of tokens for any number of patches: learned queries attend to the patches by multi-head cross
    attention, then the MLP makes a token of each.

    After the resamplers of Flamingo and Qwen-VL, with one block, normalised before each part. The keys carry the patches'
    positions in the grid, so a query can select by place. The queries are spread over the grid and carry their positions
    too. Query and key matrices start equal, so each query first attends to the patches near it.

    The attention is as wide as the encoder, not as the language model: 4 million weights for CLIP-L.

    forward: [M, N, in_features] -> [M, Q, out_features]
    """

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int, num_queries: int = NUM_QUERIES):
        super().__init__(in_features)
        self.head_size = math.gcd(in_features, HEAD_SIZE)
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, in_features))
        self.norm_patches = nn.LayerNorm(in_features)
        self.query = nn.Linear(in_features, in_features, bias=False)
        self.key = nn.Linear(in_features, in_features, bias=False)
        self.value = nn.Linear(in_features, in_features, bias=False)
        self.output = nn.Linear(in_features, in_features)
        self.norm = nn.LayerNorm(in_features)
        self.mlp = MLP(in_features, hidden_size, out_features)
        for matrix in (self.query, self.value, self.output):
            nn.init.xavier_uniform_(matrix.weight)  # as torch.nn.MultiheadAttention does
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)

    @staticmethod
    def num_tokens(num_patches: int, num_queries: int = NUM_QUERIES) -> int:
        return num_queries

    def project(self, features: Tensor) -> Tensor:
        side, width = math.isqrt(features.shape[1]), features.shape[2]
        patches = self.norm_patches(features)
        positions = functools.partial(grid_positions, side=side, width=width, device=features.device)
        keys = patches + positions(side, side).to(patches.dtype)
        rows = _squarest_rows(len(self.queries))
        queries = self.queries + positions(rows, len(self.queries) // rows)
        seen = F.scaled_dot_product_attention(
            self._heads(self.query(queries.to(patches.dtype)).expand(len(features), -1, -1)),
            self._heads(self.key(keys)),
            self._heads(self.value(patches)),
        )  # [M, heads, Q, head_size]
        tokens = self.queries + self.output(seen.transpose(1, 2).flatten(2))  # [M, Q, in]
        return self.mlp(self.norm(tokens))

    def _heads(self, vectors: Tensor) -> Tensor:
        """[M, T, in] -> [M, heads, T, head_size]."""
        return vectors.unflatten(2, (-1, self.head_size)).transpose(1, 2)


def _squarest_rows(count: int) -> int:
    """Return the rows of the squarest grid of `count` points."""
    return next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)


def grid_positions(rows: int, columns: int, *, side: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return sinusoidal positions [rows * columns, width], float32, of a grid of points in an image of side x side patches.

    The points are evenly spaced and in row-major order. The first half of a vector encodes the distance from the top, the
    second half the distance from the left, as sines and cosines of amplitude PLACE_SCALE (Vaswani et al. 2017). The highest
    frequency is a quarter turn a patch, the lowest a quarter turn an image.
    """
    quarter = -(-width // 4)  # a width that is not a multiple of four loses some of the last cosines
    frequencies = math.pi / 2 * side ** (-torch.arange(quarter, device=device) / max(1, quarter - 1))

    def waves(count: int) -> Tensor:
        centres = (torch.arange(count, device=device) + 0.5) * (side / count) - 0.5  # 0, 1, 2, ... if count is side
        angles = centres[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, 2 * quarter]

    down, right = waves(rows).repeat_interleave(columns, dim=0), waves(columns).repeat(rows, 1)
    return PLACE_SCALE * torch.cat([down, right], dim=1)[:, :width]


PROJECTORS: dict[str, type[Projector]] = {
    "mlp": MLPProjector,
    "low_rank_mlp": LowRankMLP,
    "pixel_shuffle": PixelShuffle,
    "resampler": Resampler,
}


# Options that one kind has: config key -> (kind, argument)
OPTIONS = {"num_queries": ("resampler", "num_queries"), "pixel_shuffle_factor": ("pixel_shuffle", "factor")}


def num_image_tokens(kind: str, num_patches: int, **options: int | None) -> int:
    """Return how many image tokens the projector `kind` makes of `num_patches`, without building it.

    options: of OPTIONS; None for the kind's default. Raises InputError for an unknown kind, for an option of another kind,
    and for a grid that the kind cannot take.
    """
    return _kind(kind).num_tokens(num_patches, **_arguments(kind, options))


def build_projector(
    kind: str, in_features: int, hidden_size: int | None, out_features: int, **options: int | None
) -> Projector:
    """Build the projector `kind` from the encoder's width to the language model's.

    hidden_size: of its MLP; options: of OPTIONS; None for the kind's default. Raises InputError for an unknown kind and for
    an option of another kind.
    """
    make: Callable[..., Projector] = _kind(kind)
    return make(in_features, hidden_size, out_features, **_arguments(kind, options))


def _kind(kind: str) -> type[Projector]:
    return choose(PROJECTORS, kind, "model.projector")


def _arguments(kind: str, options: dict[str, int | None]) -> dict[str, int]:
    found = {}
    for key, value in options.items():
        owner, argument = OPTIONS[key]
        if value is not None and kind != owner:
            raise InputError(
                f'"model.{key}" is {value}, but model.projector is {kind}, which does not use it; set model.{key} to null, '
                f"or model.projector to {owner}."
            )
        if value is not None:
            found[argument] = value
    return found
