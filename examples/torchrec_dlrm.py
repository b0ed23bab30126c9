"""TorchRec's DLRM with its EmbeddingBagCollection replaced by ours: a backend for each table, the model untouched.

make torchrec && python examples/torchrec_dlrm.py

Synthetic: five features with up to three ids each, of 50,000; clicks follow a hidden score of every id.
"""

from functools import partial

import torch
import torchrec
from torch import Tensor
from torchrec.models.dlrm import DLRM

from embeddings import Bloom, Dense, EmbeddingBagCollection, EmbeddingBagConfig, Fast, Hashed

NUM_IDS, DIM, BATCH = 50_000, 16, 1024
BACKENDS = {
    "user": partial(Hashed, compression=0.1),
    "item": partial(Hashed, compression=0.2, block=8),
    "shop": partial(Bloom, compression=0.1),
    "tag": Fast,
    "hour": Dense,
}
FEATURES = list(BACKENDS)
hidden = torch.randn(len(FEATURES), NUM_IDS, generator=torch.Generator().manual_seed(7))


def draw(generator: torch.Generator) -> tuple[Tensor, torchrec.KeyedJaggedTensor, Tensor]:
    """A batch: dense [B, 4], sparse features, labels [B, 1]."""
    lengths = torch.randint(0, 4, (len(FEATURES), BATCH), generator=generator)
    popular = torch.rand(int(lengths.sum()), generator=generator).pow(8)
    ids = (popular * NUM_IDS).long()
    features = torchrec.KeyedJaggedTensor.from_lengths_sync(FEATURES, ids, lengths.flatten())
    feature_of = torch.arange(len(FEATURES) * BATCH).repeat_interleave(lengths.flatten())
    score = torch.zeros(BATCH).index_add(0, feature_of % BATCH, hidden[feature_of // BATCH, ids])
    labels = (torch.rand(BATCH, generator=generator) < score.sigmoid()).float()
    return torch.randn(BATCH, 4, generator=generator), features, labels[:, None]


torch.manual_seed(0)
tables = [EmbeddingBagConfig(NUM_IDS, DIM, name, backend=backend) for name, backend in BACKENDS.items()]
collection = EmbeddingBagCollection(tables)  # was: torchrec.EmbeddingBagCollection(tables)
model = DLRM(collection, 4, dense_arch_layer_sizes=[32, DIM], over_arch_layer_sizes=[64, 1])
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
generator = torch.Generator().manual_seed(1)
losses = []
for step in range(301):
    dense, features, labels = draw(generator)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, features), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 100 == 0:
        print(f"step {step:3}: log loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
kept = sum(tensor.numel() * tensor.element_size() for tensor in collection.state_dict().values())
dense_bytes = len(tables) * NUM_IDS * DIM * 4
print(f"{kept / 2**20:.1f} MiB of embeddings in {len(collection.slabs)} launches; dense: {dense_bytes / 2**20:.1f} MiB")
assert sum(losses[-50:]) / 50 < 0.62  # of guessing: 0.693
