"""Building the kernels: once, whoever asks; never at import; and a compiler that fails is told of in its own words."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.environ.get("EMBEDDINGS_NATIVE") == "off", reason="EMBEDDINGS_NATIVE=off"),
]

LOAD = """
import torch
from embeddings import native, ops
loaded = native.load({mode!r})
batch = (torch.ones(4, 2), torch.tensor([1, 3]), None, None, torch.tensor([[0, 0, 2, 2, 0, 4, 4, 1, 0]]), 2)
args = (*batch, 2, 1, 1, 0, 0, 0, 0, "C1")
print(loaded, torch.ops.embeddings.bag(*args).sum().item())
"""


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch"])  # imported once, for all that come from it; embeddings is in none of them


def start(code: str, cache: Path, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **environment}
    env.pop("EMBEDDINGS_NATIVE", None)
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def run(code: str, cache: Path, **environment: str) -> tuple[int, str, str]:
    """As finish(start(...)), in a process that has torch already."""
    with tempfile.TemporaryDirectory() as folder:
        process = PROCESSES.Process(target=_execute, args=(code, folder, {"XDG_CACHE_HOME": str(cache), **environment}))
        process.start()
        process.join(timeout=180)
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    return process.exitcode, out, err


def _execute(code: str, folder: str, environment: dict[str, str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ |= environment
    os.environ.pop("EMBEDDINGS_NATIVE", None)
    exec(code, {"__name__": "__main__"})


def load(mode: str, cache: Path, **environment: str) -> tuple[int, str, str]:
    return run(LOAD.format(mode=mode), cache, **environment)


def compiler(folder: Path, script: str) -> str:
    """A compiler that is this shell script."""
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


PLANTED = """case "$*" in *-dump*) echo 1.2.3; exit 0;; esac
echo "bag.cpp:1:1: error: the planted words" >&2
exit 1"""


def libraries(cache: Path) -> list[Path]:
    return list(cache.rglob("*.so"))


@pytest.mark.slow
def test_two_processes_building_at_once_both_get_the_one_library(tmp_path):
    both = [start(LOAD.format(mode="require"), tmp_path) for _ in range(2)]
    results = [finish(process) for process in both]
    assert [(status, out) for status, out, _ in results] == [(0, "True 4.0\n")] * 2, results
    assert len(libraries(tmp_path)) == 1
    assert sum("kernels: compiling" in err for *_, err in results) == 1
    stamp = libraries(tmp_path)[0].stat().st_mtime_ns
    status, out, err = load("require", tmp_path)  # and a third finds it, silently
    assert (status, out, err) == (0, "True 4.0\n", "")
    assert libraries(tmp_path)[0].stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_killed_build_is_not_mistaken_for_a_finished_one(tmp_path):
    slow = compiler(tmp_path, 'case "$*" in *-dump*) exec c++ "$@";; esac\nexec sleep 60')
    first = start(LOAD.format(mode="require"), tmp_path, CXX=slow)
    while "compiling" not in first.stderr.readline():
        assert first.poll() is None
    (folder,) = (path.parent for path in tmp_path.rglob("lock"))
    os.killpg(first.pid, signal.SIGKILL)  # with its ninja and its compiler
    first.communicate()
    for name in ("bag.o", "embeddings.part.so"):  # what a compiler or linker leaves when it is cut off
        (folder / name).write_bytes(b"\x7fELF, half")
    assert not (folder / "embeddings.so").exists()
    fast = compiler(tmp_path, 'exec c++ "$@"')  # the same command, so the same key
    status, out, err = load("require", tmp_path, CXX=fast)
    assert (status, out) == (0, "True 4.0\n"), err
    assert "compiling" in err


def test_auto_with_a_broken_compiler_says_why_in_one_line_and_works(tmp_path):
    status, out, err = load("auto", tmp_path, CXX=compiler(tmp_path, PLANTED))
    assert (status, out) == (0, "False 4.0\n"), err
    (line,) = (line for line in err.splitlines() if not line.startswith("kernels: compiling"))
    assert line.startswith("kernels: reference") and "the planted words" in line and len(line) < 300
    assert not libraries(tmp_path)


def test_auto_with_bin_false_for_a_compiler_says_so_and_works(tmp_path):
    status, out, err = load("auto", tmp_path, CXX="/bin/false")
    assert (status, out) == (0, "False 4.0\n"), err
    assert len([line for line in err.splitlines() if line.startswith("kernels: reference")]) == 1
    assert len(err.splitlines()) <= 2 and max(map(len, err.splitlines())) < 300


def test_require_with_a_broken_compiler_raises_with_its_words(tmp_path):
    status, out, err = load("require", tmp_path, CXX=compiler(tmp_path, PLANTED))
    assert status == 1 and out == ""
    assert "RuntimeError: native=require" in err and "bag.cpp:1:1: error: the planted words" in err


def test_a_missing_compiler_is_named_with_what_to_do(tmp_path):
    status, _, err = load("require", tmp_path, CXX="no-such-c++")
    assert status == 1 and "no-such-c++" in err and "install" in err


def test_a_compiler_with_arguments_is_understood(tmp_path):
    status, _, err = load("require", tmp_path, CXX=f"env {compiler(tmp_path, PLANTED)}")  # as in CXX="ccache g++"
    assert status == 1 and "the planted words" in err


def test_a_cache_that_cannot_be_written_is_no_end_of_the_run(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    status, out, err = load("auto", tmp_path / "file")
    assert (status, out) == (0, "False 4.0\n"), err
    assert "kernels: reference" in err


def test_off_builds_nothing(tmp_path):
    status, out, err = load("off", tmp_path, CXX=compiler(tmp_path, PLANTED))
    assert (status, out, err) == (0, "False 4.0\n", "")
    assert not list((tmp_path).rglob("*.ninja"))


def test_an_unknown_mode_is_refused_with_those_known(tmp_path):
    status, _, err = load("of", tmp_path)
    assert status == 1 and "ValueError: native='of' is not one of auto, require, off" in err


def test_require_after_off_and_off_after_require_are_refused():
    code = "from embeddings import native\nnative.load({!r})\nnative.load({!r})"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    status, _, err = run(code.format("off", "require"), cache)
    assert status == 1 and "RuntimeError: native=require" in err
    status, _, err = run(code.format("require", "off"), cache)
    assert status == 1 and "ValueError: native=off" in err


def test_importing_embeddings_builds_nothing_and_is_fast(tmp_path):
    code = "import time, torch\nt = time.perf_counter()\nimport embeddings\nprint(time.perf_counter() - t)"
    status, out, err = run(code, tmp_path, CXX=compiler(tmp_path, PLANTED))
    assert status == 0 and err == ""
    assert float(out) < 2  # beside torch's own import; 0.05 s on an idle core
    assert [path.name for path in tmp_path.iterdir()] == ["fake-c++"]


def test_a_new_source_is_a_new_library(tmp_path):
    root = tmp_path / "copy"
    for folder in ("embeddings", "csrc"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom embeddings import native\nprint(native._key(False))"
    keys = []
    for change in ("", "// changed\n"):
        with open(root / "csrc/index_map.h", "a") as header:
            header.write(change)
        status, out, err = run(code, tmp_path)
        keys.append(out)
        assert status == 0, err
    assert keys[0] != keys[1]


class HeapInfo(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc tells what its heap holds")
def test_calls_leave_nothing_on_the_heap(native_kernels):
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapInfo
    names, calls = "C" * 100, 2000
    table = torch.tensor([[0, 0, 2, 2, 0, 4, 4, 1, 0]])
    batch = (torch.ones(4, 2), torch.tensor([1, 3]), None, None, table, 2, 2, 1, 1, 0, 0, 0, 0, names)

    def held() -> int:
        for _ in range(calls):
            torch.ops.embeddings.bag(*batch)
        return mallinfo2().uordblks

    first = held()
    assert held() - first < calls * len(names) / 10


LINK = """
from pathlib import Path
import torch
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from embeddings import native, ops
native._devices = lambda: ["90"]
torch.ops.load_library(str(native._run_ninja(Path({folder!r}), native._ninja_file(cuda=True))))
print(all(has_kernel(f"embeddings::{{name}}", device) for name in {names} for device in ("CPU", "CUDA")))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is None or shutil.which("nvcc") is None, reason="needs nvcc and a CUDA build of torch"
)
def test_with_a_cuda_build_of_torch_the_cuda_kernels_link_and_load_also_where_there_is_no_gpu(tmp_path):
    names = ["bag", "bag_into", "bag_backward", "bag_backward_rows", "bag_backward_sample_weights", "bag_update"]
    names += ["dot_interaction", "dot_interaction_backward"]
    code, out, err = finish(start(LINK.format(folder=str(tmp_path), names=names), tmp_path))
    assert (code, out) == (0, "True\n"), err
