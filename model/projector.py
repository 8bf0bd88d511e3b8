"""Patch features -> image features in the language model's width: the kinds of projector, and how many tokens each makes
of a picture. Knows no encoder and no language model.

A projector is a class: `__init__(in_features, hidden_size, out_features)`, where hidden_size None is its own default;
`num_tokens(num_patches)`, known without weights; `forward`, [M, N, in_features] -> [M, K, out_features] with K the former.

Shapes: M images, N patches an image (a square grid, row by row), K image tokens an image, Q queries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import InputError, choose

NUM_QUERIES = 32  # tokens a picture takes with a resampler
LOW_RANK = 384  # the middle of the low-rank MLP
PLACE_SCALE = 2.0  # of the resampler's places beside what the patches show: first looks that tell neighbours apart
HEAD_SIZE = 64  # of the resampler's attention; the usual encoders' widths are multiples of it


class MLPProjector(nn.Module):
    """Linear, GELU, Linear, for each patch alone: the projector of LLaVA-1.5 (names and order as transformers'
    `LlavaMultiModalProjector`, so that an export is a renaming). In the middle, by default, the width of what comes out.

    forward: [M, N, in_features] -> [M, N, out_features]
    """

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int):
        super().__init__()
        hidden_size = hidden_size or out_features
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, out_features)

    @staticmethod
    def num_tokens(num_patches: int) -> int:
        return num_patches

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class LowRankMLP(MLPProjector):
    """The same with a narrow middle: for a 4096 wide language model a tenth of the weights."""

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int):
        super().__init__(in_features, hidden_size or LOW_RANK, out_features)


class PixelShuffle(MLPProjector):
    """Four times fewer tokens: each square of 2 x 2 patches becomes one vector of four times the width (top left, top right,
    bottom left, bottom right), then the MLP. Nothing is averaged away (space to depth, as in InternVL and SmolVLM).

    forward: [M, N, in_features] -> [M, N / 4, out_features], again row by row
    """

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int):
        super().__init__(4 * in_features, hidden_size, out_features)

    @staticmethod
    def num_tokens(num_patches: int) -> int:
        """InputError where the grid cannot be cut into squares of 2 x 2."""
        side = math.isqrt(num_patches)
        if side % 2:
            raise InputError(
                f'"model.projector" is pixel_shuffle, which joins squares of 2 x 2 patches, but the encoder\'s grid is '
                f"{side} x {side}; take an encoder (or, where it allows several, a model.image_size) with an even number of "
                "patches a side, or another projector, such as mlp or resampler."
            )
        return num_patches // 4

    def forward(self, features: Tensor) -> Tensor:
        half = math.isqrt(features.shape[1]) // 2
        squares = features.unflatten(1, (half, 2, half, 2)).transpose(2, 3)  # [M, row, column, 2, 2, in]
        return super().forward(squares.flatten(3).flatten(1, 2))


class Resampler(nn.Module):
    """A fixed number of tokens, whatever the number of patches: learned queries look at the patches by multi-head cross
    attention, then the MLP makes each a token (after Flamingo's and Qwen-VL's resamplers; one block, normalised before each
    part). Patches' keys carry their places in the grid, so that a query can ask what is where; queries are spread over the
    grid and carry theirs, and as both matrices begin equal, each first looks at what is near it.

    The attention is as wide as the encoder, not as the language model: for CLIP-L and a 7B, 4 million weights of it.

    forward: [M, N, in_features] -> [M, Q, out_features]
    """

    def __init__(self, in_features: int, hidden_size: int | None, out_features: int, num_queries: int = NUM_QUERIES):
        super().__init__()
        self.head_size = math.gcd(in_features, HEAD_SIZE)
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, in_features))
        self.norm_patches = nn.LayerNorm(in_features)
        self.query = nn.Linear(in_features, in_features, bias=False)
        self.key = nn.Linear(in_features, in_features, bias=False)
        self.value = nn.Linear(in_features, in_features, bias=False)
        self.output = nn.Linear(in_features, in_features)
        self.norm = nn.LayerNorm(in_features)
        self.mlp = MLPProjector(in_features, hidden_size, out_features)
        for matrix in (self.query, self.value, self.output):
            nn.init.xavier_uniform_(matrix.weight)  # as torch's own attention begins
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)

    @staticmethod
    def num_tokens(num_patches: int, num_queries: int = NUM_QUERIES) -> int:
        return num_queries

    def forward(self, features: Tensor) -> Tensor:
        side, width = math.isqrt(features.shape[1]), features.shape[2]
        patches = self.norm_patches(features)
        keys = patches + grid_positions(side, side, side, width, features.device).to(patches.dtype)
        rows = _rows(len(self.queries))
        queries = self.queries + grid_positions(rows, len(self.queries) // rows, side, width, features.device)
        seen = F.scaled_dot_product_attention(
            self._heads(self.query(queries.to(patches.dtype)).expand(len(features), -1, -1)),
            self._heads(self.key(keys)),
            self._heads(self.value(patches)),
        )  # [M, heads, Q, head_size]
        tokens = self.queries + self.output(seen.transpose(1, 2).flatten(2))  # [M, Q, in]
        return self.mlp(self.norm(tokens))

    def _heads(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(2, (-1, self.head_size)).transpose(1, 2)


def _rows(count: int) -> int:
    """Of the grid into which so many points fit: the squarest."""
    return next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)


def grid_positions(rows: int, columns: int, side: int, width: int, device: torch.device | None = None) -> Tensor:
    """The places of a grid of rows x columns points, spread evenly over a picture of side x side patches, row by row, as
    vectors [rows * columns, width] (float32): sines and cosines of how far down, then of how far right, each half of the
    width, PLACE_SCALE high. The waves (Vaswani et al. 2017) turn by a quarter a patch for the first, down to a quarter a
    picture."""
    quarter = -(-width // 4)  # a width that is no multiple of four loses a few of the last cosines
    frequencies = math.pi / 2 * side ** (-torch.arange(quarter, device=device) / max(1, quarter - 1))

    def waves(count: int) -> Tensor:
        centres = (torch.arange(count, device=device) + 0.5) * (side / count) - 0.5  # 0, 1, 2, ... for a point a patch
        angles = centres[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [count, 2 * quarter]

    down, right = waves(rows).repeat_interleave(columns, dim=0), waves(columns).repeat(rows, 1)
    return PLACE_SCALE * torch.cat([down, right], dim=1)[:, :width]


PROJECTORS = {"mlp": MLPProjector, "low_rank_mlp": LowRankMLP, "pixel_shuffle": PixelShuffle, "resampler": Resampler}


def num_image_tokens(kind: str, num_patches: int, num_queries: int | None = None) -> int:
    """How many image tokens the projector `kind` makes of that many patches, without making it. num_queries: of a resampler,
    None for its default. InputError: an unknown kind, queries for another kind, a grid that the kind cannot take."""
    return _kind(kind).num_tokens(num_patches, **_queries(kind, num_queries))


def build_projector(
    kind: str, in_features: int, hidden_size: int | None, out_features: int, num_queries: int | None = None
) -> nn.Module:
    """The projector `kind` from the encoder's width to the language model's. hidden_size: of its MLP; num_queries: of a
    resampler; None for the kind's default. InputError: an unknown kind, queries for another kind."""
    return _kind(kind)(in_features, hidden_size, out_features, **_queries(kind, num_queries))


def _kind(kind: str) -> type[nn.Module]:
    return choose(PROJECTORS, kind, "model.projector")


def _queries(kind: str, num_queries: int | None) -> dict[str, int]:
    if num_queries is None:
        return {}
    if kind != "resampler":
        raise InputError(
            f'"model.num_queries" is {num_queries}, but model.projector is {kind}, which has no queries; set '
            "model.num_queries to null, or model.projector to resampler."
        )
    return {"num_queries": num_queries}
