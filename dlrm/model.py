"""DLRM: bottom MLP on the dense inputs, embeddings for the categorical ones, an interaction, a top MLP, one logit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dlrm.linear import mlp


class DLRM(nn.Module):
    """The deep learning recommendation model; with `interaction=LowRankCross` it is DCN-v2.

    embeddings: called as embeddings(ids, offsets) -> [B, F, D]; has `num_features` and `embedding_dim`.
    num_dense may be 0: then a learned constant stands for the bottom MLP's output, so that its products with the
    embeddings are their first-order terms.
    bottom_mlp, top_mlp: widths of the layers after the input; the last of bottom_mlp is D, the last of top_mlp is 1.
    interaction: called as interaction(F, D) -> a module as `dlrm.interaction` describes.
    Raises ValueError, naming the key, for widths that cannot work. Naumov et al. 2019 (arXiv 1906.00091).
    """

    def __init__(
        self,
        embeddings: nn.Module,
        num_dense: int,
        *,
        embedding_dim: int,
        bottom_mlp: Sequence[int],
        top_mlp: Sequence[int],
        interaction: Callable[..., nn.Module],
    ):
        super().__init__()
        bottom, top = list(bottom_mlp), list(top_mlp)
        _check_widths("bottom_mlp", bottom, last=embedding_dim, meaning="model.embedding_dim")
        _check_widths("top_mlp", top, last=1, meaning="one logit")
        if embeddings.embedding_dim != embedding_dim:
            raise ValueError(f"model.embedding_dim={embedding_dim}, but the embeddings have {embeddings.embedding_dim}")
        self.embeddings = embeddings
        self.bottom = mlp([num_dense, *bottom]) if num_dense else Constant(embedding_dim)
        self.interaction = interaction(embeddings.num_features, embedding_dim)
        self.top = mlp([self.interaction.out_features, *top[:-1]])
        self.head = nn.Linear([self.interaction.out_features, *top][-2], 1)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all but the embeddings anew, as published: weights [m, n] ~ N(0, 2 / (m + n)), biases ~ N(0, 1 / m)."""
        for part in (self.bottom, self.top, self.head):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    m, n = layer.weight.shape
                    nn.init.normal_(layer.weight, std=(2 / (m + n)) ** 0.5, generator=generator)
                    nn.init.normal_(layer.bias, std=(1 / m) ** 0.5, generator=generator)
                elif isinstance(layer, Constant):
                    nn.init.normal_(layer.value, generator=generator)
        if hasattr(self.interaction, "reset_parameters"):
            self.interaction.reset_parameters(generator)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Every parameter but the embeddings': what the dense optimizer updates."""
        of_embeddings = set(self.embeddings.parameters())
        return [parameter for parameter in self.parameters() if parameter not in of_embeddings]

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor | None) -> Tensor:
        """Logits [B], float32 under autocast too. dense: [B, num_dense]; ids, offsets: as the embeddings take them."""
        embedded = self.embeddings(ids, offsets)  # [B, F, D]
        hidden = self.top(self.interaction(self.bottom(dense), embedded))  # [B, top_mlp[-2]]
        # bf16 has 8 significant bits: a logit rounded to it ties with its neighbours and costs AUC
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden[:, : self.head.in_features].float()).squeeze(1)  # [B]


class Constant(nn.Module):
    """One learned vector [D] for every sample, N(0, 1) at the start."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.value = nn.Parameter(torch.empty(embedding_dim))

    def forward(self, dense: Tensor) -> Tensor:
        return self.value.expand(dense.shape[0], -1)  # [B, D]


def _check_widths(key: str, widths: list[int], *, last: int, meaning: str) -> None:
    if not widths or widths[-1] != last:
        raise ValueError(f"model.{key}={widths}: the last width must be {last} ({meaning})")
    if min(widths) < 1:
        raise ValueError(f"model.{key}={widths}: widths must be at least 1")
