"""Patch features -> image features in the language model's width. Knows no encoder and no language model."""

from __future__ import annotations

from torch import Tensor, nn

from config import choose


class MLPProjector(nn.Module):
    """Linear, GELU, Linear, for each patch alone: the projector of LLaVA-1.5 (names and order as transformers'
    `LlavaMultiModalProjector`, so that an export is a renaming).

    forward: [M, N, in_features] -> [M, N, out_features]
    """

    def __init__(self, in_features: int, hidden_size: int, out_features: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, out_features)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


PROJECTORS = {"mlp": MLPProjector}


def build_projector(kind: str, in_features: int, hidden_size: int | None, out_features: int) -> nn.Module:
    """The projector `kind` from the encoder's width to the language model's; hidden_size None means the latter."""
    return choose(PROJECTORS, kind, "model.projector")(in_features, hidden_size or out_features, out_features)
