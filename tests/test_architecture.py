"""The house's rules: imports go down only, and nothing unpickles. Read from the sources with ast, so nothing is run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["data", "dlrm", "embeddings"]
OURS = {*FLOORS, "train"}
ALLOWED = {"embeddings": {"embeddings"}, "data": {"data"}, "dlrm": {"dlrm", "embeddings", "data"}, "train": OURS}
SOURCES = [*(path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))), ROOT / "train.py"]
SOURCES = [path for path in SOURCES if path.exists()]
pytestmark = pytest.mark.once
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Every module that the source imports anywhere, functions included; a relative one begins with a dot."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def test_the_reader_of_imports_sees_every_kind():
    source = (
        "import a.b\nfrom c import d\ndef f():\n    from . import e\n    importlib.import_module('g'), __import__('h')"
    )
    assert imports(source) == {"a.b", "c", "c.d", ".", "..e", "g", "h"}


def test_every_floor_has_sources():
    assert {floor_of(path) for path in SOURCES} >= set(FLOORS)


@each_source
def test_imports_go_down_only(path):
    tops = {name.split(".")[0] for name in imports(path.read_text())}
    assert tops & OURS <= ALLOWED[floor_of(path)]


@each_source
def test_dlrm_takes_only_the_batch_type_from_data(path):
    if floor_of(path) == "dlrm":
        from_data = {name for name in imports(path.read_text()) if name.split(".")[0] == "data"}
        assert from_data <= {"data.batch", "data.batch.Batch"}


@each_source
def test_only_train_imports_hydra(path):
    tops = {name.split(".")[0] for name in imports(path.read_text())}
    assert not tops & {"hydra", "omegaconf"} or floor_of(path) == "train"


@each_source
def test_only_native_reaches_csrc(path):
    if floor_of(path) != "embeddings" or path.name != "native.py":
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert "csrc" not in strings
        assert not any(name.startswith("torch.utils.cpp_extension") for name in imports(path.read_text()))


@each_source
def test_nothing_unpickles(path):
    source = path.read_text()
    tops = {name.split(".")[0] for name in imports(source)}
    assert not tops & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        called = ast.unparse(node.func)
        if called in ("torch.load", "load"):
            assert keywords.get("weights_only", True) is True, f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", False) is False, f"line {node.lineno}"
        assert called not in ("eval", "exec"), f"line {node.lineno}"
