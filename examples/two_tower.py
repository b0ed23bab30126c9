"""A two-tower retrieval model on torch.nn.EmbeddingBag, and the same one on compressed bags: one argument differs.

python examples/two_tower.py

Synthetic: every user has one of 50 genres, and looks at its popular items most; ten items of a history tell the next.
"""

from functools import partial

import torch
from torch import Tensor, nn

from embeddings import HashedEmbeddingBag, QREmbeddingBag

NUM_ITEMS, NUM_GENRES, DIM, HISTORY = 5_000, 50, 32, 10
ITEM_IDS = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(2))  # ids do not tell genres


class TwoTower(nn.Module):
    """How well items follow histories: dot products of what two towers make of their embeddings."""

    def __init__(self, bag_type) -> None:
        super().__init__()
        self.history, self.item = bag_type(NUM_ITEMS, DIM), bag_type(NUM_ITEMS, DIM)
        self.query = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))

    def forward(self, histories: Tensor, items: Tensor) -> Tensor:
        """[B, I] for histories [B, n] and items [I]."""
        return self.query(self.history(histories)) @ self.item(items[:, None]).T


def draw(num_users: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Histories [num_users, HISTORY], and the items that came next, [num_users]."""
    genres = torch.randint(NUM_GENRES, (num_users, 1), generator=generator)
    ranks = torch.rand(num_users, HISTORY + 1, generator=generator).pow(3) * (NUM_ITEMS // NUM_GENRES)
    items = ITEM_IDS[ranks.long() * NUM_GENRES + genres]
    return items[:, 1:], items[:, 0]


def train(bag_type) -> tuple[float, int]:
    """How often the next item is among the 100 best of all items, and the bytes of the embeddings."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = TwoTower(bag_type)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        histories, items = draw(512, generator)
        loss = nn.functional.cross_entropy(model(histories, items), torch.arange(len(items)))  # others are negatives
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        histories, items = draw(2000, generator)
        best = model(histories, torch.arange(NUM_ITEMS)).topk(100).indices
    hits = (best == items[:, None]).any(1).float().mean().item()
    kept = [*model.history.state_dict().values(), *model.item.state_dict().values()]
    return hits, sum(tensor.numel() * tensor.element_size() for tensor in kept)


BAGS = {
    "torch.nn.EmbeddingBag": partial(nn.EmbeddingBag, mode="mean"),
    "HashedEmbeddingBag": partial(HashedEmbeddingBag, mode="mean", compression=0.1, block=8),
    "QREmbeddingBag": partial(QREmbeddingBag, mode="mean", num_collisions=10),
}
for name, bag_type in BAGS.items():
    hits, num_bytes = train(bag_type)
    print(f"{name:24}{hits:6.1%} of next items among the best 100{num_bytes / 2**20:8.2f} MiB of embeddings")
    assert hits > 0.2  # chance: 2%
