"""The CUDA kernels' source, built for the CPU with sanitizers, gives the reference's bits and keeps to its memory.

Sanitizers must be in a process from its start, so every test runs a Python of its own, which imports this file and
calls one of the functions below. What this cannot show: races, and what nvcc makes of the source.
"""

import ast
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from oracle import (
    ADD,
    APART,
    COMBINES,
    FEATURES,
    MAPS,
    MAX,
    MIXED,
    PARTITION,
    POOLINGS,
    PROBES,
    SUM,
    WEIGHTED,
    Case,
    Table,
    assert_same_bits,
    make_case,
)
from torch import Tensor

from embeddings import native, reference
from embeddings.index_map import BEGIN, NUM_EMBEDDINGS, POSITION
from embeddings.rules import Rule, accumulator

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.environ.get("EMBEDDINGS_NATIVE") == "off", reason="EMBEDDINGS_NATIVE=off"),
]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OPERATORS = (
    "bag",
    "bag_into",
    "bag_backward",
    "bag_backward_rows",
    "bag_backward_sample_weights",
    "bag_update",
    "raise_noted",
)
INTERACTION = ("dot_interaction", "dot_interaction_backward")


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
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)

    return call


@pytest.fixture(scope="module")
def findings(run) -> dict[str, list[str]]:
    """What one sanitized process found: to start it takes as long as to look."""
    done = run("findings_of_all")
    assert done.returncode == 0, done.stderr[-6000:]
    return ast.literal_eval(done.stdout)


def test_the_cuda_source_gives_the_bits_of_the_reference(findings):
    assert findings["differences"] == []


def test_a_bad_id_or_bag_is_noted_and_not_read(findings):
    assert findings["unnoted"] == []


def test_two_features_at_one_position_are_noted_where_their_ids_cannot_be_numbered(findings):
    assert findings["notes of shared positions"] == ["bag_backward", "bag_backward_rows", "bag_update"]


def test_the_interaction_gives_the_bits_of_the_cpu(findings):
    assert findings["interactions"] == []


@pytest.mark.parametrize("operator", ["bag", "bag_backward"])
def test_a_slice_beyond_the_slab_is_seen_by_the_sanitizer(run, operator):
    """That is, the tests above would have shown an index error."""
    done = run("reach_beyond_the_slab", OPERATORS.index(operator))
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


# --- there -----------------------------------------------------------------------------------------------------------


def load() -> None:
    for name in OPERATORS + INTERACTION:
        schema = str(getattr(torch.ops.embeddings, name).default._schema)
        torch.library.define(f"embeddings_host::{name}", schema[schema.index("(") :])
    torch.ops.load_library(str(native.build_cuda_on_host()))


def findings_of_all() -> dict[str, list[str]]:
    return {
        "differences": differences(250),
        "unnoted": unnoted(150),
        "notes of shared positions": notes_of_shared_positions(),
        "interactions": interactions(60),
    }


