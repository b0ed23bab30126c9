"""An independent oracle of the operators: loops over bags, ids, probes and chunks in numpy, hashes in Python integers.

Written from the papers and from the operators' contract, not from `embeddings.reference`: every sum and product in the
order that csrc/bag.h promises and in the accumulator's type, so that results are compared bit for bit.
F features of the slab, G of the batch, K probes of an id.
"""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embeddings.index_map import COLUMN
from embeddings.reference import SEPARATOR
from embeddings.rules import Rule, Step, accumulator, state_shapes

MAPS = PARTITION, MIXED, SIGNED, AFFINE, MURMUR3 = range(5)
COMBINES = ADD, MULTIPLY, CONCAT, WEIGHTED = range(4)
POOLINGS = SUM, MEAN, MAX = range(3)
SORTED, ATOMIC, ROWS = range(3)
APART, PROBES, FEATURES = range(3)  # which probes share a slice: none, those of a feature (bloom), all (a pool)
_MASK = (1 << 64) - 1

# --- which weights an id reads ----------------------------------------------------------------------------------------


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


def affine(id: int, column: int) -> int:
    """hash_func of HashedEmbeddingBag and dlrm_ssm: its literals make the arithmetic that of uint64."""
    return ((id * 9824516537 + column * 57857966300227 + 104729) & _MASK) % 117130198221199


