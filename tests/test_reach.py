"""What `make test` leaves out of its second pass cannot reach the operators."""

import pytest
from reach import TESTS, reaches_operators

pytestmark = pytest.mark.once
FILES = sorted(TESTS.rglob("test_*.py"))
REACHES = [
    "import embeddings.ops",
    "def test():\n    from embeddings import Slab",
    "from train import main",
    "from hydra.utils import instantiate",
    "from builders import make_bags",  # a helper that imports it
    "def test(kernels):\n    pass",
    "PROGRAM = 'from embeddings import native'",
    "subprocess.run(['python', 'train.py'])",
]
REACHES_NOT = ["import torch", "from dlrm.trainer import Trainer", "from data import table", "words = 'embeddings/C1'"]


@pytest.mark.parametrize("source", REACHES + REACHES_NOT)
def test_every_way_to_the_operators_is_seen(source, tmp_path):
    (tmp_path / "builders.py").write_text("import embeddings")
    (tmp_path / "test_it.py").write_text(source)
    assert reaches_operators(tmp_path / "test_it.py") == (source in REACHES)


def test_every_test_of_the_embeddings_reaches_them_and_none_of_the_data_does_but_through_hydra():
    assert all(reaches_operators(path) for path in FILES if path.parent.name == "embeddings")
    data = [path for path in FILES if path.parent.name == "data" and "hydra" not in path.read_text()]
    assert len(data) >= 6 and not any(map(reaches_operators, data))
