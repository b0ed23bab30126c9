"""mixed_dimensions: shorter vectors for larger tables."""

import math


def mixed_dimensions(
    num_embeddings: list[int], embedding_dim: int, alpha: float, *, power_of_two: bool = False, threshold: int = 0
) -> list[int]:
    """Each table's embedding_dim by the popularity rule of Ginart et al. (ISIT 2021): the fewer ids, the longer.

    The smallest table gets embedding_dim, the others that times (smallest / n) ** alpha, rounded, at least 1; with
    power_of_two each of these is then rounded to one, embedding_dim too. Tables of at most `threshold` ids keep
    embedding_dim. Raises ValueError for alpha < 0 or numbers below 1.
    """
    if not num_embeddings or min(num_embeddings) < 1 or embedding_dim < 1:
        raise ValueError(f"num_embeddings={num_embeddings} and embedding_dim={embedding_dim} must be at least 1")
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha} must be at least 0: 0 gives every table embedding_dim")
    smallest = min(num_embeddings)
    dims = [max(1, round(embedding_dim * (smallest / n) ** alpha)) for n in num_embeddings]
    if power_of_two:
        dims = [2 ** round(math.log2(dim)) for dim in dims]
    return [embedding_dim if n <= threshold else dim for n, dim in zip(num_embeddings, dims, strict=True)]