def murmur3(key: bytes, seed: int) -> int:
    """MurmurHash3_x86_32 (Appleby, MurmurHash3.cpp) of whole 4-byte blocks, as an int32."""

    def rotate(x: int, r: int) -> int:
        return (x << r | x >> (32 - r)) & 0xFFFFFFFF

    h = seed & 0xFFFFFFFF
    for i in range(0, len(key), 4):
        k = int.from_bytes(key[i : i + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        h ^= rotate(k, 15) * 0x1B873593 & 0xFFFFFFFF
        h = (rotate(h, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= len(key)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    h ^= h >> 16
    return h - (h >> 31 << 32)


class Table(NamedTuple):
    """One row of the tensor `tables`: a feature's probe."""

    position: int
    column: int
    dim: int
    width: int
    begin: int
    num_slots: int
    num_embeddings: int
    divisor: int = 1
    seed: int = 0


@functools.lru_cache(2**18)
def reads(table: Table, index_map: int, id: int) -> tuple[tuple[int, bool], ...]:
    """For each chunk of the id's vector: its slot in the table's slice, and whether its numbers are negated."""
    if index_map == PARTITION:
        return ((id // table.divisor % table.num_slots, False),)
    if index_map == MURMUR3:
        key = id.to_bytes(4 if -(2**31) <= id < 2**31 else 8, "little", signed=True)
        return ((murmur3(key, table.seed) % table.num_slots, False),)
    chunks = range(table.dim // table.width)
    if index_map == AFFINE:
        return tuple((affine(id, c) % table.num_slots, False) for c in chunks)
    hashes = [jump(jump(table.seed, id), c) for c in chunks]
    return tuple((h * table.num_slots >> 64, index_map == SIGNED and h % 2 == 1) for h in hashes)


# --- one call ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """The arguments of one call, in the operators' names and order."""

    weights: Tensor
    ids: Tensor
    offsets: Tensor | None
    sample_weights: Tensor | None
    tables: Tensor
    batch_size: int
    columns: int
    probes: int
    chunks: int
    index_map: int
    combine: int
    features: str

    def to(self, device: str) -> "Case":
        return Case(*(x.to(device) if isinstance(x, Tensor) else x for x in self))

    @property
    def how(self) -> tuple[int, ...]:
        return self.probes, self.chunks, self.index_map, self.combine

    def forward(self, kernels, pooling: int, accumulate: int = SORTED) -> Tensor:
        return kernels.bag(*self[:7], *self.how, pooling, accumulate, self.features)

    def forward_into(self, kernels, pooling: int, before: int = 3, after: int = 2) -> Tensor:
        """Into [B, before + columns + after] numbers that are -1 until then."""
        tables = self.tables.clone()
        tables[:, COLUMN] += before
        dtype = torch.promote_types(self.weights.dtype, torch.float32)
        out = self.weights.new_full((self.batch_size, before + self.columns + after), -1, dtype=dtype)
        kernels.bag_into(out, *self[:4], tables, *self.how, pooling, self.features)
        return out

    def backward(self, kernels, grad: Tensor, pooling: int, atomic: bool = False) -> Tensor:
        return kernels.bag_backward(grad, *self[:5], *self.how, pooling, atomic, self.features)

    def backward_rows(self, kernels, grad: Tensor, pooling: int) -> tuple[Tensor, Tensor]:
        return kernels.bag_backward_rows(grad, *self[:5], *self.how, pooling, self.features)

    def backward_sample_weights(self, kernels, grad: Tensor, pooling: int) -> Tensor:
        slab = (self.weights, self.ids, self.offsets, self.tables, *self.how)
        return kernels.bag_backward_sample_weights(grad, *slab, pooling, self.features)

    def update(
        self, kernels, grad: Tensor, pooling: int, rule: Rule = Rule.SGD, weight_decay: float = 0.0
    ) -> tuple[Tensor, ...]:
        """The weights and states after a step."""
        weights = self.weights.clone()
        states = [
            weights.new_full(shape, 0.5, dtype=accumulator(weights.dtype)) for shape in state_shapes(rule, weights)
        ]
        numbers = torch.tensor(
            Step(rule, 0.1, weight_decay, 1e-8, 0.9, 0.99, 0.5, 3).numbers(), dtype=torch.float64, device=weights.device
        )
        slab = (weights, *[*states, None, None][:2], *self[1:5])
        kernels.bag_update(grad, *slab, *self.how, pooling, rule, numbers, self.features)
        return weights, *states

    @property
    def num_features(self) -> int:
        return len(self.tables) // self.probes

    def feature(self, f: int) -> list[Table]:
        """The tables of the slab's feature f, one per probe."""
        return [Table(*row) for row in self.tables[f * self.probes : (f + 1) * self.probes].tolist()]

    def bag(self, f: int, b: int) -> range:
        """Positions in ids of the bag of sample b in the slab's feature f."""
        number = int(self.tables[f * self.probes, 0]) * self.batch_size + b
        if self.offsets is None:
            return range(number, number + 1)
        return range(*self.offsets[number : number + 2].tolist())

    def random_grad(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(self.batch_size, self.columns, generator=generator, dtype=torch.float64)
        return grad.to(self.weights.dtype)


def make_tables(
    rng, positions, *, index_map, combine, probes, dims, width, rows, num_slots, shared
) -> tuple[list[Table], int, int]:
    """Random tables of any kind, the numbers that their slices end at, and the columns of their output."""
    tables, slices, end, column = [], {}, 0, 0
    for f, position in enumerate(positions):
        vectors = probes - (combine == WEIGHTED)
        n = rows[f % len(rows)]
        radix = next(m for m in range(1, n + 1) if m**vectors >= n)
        powers = [radix**k for k in rng.permutation(vectors)]  # remainder first, quotient first, any order
        for k in range(probes):
            own = range(f * probes, (f + 1) * probes) if combine == CONCAT else [f]
            mine = [dims[i % len(dims)] for i in own]
            dim = probes - 1 if k == vectors else mine[k % len(mine)]
            wide = dim if k == vectors or index_map in (PARTITION, MURMUR3) else math.gcd(width, *mine)
            slots = radix if index_map == PARTITION else num_slots + (f * probes + k) * (shared == APART)
            group = {APART: (f, k), PROBES: (f, k == vectors), FEATURES: (k == vectors,)}[shared]
            if (group, wide, slots) not in slices:
                begin = -(-end // wide) * wide + wide * int(rng.integers(0, 2))  # some slots belong to nobody
                slices[group, wide, slots] = begin
                end = begin + slots * wide
            divisor = powers[k] if k < vectors else 1
            begin, seed = slices[group, wide, slots], int(rng.integers(0, 2**63))
            tables.append(Table(position, column, dim, wide, begin, slots, n, divisor, seed))
            column += dim if combine == CONCAT else 0
        column += 0 if combine == CONCAT else tables[-probes].dim
    return tables, end, column


def make_ids(rng, counts, positions, rows, *, ranged: bool, dtype: torch.dtype) -> Tensor:
    """Ids of every bag of the batch; half of them are few and hot, as in real data."""
    high = 2**31 if dtype == torch.int32 else 2**63
    parts = []
    for g, count in enumerate(counts.sum(1).tolist()):
        n = rows[positions.index(g) % len(rows)] if g in positions else 7
        low, limit = (0, n) if ranged else (-high, high)
        ids = rng.integers(low, limit, count)
        hot = rng.random(count) < 0.5
        ids[hot] = rng.integers(0, min(3, n), int(hot.sum()))
        parts.append(ids)
    return torch.tensor(np.concatenate([np.empty(0, int), *parts]), dtype=dtype)


def make_case(
    counts,
    *,
    index_map: int = MIXED,
    combine: int = ADD,
    probes: int = 1,
    dims: tuple[int, ...] = (16,),
    width: int = 8,
    unit: int | None = None,
    rows: tuple[int, ...] = (50,),
    num_slots: int = 37,
    shared: int = APART,
    positions: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
    weighted: bool = False,
    one_id: bool = False,
    seed: int = 0,
) -> Case:
    """A random batch and random tables for it. counts [G, B]: ids of each bag; positions: the slab's features of the
    batch (all if None). dims and rows go round the features (dims: round the probes under CONCAT); a slot has `width`
    numbers where that divides the dims, else their greatest common divisor; unit: Z, the largest possible if None."""
    rng = np.random.default_rng(seed)
    counts = np.asarray(counts, dtype=np.int64)
    positions = tuple(range(len(counts))) if positions is None else positions
    kind = dict(index_map=index_map, combine=combine, probes=probes, shared=shared)
    tables, end, columns = make_tables(rng, positions, **kind, dims=dims, width=width, rows=rows, num_slots=num_slots)
    unit = math.gcd(*(n for table in tables for n in (table.width, table.begin))) if unit is None else unit
    ids = make_ids(rng, counts, positions, rows, ranged=index_map == PARTITION, dtype=ids_dtype)
    return Case(
        weights=torch.tensor(rng.standard_normal((end // unit + 1, unit))).to(dtype),  # the last unit is nobody's
        ids=ids,
        offsets=None if one_id else torch.tensor([0, *counts.flatten().cumsum().tolist()]),
        sample_weights=torch.tensor(rng.standard_normal(len(ids))).to(dtype) if weighted else None,
        tables=torch.tensor(tables, dtype=torch.int64).reshape(-1, 9),
        batch_size=counts.shape[1],
        columns=columns,
        probes=probes,
        chunks=max([table.dim // table.width for table in tables], default=1),
        index_map=index_map,
        combine=combine,
        features=SEPARATOR.join(f"C{p}" for p in positions),
    )


KINDS = {  # what the backends ask for, in small, and what none does
    "dense": dict(index_map=PARTITION),
    "dense of many dims": dict(index_map=PARTITION, dims=(2, 4, 8), rows=(10, 20, 30), unit=2),
    "qr mult": dict(index_map=PARTITION, combine=MULTIPLY, probes=2),
    "qr add of three": dict(index_map=PARTITION, combine=ADD, probes=3),
    "qr concat": dict(index_map=PARTITION, combine=CONCAT, probes=2, dims=(6, 10)),
    "hashed-1": dict(width=1, num_slots=211),
    "hashed-8": dict(width=8),
    "hashed rows": dict(width=16),
    "hashed of many dims": dict(dims=(3, 24, 16, 1), width=12),
    "signed pool": dict(index_map=SIGNED, dims=(8, 24), width=4, shared=FEATURES),
    "affine": dict(index_map=AFFINE, width=1, num_slots=160),
    "bloom": dict(probes=4, width=16, shared=PROBES),
    "bloom of murmur3": dict(index_map=MURMUR3, probes=4, shared=PROBES),
    "bloom learned": dict(combine=WEIGHTED, probes=4, width=16, shared=PROBES),
    "product of signed chunks": dict(index_map=SIGNED, combine=MULTIPLY, probes=3, width=4, num_slots=5),
    "weighted pool of all": dict(index_map=SIGNED, combine=WEIGHTED, probes=3, width=2, shared=FEATURES, num_slots=3),
}

# --- what the operators give ------------------------------------------------------------------------------------------


def ordered_sum(terms) -> np.ndarray:
    """Runs of 64 terms left to right, then the runs left to right: the order of every sum in csrc."""
    runs = [functools.reduce(np.add, terms[i : i + 64]) for i in range(0, len(terms), 64)]
    return functools.reduce(np.add, runs)


class _Slab:
    """A case's slab in the accumulator's type. Vectors are kept, so that a hot id is looked up once."""

    def __init__(self, case: Case):
        self.case = case
        self.real = np.float64 if case.weights.dtype == torch.float64 else np.float32
        self.numbers = self.cast(case.weights).ravel()
        self.tables = [case.feature(f) for f in range(case.num_features)]
        self.probes = functools.cache(self.probes)

    def cast(self, x: Tensor) -> np.ndarray:
        return x.detach().cpu().to(torch.float64).numpy().astype(self.real)

    def chunks(self, table: Table, id: int) -> list[tuple[slice, bool]]:
        """The numbers of the slab that each chunk of the probe's vector is, and whether negated."""
        begins = [
            (table.begin + slot * table.width, negative) for slot, negative in reads(table, self.case.index_map, id)
        ]
        return [(slice(begin, begin + table.width), negative) for begin, negative in begins]

    def probes(self, f: int, id: int) -> list[np.ndarray]:
        """r_0, ..., r_{K-1}: what the id's probes read."""
        return [
            np.concatenate(
                [-self.numbers[s] if negative else self.numbers[s] for s, negative in self.chunks(table, id)]
            )
            for table in self.tables[f]
        ]

    def vector(self, f: int, id: int) -> np.ndarray:
        probes, combine = self.probes(f, id), self.case.combine
        if combine == CONCAT:
            return np.concatenate(probes)
        if combine == WEIGHTED:
            *probes, p = probes
            probes = [p[k] * r for k, r in enumerate(probes)]
        return functools.reduce(np.multiply if combine == MULTIPLY else np.add, probes)

    def shares(self, f: int, id: int, base: np.ndarray) -> list[np.ndarray]:
        """The gradient of each probe's vector, where that of the composed vector is base."""
        probes, combine = self.probes(f, id), self.case.combine
        if combine == ADD:
            return [base] * len(probes)
        if combine == CONCAT:
            return np.split(base, np.cumsum([len(r) for r in probes])[:-1])
        if combine == WEIGHTED:
            *probes, p = probes
            return [base * p_k for p_k in p] + [np.array([ordered_sum(base * r) for r in probes])]
        others = [[r for j, r in enumerate(probes) if j != k] for k in range(len(probes))]
        return [base * functools.reduce(np.multiply, rest) if rest else base for rest in others]

    def columns(self, f: int) -> slice:
        tables = self.tables[f]
        dim = sum(table.dim for table in tables) if self.case.combine == CONCAT else tables[0].dim
        return slice(tables[0].column, tables[0].column + dim)

    def bags(self):
        """f, b, the positions of the bag's ids, the ids and their vectors, in the order of the contract."""
        for f, b in np.ndindex(self.case.num_features, self.case.batch_size):
            bag = self.case.bag(f, b)
            ids = self.case.ids[bag.start : bag.stop].tolist()
            if ids:
                yield f, b, bag, ids, [self.vector(f, id) for id in ids]

    def sample_weights(self) -> np.ndarray | None:
        return None if self.case.sample_weights is None else self.cast(self.case.sample_weights)


def forward(case: Case, pooling: int) -> Tensor:
    """[B, columns]."""
    slab = _Slab(case)
    out, scales = np.zeros((case.batch_size, case.columns), slab.real), slab.sample_weights()
    for f, b, bag, _, vectors in slab.bags():
        if scales is not None:
            vectors = [v * scales[n] for n, v in zip(bag, vectors, strict=True)]
        if pooling == MAX:
            vectors = np.array(vectors)
            pooled = np.take_along_axis(vectors, vectors.argmax(0)[None], 0)[0]
        else:
            pooled = ordered_sum(vectors)
            pooled = pooled / slab.real(len(bag)) if pooling == MEAN else pooled
        out[b, slab.columns(f)] = pooled
    return torch.from_numpy(out).to(case.weights.dtype)


def backward(case: Case, grad: Tensor, pooling: int) -> tuple[Tensor, list[int]]:
    """The gradient of the slab, [S, Z], and the units that ids read, ascending."""
    slab = _Slab(case)
    grads, scales = slab.cast(grad), slab.sample_weights()
    terms = defaultdict(list)  # of each slot, in order
    for f, b, bag, ids, vectors in slab.bags():
        winners = np.array(vectors).argmax(0)
        for i, (n, id) in enumerate(zip(bag, ids, strict=True)):
            base = grads[b, slab.columns(f)]
            if pooling == MAX:
                base = np.where(winners == i, base, slab.real(0))
            base = base if scales is None else base * scales[n]
            base = base / slab.real(len(bag)) if pooling == MEAN else base
            for table, share in zip(slab.tables[f], slab.shares(f, id, base), strict=True):
                chunks = slab.chunks(table, id)
                for (place, negative), term in zip(chunks, share.reshape(len(chunks), -1), strict=True):
                    terms[place.start, place.stop].append(-term if negative else term)
    out = np.zeros(slab.numbers.shape, slab.real)
    for (start, stop), values in terms.items():
        out[start:stop] = ordered_sum(values)
    unit = case.weights.shape[1]
    units = {u for start, stop in terms for u in range(start // unit, stop // unit)}
    return torch.from_numpy(out.reshape(-1, unit)).to(case.weights.dtype), sorted(units)


def backward_sample_weights(case: Case, grad: Tensor, pooling: int) -> Tensor:
    """[N]; zero for the ids of features that the slab does not have."""
    slab = _Slab(case)
    out, grads = np.zeros(len(case.ids), slab.real), slab.cast(grad)
    for f, b, bag, _, vectors in slab.bags():
        for n, vector in zip(bag, vectors, strict=True):
            products = vector * grads[b, slab.columns(f)]
            out[n] = ordered_sum(products / slab.real(len(bag)) if pooling == MEAN else products)
    return torch.from_numpy(out).to(case.weights.dtype)


# --- comparisons ------------------------------------------------------------------------------------------------------


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal as bits: -0.0 is not 0.0, and a NaN equals itself."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    different = (actual.view(bits) != expected.view(bits)).nonzero()
    if len(different):
        first = tuple(different[0].tolist())
        raise AssertionError(
            f"{len(different)} of {actual.numel()} differ, first at {first}: {actual[first]} is not {expected[first]}"
        )


def assert_equals_oracle(case: Case, kernels, pooling: int, device: str = "cpu") -> None:
    """All four operators, bit for bit."""
    there, grad = case.to(device), case.random_grad()
    grad_there = grad.to(device)
    assert_same_bits(there.forward(kernels, pooling), forward(case, pooling))
    slab_grad, units = backward(case, grad, pooling)
    assert_same_bits(there.backward(kernels, grad_there, pooling), slab_grad)
    found_units, values = there.backward_rows(kernels, grad_there, pooling)
    assert found_units.tolist() == units
    assert_same_bits(values, slab_grad[units])
    if pooling != MAX:
        found = there.backward_sample_weights(kernels, grad_there, pooling)
        assert_same_bits(found, backward_sample_weights(case, grad, pooling))


def assert_same_results(case: Case, kernels, others, pooling: int, device: str = "cpu") -> None:
    """All four operators of `kernels` on the device give the bits of `others` on the CPU."""
    there, grad = case.to(device), case.random_grad()
    grad_there = grad.to(device)
    assert_same_bits(there.forward(kernels, pooling), case.forward(others, pooling))
    assert_same_bits(there.backward(kernels, grad_there, pooling), case.backward(others, grad, pooling))
    rows = there.backward_rows(kernels, grad_there, pooling)
    for found, wanted in zip(rows, case.backward_rows(others, grad, pooling), strict=True):
        assert_same_bits(found, wanted)
    if pooling != MAX:
        found = there.backward_sample_weights(kernels, grad_there, pooling)
        assert_same_bits(found, case.backward_sample_weights(others, grad, pooling))
