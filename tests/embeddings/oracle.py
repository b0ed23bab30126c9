"""An independent oracle of the operators: loops over bags, ids and chunks in float64, hashes in Python integers.

Written from the papers and from design.md, not from `embeddings.reference`. F features of the slab, G of the batch.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embeddings.reference import SEPARATOR

DENSE, HASHED = 0, 1
SUM, MEAN, MAX = 0, 1, 2
SORTED, ATOMIC, ROWS = 0, 1, 2
_MASK = (1 << 64) - 1


def splitmix64(state: int):
    """The generator as its authors publish it (Vigna, splitmix64.c): unsigned 64-bit outputs, without end."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        yield z ^ (z >> 31)


def jump(seed: int, i: int) -> int:
    """Output number i of splitmix64(seed), i any integer modulo 2^64."""
    return next(splitmix64((seed + i * 0x9E3779B97F4A7C15) & _MASK))


@functools.lru_cache(2**18)
def _slot(first: int, num_slots: int, seed: int, index_map: int, id: int, chunk: int) -> int:
    if index_map == DENSE:
        return first + id
    return first + (jump(jump(seed, id), chunk) * num_slots >> 64)


def slot(table: list[int], index_map: int, id: int, chunk: int) -> int:
    """The slot of the slab that chunk of id reads. table: (position, first slot, slots, num_embeddings, seed)."""
    _, first, num_slots, _, seed = table
    return _slot(first, num_slots, seed, index_map, id, chunk)


