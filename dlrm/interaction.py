"""How the features' vectors meet: each class turns a dense vector and F embeddings into one row for the top MLP.

Contract: `Interaction(num_features, embedding_dim, *, ...)` has `out_features: int`; its forward takes dense [B, D] and
embedded [B, F, D], and returns [B, out_features], or zeros in more columns, as `dlrm.linear.alignment` says. V = F + 1
vectors interact.
"""

import torch
from torch import Tensor, nn

from dlrm import linear
from embeddings import dot_interaction


class DotInteraction(nn.Module):
    """The dense vector, then the dot product of every pair of vectors: [B, D + V (V-1) / 2].

    Pairs (i, j), j < i, come row by row, the strictly lower triangle. Naumov et al. 2019, section 2.1.3 and figure 1.
    """

    def __init__(self, num_features: int, embedding_dim: int):
        super().__init__()
        self.out_features = embedding_dim + num_features * (num_features + 1) // 2

    def forward(self, dense: Tensor, embedded: Tensor) -> Tensor:
        return dot_interaction(dense, embedded, linear.alignment(dense.device))


class LowRankCross(nn.Module):
    """DCN-v2's low-rank cross layers: x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l, where x_0 is all vectors in a row.

    Returns [B, V D]. Weights start as Xavier normal, biases as zero, as in torchrec. Wang et al. 2021, eqs. 1 and 2.
    Raises ValueError for num_layers or rank below 1.
    """

    def __init__(self, num_features: int, embedding_dim: int, *, num_layers: int, rank: int):
        super().__init__()
        for name, value in (("num_layers", num_layers), ("rank", rank)):
            if value < 1:
                raise ValueError(f"model.interaction.{name}={value}: must be at least 1")
        width = (num_features + 1) * embedding_dim
        self.narrow = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(num_layers))
        self.widen = nn.ModuleList(nn.Linear(rank, width) for _ in range(num_layers))
        self.out_features = width
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for narrow, widen in zip(self.narrow, self.widen, strict=True):
            nn.init.xavier_normal_(narrow.weight, generator=generator)
            nn.init.xavier_normal_(widen.weight, generator=generator)
            nn.init.zeros_(widen.bias)

    def forward(self, dense: Tensor, embedded: Tensor) -> Tensor:
        first = torch.cat([dense, embedded.flatten(1)], dim=1)  # [B, V * D]
        x = first
        for narrow, widen in zip(self.narrow, self.widen, strict=True):
            x = first * widen(narrow(x)) + x
        return x