def random_case(rng: random.Random, index_map: int) -> tuple[Case, int, Tensor]:
    """A call of any shape, its pooling and a gradient for it; slices and tensors begin at any number of the memory."""
    combine, pooling = rng.choice(COMBINES), rng.choice(POOLINGS)
    unit = rng.choice([1, 1, 2, 3, 4, 8])
    # whole units also in the last probe of a weighted sum, of K - 1 numbers
    probes = 1 + unit * rng.randint(1, max(1, 3 // unit)) if combine == WEIGHTED else rng.randint(1, 4)
    width = unit * rng.randint(1, rng.choice([4, 4, 64 // unit, 300 // unit]))
    features, batch_size = rng.randint(1, 4), rng.choice([0, 1, 2, 5, 17, 150])

    def dim() -> int:
        chunks = rng.randint(1, max(1, min(5, 300 // width)))
        return rng.choice([width, chunks * width, chunks * width, unit * rng.randint(1, 8)])

    longest = rng.choice([1, 3, 3, 9, 200 if batch_size < 9 else 9])
    counts = [rng.choice([0, 1, rng.randint(0, longest)]) for _ in range(features * batch_size)]
    one_id = rng.random() < 0.4
    digits = probes - (combine == WEIGHTED)  # of an id, where it has a limit
    case = make_case(
        np.array([1] * len(counts) if one_id else counts, int).reshape(features, batch_size),
        index_map=index_map,
        combine=combine,
        probes=probes,
        dims=tuple(dim() for _ in range(rng.randint(1, features * probes))),
        width=width,
        unit=unit,
        rows=tuple(min(10**6, rng.randint(1, rng.choice([1, 2, 3, 7, 40]) ** digits)) for _ in range(features)),
        num_slots=rng.choice([1, 2, 3, 7, 40]),
        shared=rng.choice([APART, PROBES, FEATURES]),
        positions=tuple(rng.sample(range(features), rng.randint(1, features))),
        dtype=rng.choice(DTYPES),
        ids_dtype=rng.choice([torch.int32, torch.int64]),
        weighted=pooling != MAX and rng.random() < 0.5,
        one_id=one_id,
        seed=rng.getrandbits(60),
    )
    generator = torch.Generator().manual_seed(rng.getrandbits(60))

    def numbers(*shape: int, offset: int, dtype: torch.dtype) -> Tensor:
        """The last ones of their memory, `offset` numbers from its beginning."""
        flat = torch.randn(offset + max(1, math.prod(shape)), generator=generator, dtype=torch.float64)
        return flat.to(dtype)[offset : offset + math.prod(shape)].view(shape)

    begins, slice_of = case.tables[:, BEGIN].unique(return_inverse=True)
    gaps = torch.tensor([rng.randint(0, 2) for _ in begins]).cumsum(0)  # units that belong to nobody
    case.tables[:, BEGIN] += unit * gaps[slice_of]
    num_units = len(case.weights) - 1 + int(gaps[-1]) + rng.randint(0, 2)
    own, of_sums = case.weights.dtype, accumulator(case.weights.dtype)
    weights = numbers(num_units, unit, offset=rng.choice([0, 0, 1, 8]), dtype=own)
    grad = numbers(batch_size, case.columns, offset=rng.choice([0, 1]), dtype=rng.choice([own, of_sums]))
    if case.sample_weights is not None and rng.random() < 0.5:
        case = case._replace(sample_weights=case.sample_weights.to(of_sums))
    grad = grad.t().contiguous().t() if rng.random() < 0.3 else grad
    return case._replace(weights=weights, chunks=case.chunks + rng.randint(0, 1)), pooling, grad


def calls(case: Case, pooling: int, grad: Tensor, seed: int = 0) -> dict[str, Callable]:
    """Operator -> function of the kernels that calls it."""
    how = list(Rule)[seed // len(MAPS) % len(Rule)], seed % 2 * 0.01  # of the update: its rule and weight decay
    return {
        "bag": lambda kernels: case.forward(kernels, pooling),
        "bag_into": lambda kernels: case.forward_into(kernels, pooling),
        "bag_backward": lambda kernels: case.backward(kernels, grad, pooling),
        "bag_backward_rows": lambda kernels: case.backward_rows(kernels, grad, pooling),
        "bag_backward_sample_weights": lambda kernels: case.backward_sample_weights(kernels, grad, pooling),
        "bag_update": lambda kernels: case.update(kernels, grad, pooling, *how),
    }


def close(found: Tensor, wanted: Tensor, terms: int) -> bool:
    """Equal but for the order of a sum of so many numbers of about the result's size, and one rounding to its type."""
    finfo = torch.finfo(wanted.dtype)
    of_sums = torch.finfo(torch.promote_types(wanted.dtype, torch.float32)).eps
    atol = max(terms, 8) * of_sums * max(1.0, float(wanted.double().abs().max()) if wanted.numel() else 0)
    return torch.allclose(found.double(), wanted.double(), rtol=2 * finfo.eps, atol=atol)


def differences(num_cases: int) -> list[str]:
    """What the two do differently."""
    native.load("require")
    found, host = [], torch.ops.embeddings_host
    for seed in range(num_cases):
        case, pooling, grad = random_case(random.Random(seed), MAPS[seed % len(MAPS)])
        for name, call in calls(case, pooling, grad, seed).items():
            # torch's own square roots of float64 are not the nearest numbers; the CPU kernel's are
            right = torch.ops.embeddings if name == "bag_update" else reference
            ours, wanted = (x if isinstance(x, tuple) else (x,) for x in (call(host), call(right)))
            try:
                for x, y in zip(ours, wanted, strict=True):
                    assert_same_bits(x, y)
            except AssertionError as error:
                found.append(f"{name} of case {seed}: {error}")
        atomic, wanted = case.backward(host, grad, pooling, atomic=True), case.backward(reference, grad, pooling)
        if not close(atomic, wanted, case.ids.numel()):
            found.append(f"atomic bag_backward of case {seed}")
        host.raise_noted(case.weights, case.features)
    return found


def unnoted(num_cases: int) -> list[str]:
    """Calls with bad ids, offsets or positions of which nothing was said."""
    found, host = [], torch.ops.embeddings_host
    for seed in range(num_cases):
        rng = random.Random(seed)
        case, pooling, grad = random_case(rng, rng.choice([PARTITION, MIXED]))
        while case.batch_size == 0 or case.ids.numel() == 0:
            case, pooling, grad = random_case(rng, rng.choice([PARTITION, MIXED]))
        kind = rng.choice(["ids"] if case.index_map == PARTITION else ["position"])
        kind = rng.choice([kind, "offsets"]) if case.offsets is not None else kind
        nasty = [-1, 10**6 + 1, 2**31 - 1, -(2**31)] + [2**62, 2**63 - 1, -(2**63)] * (case.ids.dtype == torch.int64)
        if kind == "ids":
            case.ids[:] = rng.choice([*nasty, int(case.tables[:, NUM_EMBEDDINGS].max())])
        elif kind == "position":
            case.tables[: case.probes, POSITION] = rng.choice([-1, 4, 2**40, 2**63 - 1, -(2**63)])
        else:
            num_ids, last = case.ids.numel(), case.offsets.numel() - 1
            place = rng.choice([0, last, rng.randint(0, last)])
            neighbour = int(case.offsets[abs(place - 1)])  # of the first and the last: in order, but some ids uncovered
            bad = [-1, 0, num_ids // 2, num_ids, num_ids + 1, 2**62, -(2**63), neighbour]  # or, rarely, a good one
            case.offsets[place] = rng.choice(bad)
        for name, call in calls(case, pooling, grad).items():
            try:
                call(host)
                host.raise_noted(case.weights, case.features)
            except RuntimeError as error:
                words = {"ids": "id out of range", "position": "no bags for feature", "offsets": "offsets must"}[kind]
                moved = kind == "offsets" and "id out of range" in str(error)  # an id came to a feature with fewer
                if words not in str(error) and not moved:
                    found.append(f"{name} of case {seed}, {kind}: {error}")
                continue
            try:
                call(reference)
            except RuntimeError:
                found.append(f"{name} of case {seed}, {kind}")
    return found


def notes_of_shared_positions() -> list[str]:
    """The operators that refuse two features with the bags of one, of which there are more than the batch has ids."""
    tables = torch.tensor([Table(0, 4 * f, 4, 4, 4 * f, 1, 0) for f in range(2)])
    batch = (torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3]), None, tables, 2)
    case = Case(torch.ones(2, 4), *batch, 8, 1, 1, MIXED, ADD, oracle.SEPARATOR.join(["a", "b"]))
    noted = []
    for name, call in calls(case, SUM, torch.ones(2, 8)).items():
        call(torch.ops.embeddings_host)
        try:
            torch.ops.embeddings_host.raise_noted(case.weights, case.features)
        except RuntimeError as error:
            assert "feature b: another feature of its slab has the same position 0" in str(error)
            noted.append(name)
    return noted


def reach_beyond_the_slab(operator: int) -> None:
    """One slot more than the slab has; max pooling, so that every operator reads the weights."""
    batch = (torch.tensor([0, 3]), None, None, torch.tensor([Table(0, 0, 4, 4, 0, 4, 4)]), 2)
    case = Case(torch.ones(3, 4), *batch, 4, 1, 1, PARTITION, ADD, "a")
    calls(case, MAX, torch.ones(2, 4))[OPERATORS[operator]](torch.ops.embeddings_host)


def interactions(num_cases: int) -> list[str]:
    """Shapes and types of which the CUDA source and the CPU kernels make different bits."""
    native.load("require")
    found, host, here = [], torch.ops.embeddings_host, torch.ops.embeddings
    shapes = [(1, 130, 70), (2, 90, 3), (20, 26, 16), (3, 26, 128), (0, 2, 3), (2, 0, 3), (2, 3, 0)]
    for seed in range(num_cases):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        drawn = rng.choice([1, 2, 9, 33]), rng.randint(1, 30), rng.choice([1, 3, 4, 8, 10, 33, 72])
        batch_size, num_features, dim = shapes[seed] if seed < len(shapes) else drawn
        dense_type, embedded_type = rng.choice([(x, x) for x in DTYPES] + [(torch.bfloat16, torch.float32)])
        offset = rng.choice([0, 1])  # numbers from where 16 bytes are aligned

        def draw(*shape: int, dtype: torch.dtype, generator=generator, offset=offset) -> Tensor:
            flat = torch.randn(offset + math.prod(shape), generator=generator).to(dtype)
            return flat[offset:].view(shape)

        dense = draw(batch_size, dim, dtype=dense_type)
        embedded = draw(batch_size, num_features, dim, dtype=embedded_type)
        grad = draw(batch_size, dim + num_features * (num_features + 1) // 2, dtype=dense_type)
        both = [
            (kernels.dot_interaction(dense, embedded), *kernels.dot_interaction_backward(grad, dense, embedded))
            for kernels in (host, here)
        ]
        if not all(torch.equal(x, y) for x, y in zip(*both, strict=True)):
            found.append(f"{seed}: {(batch_size, num_features, dim)}, {dense_type}, {embedded_type}")
    return found
