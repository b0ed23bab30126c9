"""id -> vector, in less memory: drop-in modules, collections, the backends behind them, and their optimizers.

One table each: HashedEmbeddingBag, HashedEmbedding, FastEmbedding, FastMultiEmbedding, BloomEmbedding, ScaledEmbedding,
ZeroEmbedding, ScaledEmbeddingBag, QREmbeddingBag, MultiHashEmbedding. Of many tables: EmbeddingBags, which the trainer
uses, and TorchRec's EmbeddingBagCollection and EmbeddingCollection.

Shapes: B batch, F features, D dim (embedding_dim), N ids of the batch, K probes of an id, S * Z numbers of a slab in
units of Z.
"""

from embeddings.arrangement import seed_of
from embeddings.bloom import Bloom
from embeddings.collection import EmbeddingBags
from embeddings.dense import Dense
from embeddings.fast import Fast
from embeddings.hashed import Hashed
from embeddings.interaction import dot_interaction
from embeddings.jagged import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from embeddings.keyed import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    PoolingType,
)
from embeddings.loading import load_dense
from embeddings.mixed_dimensions import mixed_dimensions
from embeddings.modules import (
    BloomEmbedding,
    FastEmbedding,
    FastMultiEmbedding,
    HashedEmbedding,
    HashedEmbeddingBag,
    MultiHashEmbedding,
    QREmbeddingBag,
    ScaledEmbedding,
    ScaledEmbeddingBag,
    ZeroEmbedding,
)
from embeddings.qr import QR
from embeddings.slab import Slab

__all__ = [
    "QR",
    "Bloom",
    "BloomEmbedding",
    "DataType",
    "Dense",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "EmbeddingBags",
    "EmbeddingCollection",
    "EmbeddingConfig",
    "Fast",
    "FastEmbedding",
    "FastMultiEmbedding",
    "Hashed",
    "HashedEmbedding",
    "HashedEmbeddingBag",
    "JaggedTensor",
    "KeyedJaggedTensor",
    "KeyedTensor",
    "MultiHashEmbedding",
    "PoolingType",
    "QREmbeddingBag",
    "ScaledEmbedding",
    "ScaledEmbeddingBag",
    "Slab",
    "ZeroEmbedding",
    "dot_interaction",
    "load_dense",
    "mixed_dimensions",
    "seed_of",
]

__version__ = "0.1.0"  # said here alone; pyproject.toml reads it without importing torch
