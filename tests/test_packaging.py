"""What `pip install .` gives another project: the package `embeddings` with csrc inside, and nothing of the trainer."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import embeddings
from embeddings import native

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.once
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Another project's first minute: block = D, so the one id owns its slot, and SGD with lr 1 on the sum takes exactly 1.
STEP = """
import importlib.util, json, torch, embeddings
from embeddings import EmbeddingBags, Hashed, native
native.load("require")
hashed = Hashed(embedding_dim=8, compression=0.5, accumulate="sorted", init="fair", block=8, hash="mixed", sign=False,
                shared=False)
bags = EmbeddingBags({"user": hashed}, {"user": 100}, pooling="sum", seed=0)
ids = torch.tensor([7])
before = bags(ids).detach()
bags(ids).sum().backward()
torch.optim.SGD(bags.parameters(), lr=1.0).step()
print(json.dumps({"package": embeddings.__file__, "csrc": str(native.CSRC), "version": embeddings.__version__,
                  "exact": bags(ids).equal(before - 1),
                  "trainer": [name for name in ("data", "dlrm", "train") if importlib.util.find_spec(name)]}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pins(file: str) -> dict[str, str]:
    """name -> version of the lines name==version."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, the trainer included, where a build may leave what it likes."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("embeddings", "csrc", "data", "dlrm", "conf"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "cache"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """Built where `import torch` fails: a build that runs the package to learn its version ends here."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "torch.py").write_text("raise ImportError('a build must not import torch')")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, checkout, cwd=folder, PYTHONPATH=str(folder))
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_with_csrc_inside_and_nothing_else(wheel):
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "embeddings").rglob("*.py")}
    csrc = {f"embeddings/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    info = f"compressed_embeddings-{embeddings.__version__}.dist-info"
    about = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == package | csrc | about
        assert archive.read("embeddings/csrc/bag.h") == (ROOT / "csrc/bag.h").read_bytes()


def test_the_version_is_said_once(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        assert message_from_bytes(archive.read(metadata))["Version"] == embeddings.__version__
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]


def test_the_embeddings_alone_require_torch_and_ninja(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        required = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    assert {Requirement(line).name for line in required if "extra ==" not in line} == {"torch", "ninja"}


def test_a_wheel_reads_its_own_csrc_and_a_checkout_the_one_beside_the_package(wheel, checkout, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    where = "import embeddings.native as native; print(native.__file__, native.CSRC)"
    for folder, csrc in ((tmp_path, "embeddings/csrc"), (checkout, "csrc")):
        out = run(sys.executable, "-c", where, cwd=folder)
        assert out.split() == [str(folder / "embeddings/native.py"), str(folder / csrc)]
    assert native.CSRC == ROOT / "csrc"


@pytest.mark.parametrize(
    ("extras", "files"),
    [
        (["trainer"], ["requirements.txt"]),
        (["trainer", "dev"], ["requirements.txt", "requirements-dev.txt"]),
        (["trainer", "torchrec"], ["requirements.txt", "requirements-torchrec.txt"]),
        (["trainer", "joblib", "submitit", "optuna"], ["requirements.txt", "requirements-launchers.txt"]),
    ],
)
def test_pins_lie_within_the_declared_ranges(extras, files):
    declared = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in PROJECT["optional-dependencies"][extra]),
    ]
    pinned = {name: version for file in files for name, version in pins(file).items()}
    # hydra-core brings omegaconf, and its version is part of what a config means
    assert set(pinned) - {"omegaconf"} == {Requirement(line).name for line in declared}
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(pinned[requirement.name]), f"{requirement}, pinned {pinned}"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("EMBEDDINGS_NATIVE") == "off", reason="it builds the kernels itself")
def test_an_empty_environment_builds_and_trains_with_the_wheel_then_with_an_editable_install(wheel, checkout, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    cache = tmp_path / "cache"
    # the wheel's own dependencies, at our pins: the newest torch may bring several GB of CUDA libraries
    from_wheel = ["--constraint", ROOT / "requirements.txt", wheel]
    editable = ["--no-deps", "--editable", checkout]
    for arguments, folder, csrc in ((from_wheel, site, "embeddings/csrc"), (editable, checkout, "csrc")):
        run(python, "-m", "pip", "install", "--quiet", *arguments, cwd=tmp_path)
        # -I: neither this folder nor PYTHONPATH is searched
        told = json.loads(run(python, "-I", "-c", STEP, cwd=tmp_path, XDG_CACHE_HOME=str(cache)))
        assert told == {
            "package": str(folder / "embeddings/__init__.py"),
            "csrc": str(folder / csrc),
            "version": embeddings.__version__,
            "exact": True,
            "trainer": [],
        }
        # the same sources are the same library: the editable install compiles nothing
        assert len(list(cache.rglob("embeddings.so"))) == 1
