"""The CUDA kernels' source, built for the CPU with sanitizers, gives the reference's bits and keeps to its memory.

Sanitizers must be in a process from its start, so every test runs a Python of its own, which imports this file and
calls one of the functions below. What this cannot show: races, and what nvcc makes of the source.
"""

import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from embeddings import native, ops, reference
from embeddings.index_map import DIM, NUM_EMBEDDINGS, POSITION, WIDTH
from embeddings.ops import Combine, IndexMap, Pooling

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.environ.get("EMBEDDINGS_NATIVE") == "off", reason="EMBEDDINGS_NATIVE=off")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OPERATORS = ("bag", "bag_backward", "bag_backward_rows", "bag_backward_sample_weights", "raise_noted")


# --- here ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitizers() -> str:
    """The libraries to preload."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no compiler: {compiler[0]}")
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():  # the bare name, where there is no such file
            pytest.skip(f"no {name}: the compiler has no sanitizers to preload")
        paths.append(path)
    native.build_cuda_on_host()
    return ":".join(paths)


@pytest.fixture(scope="module")
def run(sanitizers):
    """Calls a function of this file with numbers, in a sanitized process."""

    def call(function: str, *numbers: int) -> subprocess.CompletedProcess:
        code = f"import test_cuda_on_host as host; host.load(); print(host.{function}{numbers})"
        # memory that nobody wrote holds no zeros, so that reading it shows
        options = "detect_leaks=0:malloc_fill_byte=191:max_malloc_fill_size=1073741824"
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        env = {**os.environ, "LD_PRELOAD": sanitizers, "ASAN_OPTIONS": options, "PYTHONPATH": paths}
        env |= {"UBSAN_OPTIONS": "print_stacktrace=1", "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)

    return call


def assert_finds(done: subprocess.CompletedProcess, expected: str) -> None:
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.strip() == expected


def test_the_cuda_source_gives_the_bits_of_the_reference(run):
    assert_finds(run("differences", 250), "[]")


def test_a_bad_id_or_bag_is_noted_and_not_read(run):
    assert_finds(run("unnoted", 60), "[]")


def test_two_features_at_one_position_are_noted_where_their_ids_cannot_be_numbered(run):
    assert_finds(run("notes_of_shared_positions"), "['bag_backward', 'bag_backward_rows']")


@pytest.mark.parametrize("operator", ["bag", "bag_backward"])
def test_a_slice_beyond_the_slab_is_seen_by_the_sanitizer(run, operator):
    """That is, the tests above would have shown an index error."""
    done = run("reach_beyond_the_slab", OPERATORS.index(operator))
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


# --- there -----------------------------------------------------------------------------------------------------------


def load() -> None:
    for name in OPERATORS:
        schema = str(getattr(torch.ops.embeddings, name).default._schema)
        torch.library.define(f"embeddings_host::{name}", schema[schema.index("(") :])
    torch.ops.load_library(str(native.build_cuda_on_host()))


class Case(NamedTuple):
    """The arguments of one call, in the operators' names."""

    weights: Tensor
    ids: Tensor
    offsets: Tensor | None
    sample_weights: Tensor | None
    tables: Tensor
    batch_size: int
    columns: int
    how: tuple[int, ...]  # probes, chunks, index_map, combine, pooling
    features: str
    grad: Tensor

    def call(self, kernels, name: str, atomic: bool = False):
        batch = (self.ids, self.offsets)
        if name == "bag":
            sizes = (self.batch_size, self.columns)
            how = (*self.how, ops.Accumulate.SORTED, self.features)
            return kernels.bag(self.weights, *batch, self.sample_weights, self.tables, *sizes, *how)
        if name == "bag_backward_sample_weights":
            return kernels.bag_backward_sample_weights(
                self.grad, self.weights, *batch, self.tables, *self.how, self.features
            )
        slab = (self.grad, self.weights, *batch, self.sample_weights, self.tables, *self.how)
        if name == "bag_backward":
            return kernels.bag_backward(*slab, atomic, self.features)
        return kernels.bag_backward_rows(*slab, self.features)


