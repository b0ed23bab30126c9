"""A hashed embedding in a plain torch model: 100 million ids of 16 numbers in 0.6 MB instead of 6.4 GB.

python examples/hashed_embedding.py
"""

import torch
from torch import nn

from embeddings import HashedEmbedding

torch.manual_seed(0)
embedding = HashedEmbedding(100_000_000, 16, compression=1e-4)
model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(2 * 16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
pairs, labels = torch.randint(0, 100_000_000, (512, 2)), torch.randint(0, 2, (512, 1)).float()  # learned by heart
for step in range(101):
    loss = nn.functional.binary_cross_entropy_with_logits(model(pairs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}: log loss {loss.item():.3f}")
print(f"{embedding.weight_size * 4 / 1e6:.1f} MB of weights, where torch.nn.Embedding would keep 6400 MB")
assert loss < 0.2
