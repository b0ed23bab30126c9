"""Which kernels and devices the operator tests run on.

EMBEDDINGS_NATIVE=auto|require|off says how a process gets its kernels (`embeddings.native`); `make test` runs the suite
with require and, less what is marked once, with off. An operator test is handed its kernels and calls them directly,
also the reference, whatever that variable says: once, too.
"""

import gc
import os
from types import ModuleType

import pytest
import torch

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


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Marks as once the tests that are handed their kernels, and those of data/ and dlrm/, which are handed their
    embeddings, but for files that import them."""
    for item in items:
        is_apart = item.path.parent.name in ("data", "dlrm") and not uses_operators(item.module)
        if is_apart or {"kernels", "native_kernels"} & set(item.fixturenames):
            item.add_marker(pytest.mark.once)


def pytest_collection_finish():
    """Takes modules and tests, all to stay, out of what the collector walks: each train.py in here calls it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or duckdb says of each of its types that it leaks


def uses_operators(module: ModuleType) -> bool:
    """Whether anything in a module is of embeddings, or of what can build them by name."""
    origins = (getattr(x, "__module__", None) or getattr(x, "__name__", "") for x in vars(module).values())
    return any(str(origin).partition(".")[0] in ("embeddings", "hydra", "train") for origin in origins)


def pytest_report_header() -> str:
    return f"kernels: EMBEDDINGS_NATIVE={os.environ.get('EMBEDDINGS_NATIVE', 'auto')}"
