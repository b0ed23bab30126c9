"""Which kernels and devices the operator tests run on.

EMBEDDINGS_NATIVE=auto|require|off says how a process gets its kernels (`embeddings.native`); `make test` runs the suite
with require and, of it, --operators with off. The reference half of an operator test calls `embeddings.reference`
directly, in both.
"""

import os
from pathlib import Path

import pytest
import torch
from reach import reaches_operators

from embeddings import native, ops, reference

ON_CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(scope="session")
def native_kernels():
    """The compiled operators; skips where they are switched off, fails where they are required and cannot be built."""
    if os.environ.get("EMBEDDINGS_NATIVE") == "off":
        pytest.skip("EMBEDDINGS_NATIVE=off")
    if not native.ensure():
        pytest.skip("the compiled kernels are not available here; EMBEDDINGS_NATIVE=require says why")
    assert ops.IndexMap.PARTITION == 0  # importing embeddings.ops is what declares torch.ops.embeddings
    return torch.ops.embeddings


@pytest.fixture(scope="session", params=["native", "reference"])
def kernels(request):
    """bag, bag_backward, bag_backward_rows and bag_backward_sample_weights, compiled and in plain torch."""
    return request.getfixturevalue("native_kernels") if request.param == "native" else reference


@pytest.fixture(scope="session", params=["cpu", ON_CUDA])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def pytest_addoption(parser):
    words = "only tests that the choice of kernels can change: of files that reach embeddings/, and not marked once"
    parser.addoption("--operators", action="store_true", help=words)


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    is_left_out = config.getoption("--operators") and collection_path.name.startswith("test_")
    return True if is_left_out and not reaches_operators(collection_path) else None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--operators"):
        once = [item for item in items if item.get_closest_marker("once")]
        config.hook.pytest_deselected(items=once)
        items[:] = [item for item in items if item not in set(once)]


def pytest_report_header() -> str:
    return f"kernels: EMBEDDINGS_NATIVE={os.environ.get('EMBEDDINGS_NATIVE', 'auto')}"
