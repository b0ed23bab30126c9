"""The CUDA kernels' source, built for the CPU with sanitizers, gives the reference's bits and keeps to its memory.

Sanitizers must be in a process from its start, so every test runs a Python of its own, which imports this file and
calls one of the functions below. In slow tests each thread of a kernel is a thread of the CPU's, where a sanitizer sees
races. What this cannot show is what nvcc makes of the source.
"""

import ast
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from oracle import ADD, MAPS, MAX, MIXED, PARTITION, SUM, Case, Table, assert_same_bits
from random_calls import DTYPES, calls, random_case
from torch import Tensor

from embeddings import native, reference
from embeddings.index_map import NUM_EMBEDDINGS, POSITION

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.environ.get("EMBEDDINGS_NATIVE") == "off", reason="EMBEDDINGS_NATIVE=off"),
]
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
    try:
        libraries = native.sanitizer_libraries()
    except RuntimeError as error:
        pytest.skip(str(error))
    native.build_cuda_on_host()
    return libraries


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
    assert findings["notes of shared positions"] == [
        "bag_backward",
        "bag_backward_rows",
        "bag_backward_sample_weights",
        "bag_update",
    ]


def test_the_interaction_gives_the_bits_of_the_cpu(findings):
    assert findings["interactions"] == []


@pytest.mark.parametrize("operator", ["bag", "bag_backward"])
def test_a_slice_beyond_the_slab_is_seen_by_the_sanitizer(run, operator):
    """That is, the tests above would have shown an index error."""
    done = run("reach_beyond_the_slab", OPERATORS.index(operator))
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


@pytest.fixture(scope="module")
def run_threads():
    """Calls a function of this file under the thread sanitizer."""
    try:
        library = native.sanitizer_libraries(("libtsan.so",))
    except RuntimeError as error:
        pytest.skip(str(error))
    native.build_cuda_on_threads()
    native.load("require")  # compiled here: the compiler does not bear the sanitizer

    def call(function: str) -> subprocess.CompletedProcess:
        code = f"import test_cuda_on_host as host; host.load('threads'); print(host.{function}())"
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        env = {**os.environ, "LD_PRELOAD": library, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = ["setarch", "-R", sys.executable, "-c", code]  # at addresses that the sanitizer knows
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)

    return call


@pytest.mark.slow
def test_threads_at_once_race_nowhere_and_give_the_bits_of_the_reference(run_threads):
    done = run_threads("findings_of_threads")
    assert done.returncode == 0, done.stderr[-6000:]
    assert ast.literal_eval(done.stdout) == []


@pytest.mark.slow
def test_two_features_that_write_the_same_columns_are_a_race_that_the_sanitizer_sees(run_threads):
    done = run_threads("write_the_same_columns")
    assert done.returncode != 0 and "ThreadSanitizer: data race" in done.stderr


# --- there -----------------------------------------------------------------------------------------------------------


def load(how: str = "host") -> None:
    for name in OPERATORS + INTERACTION:
        schema = str(getattr(torch.ops.embeddings, name).default._schema)
        torch.library.define(f"embeddings_host::{name}", schema[schema.index("(") :])
    build = {"host": native.build_cuda_on_host, "threads": native.build_cuda_on_threads}[how]
    torch.ops.load_library(str(build()))


def findings_of_threads() -> list[str]:
    return differences(25) + interactions(4)


def write_the_same_columns() -> None:
    tables = torch.tensor([Table(f, 0, 4, 4, 0, 4, 4) for f in range(2)])
    case = Case(torch.ones(4, 4), torch.tensor([0, 1, 2, 3]), None, None, tables, 2, 4, 1, 1, PARTITION, ADD, "a\x1fb")
    calls(case, SUM, torch.ones(2, 4))["bag_into"](torch.ops.embeddings_host)


def findings_of_all() -> dict[str, list[str]]:
    return {
        "differences": differences(250),
        "unnoted": unnoted(150),
        "notes of shared positions": notes_of_shared_positions(),
        "interactions": interactions(60),
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
        columns, multiple = dim + num_features * (num_features + 1) // 2, rng.choice([1, 8])
        grad = draw(batch_size, columns + -columns % multiple, dtype=dense_type)
        both = []
        for kernels in (host, here):
            out = kernels.dot_interaction(dense, embedded, multiple)
            both.append((out, *kernels.dot_interaction_backward(grad, dense, embedded, multiple)))
        if not all(torch.equal(x, y) for x, y in zip(*both, strict=True)):
            found.append(f"{seed}: {(batch_size, num_features, dim, multiple)}, {dense_type}, {embedded_type}")
    return found