class Case(NamedTuple):
    """The arguments of one call, in the operators' names."""

    weights: Tensor
    ids: Tensor
    offsets: Tensor | None
    sample_weights: Tensor | None
    tables: Tensor
    batch_size: int
    dim: int
    index_map: int
    features: str

    def to(self, device: str) -> "Case":
        return Case(*(x.to(device) if isinstance(x, Tensor) else x for x in self))

    def forward(self, kernels, pooling: int, accumulate: int = SORTED) -> Tensor:
        how = (self.batch_size, self.dim, self.index_map, pooling, accumulate, self.features)
        return kernels.bag(self.weights, self.ids, self.offsets, self.sample_weights, self.tables, *how)

    def backward(self, kernels, grad: Tensor, pooling: int, atomic: bool = False) -> Tensor:
        slab = (self.weights, self.ids, self.offsets, self.sample_weights, self.tables, self.index_map, pooling)
        return kernels.bag_backward(grad, *slab, atomic, self.features)

    def backward_rows(self, kernels, grad: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
        slab = (self.weights, self.ids, self.offsets, self.sample_weights, self.tables, self.index_map, pooling)
        return kernels.bag_backward_rows(grad, *slab, self.features)

    def backward_sample_weights(self, kernels, grad: Tensor, pooling: int) -> Tensor:
        slab = (self.weights, self.ids, self.offsets, self.tables, self.index_map, pooling, self.features)
        return kernels.bag_backward_sample_weights(grad, *slab)

    def bag(self, f: int, b: int) -> range:
        """Positions in ids of the bag of sample b in the slab's feature f."""
        number = int(self.tables[f, 0]) * self.batch_size + b
        return (
            range(*self.offsets[number : number + 2].tolist())
            if self.offsets is not None
            else range(number, number + 1)
        )

    def slots(self, f: int, id: int) -> list[int]:
        table = self.tables[f].tolist()
        return [slot(table, self.index_map, id, c) for c in range(self.dim // self.weights.shape[1])]

    def random_grad(self, seed: int = 0) -> Tensor:
        shape = (self.batch_size, self.tables.shape[0], self.dim)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.weights.dtype)


def make_case(
    counts,
    *,
    index_map: int = HASHED,
    width: int = 8,
    dim: int = 16,
    rows: int = 50,
    num_slots: int = 37,
    positions: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
    weighted: bool = False,
    one_id: bool = False,
    seed: int = 0,
) -> Case:
    """A random batch. counts [G, B]: ids of each bag; positions: the slab's features of the batch (all if None)."""
    rng = np.random.default_rng(seed)
    counts = np.asarray(counts, dtype=np.int64)
    positions = tuple(range(len(counts))) if positions is None else positions
    if index_map == DENSE:
        width, num_slots, high = dim, rows, rows
    else:
        high = 2**31 if ids_dtype == torch.int32 else 2**63
    low = 0 if index_map == DENSE else -high
    ids = rng.integers(low, high, int(counts.sum()))
    repeat = rng.random(len(ids)) < 0.5  # half of the ids are few and hot, as in real data
    ids[repeat] = rng.integers(0, min(3, rows), int(repeat.sum()))
    seeds = rng.integers(0, 2**63, len(positions))
    tables = [
        [p, 1 + i * num_slots, num_slots, rows, int(s)] for i, (p, s) in enumerate(zip(positions, seeds, strict=True))
    ]
    weights = rng.standard_normal(
        (2 + len(positions) * num_slots, width)
    )  # a slot before and one after belong to nobody
    return Case(
        weights=torch.tensor(weights).to(dtype),
        ids=torch.tensor(ids, dtype=ids_dtype),
        offsets=None if one_id else torch.tensor([0, *counts.flatten().cumsum().tolist()]),
        sample_weights=torch.tensor(rng.standard_normal(len(ids))).to(dtype) if weighted else None,
        tables=torch.tensor(tables, dtype=torch.int64).reshape(-1, 5),
        batch_size=counts.shape[1],
        dim=dim,
        index_map=index_map,
        features=SEPARATOR.join(f"C{p}" for p in positions),
    )


def _vectors(case: Case, f: int, b: int) -> np.ndarray:
    """[ids of the bag, D] float64."""
    weights = case.weights.double().numpy()
    found = [weights[case.slots(f, int(case.ids[n]))].ravel() for n in case.bag(f, b)]
    return np.array(found).reshape(-1, case.dim)


def _scales(case: Case, f: int, b: int, pooling: int) -> np.ndarray:
    """What each vector of a bag is multiplied by in a sum or mean: [ids of the bag] float64."""
    bag = case.bag(f, b)
    scales = np.ones(len(bag)) if case.sample_weights is None else case.sample_weights.double().numpy()[list(bag)]
    return scales / max(1, len(bag)) if pooling == MEAN else scales


def forward(case: Case, pooling: int) -> np.ndarray:
    """[B, F, D] float64."""
    out = np.zeros((case.batch_size, case.tables.shape[0], case.dim))
    for b, f in np.ndindex(out.shape[:2]):
        vectors = _vectors(case, f, b)
        if pooling == MAX:
            out[b, f] = vectors.max(0) if len(vectors) else 0
        else:
            out[b, f] = _scales(case, f, b, pooling) @ vectors
    return out


def backward(case: Case, grad: Tensor, pooling: int) -> np.ndarray:
    """Gradient of the slab, [S, Z] float64; the first of equal maxima takes it all."""
    out, grads = np.zeros(case.weights.shape), grad.double().numpy()
    width = case.weights.shape[1]
    for b, f in np.ndindex(grads.shape[:2]):
        vectors, scales = _vectors(case, f, b), _scales(case, f, b, pooling)
        for i, n in enumerate(case.bag(f, b)):
            share = np.where(vectors.argmax(0) == i, 1, 0) if pooling == MAX else scales[i]
            for c, s in enumerate(case.slots(f, int(case.ids[n]))):
                out[s] += (grads[b, f] * share)[c * width : (c + 1) * width]
    return out


def backward_sample_weights(case: Case, grad: Tensor, pooling: int) -> np.ndarray:
    """[N] float64; zero for the ids of features that the slab does not have."""
    out, grads = np.zeros(len(case.ids)), grad.double().numpy()
    for b, f in np.ndindex(grads.shape[:2]):
        bag = case.bag(f, b)
        out[list(bag)] = _vectors(case, f, b) @ grads[b, f] / (max(1, len(bag)) if pooling == MEAN else 1)
    return out


def assert_close(actual: Tensor, expected: np.ndarray) -> None:
    """Equal to the float64 oracle up to float32 sums (float64 ones for float64) and one rounding to its type."""
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}[actual.dtype]
    atol = 1e-12 if actual.dtype == torch.float64 else 2e-5  # sums of up to thousands of terms of size 1 that cancel
    np.testing.assert_allclose(actual.detach().cpu().double().numpy(), expected, rtol=rtol, atol=atol)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal as bits: -0.0 is not 0.0, and a NaN equals itself."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    actual, expected = actual.detach().cpu().contiguous().view(bits), expected.detach().cpu().contiguous().view(bits)
    different = (actual != expected).nonzero()
    assert not len(different), f"{len(different)} of {actual.numel()} differ, first at {different[0].tolist()}"
