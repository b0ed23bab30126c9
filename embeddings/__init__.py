"""id -> vector, in less memory: the grouped collection that the trainer uses, its backends and its optimizers.

Shapes: B batch, F features, D dim (embedding_dim), N ids of the batch, K probes of an id, S * Z numbers of a slab in
units of Z.
"""

from embeddings.arrangement import seed_of
from embeddings.bloom import Bloom
from embeddings.collection import EmbeddingBags
from embeddings.dense import Dense
from embeddings.fast import Fast
from embeddings.hashed import Hashed
from embeddings.qr import QR
from embeddings.slab import Slab

__all__ = ["QR", "Bloom", "Dense", "EmbeddingBags", "Fast", "Hashed", "Slab", "seed_of"]

__version__ = "0.1.0"  # said here alone; pyproject.toml reads it without importing torch
