"""id -> vector, in less memory: the grouped collection that the trainer uses, its backends and its optimizers.

Shapes: B batch, F features, D dim (embedding_dim), N ids of the batch, S slots of a slab, Z width of a slot
(D = chunks * Z).
"""

from embeddings.collection import EmbeddingBags
from embeddings.dense import Dense
from embeddings.hashed import Hashed
from embeddings.slab import seed_of

__all__ = ["Dense", "EmbeddingBags", "Hashed", "seed_of"]