def random_tables(rng: random.Random, positions: list[int], probes: int, index_map: int, combine: int, unit: int):
    """The rows of a valid slab (some slices shared), the numbers of the slab and the columns of the output."""
    one_chunk = index_map in (IndexMap.PARTITION, IndexMap.MURMUR3)
    rows, slices, end, column = [], [], 0, 0
    same_width = unit * rng.randint(1, 4) if rng.random() < 0.5 else None  # so that features can share slices

    def shape() -> tuple[int, int]:
        width = same_width or unit * rng.randint(1, rng.choice([4, 4, 64 // unit, 300 // unit]))
        return (width if one_chunk else width * rng.randint(1, max(1, min(5, 300 // width)))), width

    for position in positions:
        dim, width = shape()
        num_ids, divisor, first = 1, 1, len(rows)
        for k in range(probes):
            if combine == Combine.CONCAT and k:
                dim, width = shape()
            importance = combine == Combine.WEIGHTED and k == probes - 1
            row_dim, row_width = (k, k) if importance else (dim, width)
            shared = [s for s in slices if s[2] == row_width]
            if shared and rng.random() < 0.5:
                begin, num_slots, _ = rng.choice(shared)
            else:
                begin, num_slots = end + unit * rng.randint(0, 2), rng.choice([1, 2, 3, 7, 40])
                end = begin + num_slots * row_width
                slices.append((begin, num_slots, row_width))
            rows.append([position, column, row_dim, row_width, begin, num_slots, 0, divisor, rng.getrandbits(63)])
            num_ids, divisor = num_ids * num_slots, rng.choice([divisor * num_slots, 1, 3])
            column += dim if combine == Combine.CONCAT else 0
        limit = rng.randint(1, min(num_ids, 10**6))
        rows[first:] = [[*row[:NUM_EMBEDDINGS], limit, *row[NUM_EMBEDDINGS + 1 :]] for row in rows[first:]]
        column += 0 if combine == Combine.CONCAT else dim
    return rows, end, column


def random_case(rng: random.Random, index_map: int) -> Case:
    combine, pooling = rng.choice(list(Combine)), rng.choice(list(Pooling))
    dtype, ids_dtype = rng.choice(DTYPES), rng.choice([torch.int32, torch.int64])
    unit = rng.choice([1, 1, 2, 3, 4, 8])
    probes = 1 + unit * rng.randint(1, max(1, 3 // unit)) if combine == Combine.WEIGHTED else rng.randint(1, 4)
    batch_features, batch_size = rng.randint(1, 4), rng.choice([0, 1, 2, 5, 17, 150])
    positions = rng.sample(range(batch_features), rng.randint(1, batch_features))
    with_offsets = rng.random() < 0.6
    columns = -1
    while columns < probes - 1:  # room for the importance vector
        rows, end, columns = random_tables(rng, positions, probes, index_map, combine, unit)
    chunks = max(row[DIM] // row[WIDTH] for row in rows) + rng.randint(0, 1)

    longest = rng.choice([1, 3, 3, 9, 200 if batch_size < 9 else 9])
    counts = [rng.choice([0, 1, rng.randint(0, longest)]) for _ in range(batch_features * batch_size)]
    num_ids = sum(counts) if with_offsets else len(counts)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    high = 2 ** (31 if ids_dtype == torch.int32 else 62)
    ids = torch.randint(-high, high, (num_ids,), generator=generator)
    hot = torch.randint(0, 3, (num_ids,), generator=generator)
    ids = torch.where(torch.rand(num_ids, generator=generator) < 0.5, hot, ids)
    offsets = torch.tensor([0, *counts]).cumsum(0) if with_offsets else None
    if index_map == IndexMap.PARTITION:
        for position, limit in {(row[POSITION], row[NUM_EMBEDDINGS]) for row in rows}:
            bags = slice(position * batch_size, (position + 1) * batch_size)
            places = slice(int(offsets[bags.start]), int(offsets[bags.stop])) if with_offsets else bags
            ids[places] %= limit

    def numbers(*shape: int, offset: int) -> Tensor:
        """Of any alignment."""
        flat = torch.randn(offset + max(1, torch.Size(shape).numel()), generator=generator, dtype=torch.float64)
        return flat.to(dtype)[offset : offset + torch.Size(shape).numel()].view(shape)

    weighted = pooling != Pooling.MAX and rng.random() < 0.5
    grad = numbers(batch_size, columns, offset=rng.choice([0, 1]))
    return Case(
        weights=numbers(end // unit + rng.randint(0, 2), unit, offset=rng.choice([0, 0, 1, 8])),
        ids=ids.to(ids_dtype),
        offsets=offsets,
        sample_weights=numbers(num_ids, offset=0) if weighted else None,
        tables=torch.tensor(rows),
        batch_size=batch_size,
        columns=columns,
        how=(probes, chunks, int(index_map), int(combine), int(pooling)),
        features=reference.SEPARATOR.join(f"C{position}" for position in positions),
        grad=grad.t().contiguous().t() if rng.random() < 0.3 else grad,
    )


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.element_size()]
    same_kind = found.dtype == wanted.dtype and found.shape == wanted.shape
    return same_kind and found.contiguous().view(bits).equal(wanted.contiguous().view(bits))


def close(found: Tensor, wanted: Tensor, terms: int) -> bool:
    """Equal but for the order of a sum of so many numbers of about the result's size, and one rounding to its type."""
    finfo = torch.finfo(wanted.dtype)
    of_sums = torch.finfo(torch.promote_types(wanted.dtype, torch.float32)).eps
    atol = max(terms, 8) * of_sums * max(1.0, float(wanted.double().abs().max()) if wanted.numel() else 0)
    return torch.allclose(found.double(), wanted.double(), rtol=2 * finfo.eps, atol=atol)


def differences(num_cases: int) -> list[str]:
    """What the two do differently."""
    found = []
    for seed in range(num_cases):
        case = random_case(random.Random(seed), list(IndexMap)[seed % len(IndexMap)])
        for name in OPERATORS[:4]:
            ours, wanted = case.call(torch.ops.embeddings_host, name), case.call(reference, name)
            ours, wanted = (x if isinstance(x, tuple) else (x,) for x in (ours, wanted))
            if not all(map(same_bits, ours, wanted)):
                found.append(f"{name} of case {seed}")
        wanted = case.call(reference, "bag_backward")
        if not close(case.call(torch.ops.embeddings_host, "bag_backward", atomic=True), wanted, case.ids.numel()):
            found.append(f"atomic bag_backward of case {seed}")
        torch.ops.embeddings_host.raise_noted(case.weights, case.features)
    return found


def unnoted(num_cases: int) -> list[str]:
    """Calls with bad ids, offsets or positions of which nothing was said."""
    found = []
    for seed in range(num_cases):
        rng = random.Random(seed)
        case = random_case(rng, rng.choice([IndexMap.PARTITION, IndexMap.MIXED]))
        while case.batch_size == 0 or case.ids.numel() == 0:
            case = random_case(rng, rng.choice([IndexMap.PARTITION, IndexMap.MIXED]))
        kind = rng.choice(["ids"] if case.how[2] == IndexMap.PARTITION else ["position"])
        kind = rng.choice([kind, "offsets"]) if case.offsets is not None else kind
        nasty = [-1, 10**6 + 1, 2**31 - 1, -(2**31)] + [2**62, 2**63 - 1, -(2**63)] * (case.ids.dtype == torch.int64)
        if kind == "ids":
            case.ids[:] = rng.choice(nasty)
        elif kind == "position":
            case.tables[: case.how[0], 0] = rng.choice([-1, 4, 2**40, 2**63 - 1, -(2**63)])
        else:
            num_ids = case.ids.numel()
            bad = rng.choice([-1, 0, num_ids // 2, num_ids, num_ids + 1, 2**62, -(2**63)])  # or, rarely, a good one
            case.offsets[rng.randrange(case.offsets.numel())] = bad
        for name in OPERATORS[:4]:
            try:
                case.call(torch.ops.embeddings_host, name)
                torch.ops.embeddings_host.raise_noted(case.weights, case.features)
            except RuntimeError as error:
                words = {"ids": "id out of range", "position": "no bags for feature", "offsets": "offsets must"}[kind]
                moved = kind == "offsets" and "id out of range" in str(error)  # an id came to a feature with fewer
                if words not in str(error) and not moved:
                    found.append(f"{name} of case {seed}, {kind}: {error}")
                continue
            try:
                case.call(reference, name)
            except RuntimeError:
                found.append(f"{name} of case {seed}, {kind}")
    return found


def notes_of_shared_positions() -> list[str]:
    """The operators that refuse two features with the bags of one, of which there are more than the batch has ids."""
    rows = [[0, 4 * f, 4, 4, 4 * f, 1, 0, 1, 0] for f in range(2)]
    case = Case(
        torch.ones(2, 4), torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3]), None, torch.tensor(rows), 2, 8,
        (1, 1, IndexMap.MIXED, Combine.ADD, Pooling.SUM), reference.SEPARATOR.join(["a", "b"]), torch.ones(2, 8)
    )  # fmt: skip
    noted = []
    for name in OPERATORS[:4]:
        case.call(torch.ops.embeddings_host, name)
        try:
            torch.ops.embeddings_host.raise_noted(case.weights, case.features)
        except RuntimeError as error:
            assert "feature b: another feature of its slab has the same position 0" in str(error)
            noted.append(name)
    return noted


def reach_beyond_the_slab(operator: int) -> None:
    """One slot more than the slab has; max pooling, so that every operator reads the weights."""
    case = Case(
        torch.ones(3, 4), torch.tensor([0, 3]), None, None, torch.tensor([[0, 0, 4, 4, 0, 4, 4, 1, 0]]), 2, 4,
        (1, 1, IndexMap.PARTITION, Combine.ADD, Pooling.MAX), "a", torch.ones(2, 4)
    )  # fmt: skip
    case.call(torch.ops.embeddings_host, OPERATORS[operator])
