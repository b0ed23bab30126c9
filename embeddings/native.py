"""The compiled kernels: built with ninja on first use, loaded once, and the only door to csrc.

Once loaded, the kernels take precedence in torch's dispatcher over the reference of `embeddings.reference`, which stays
the fallback. Which of the two runs is said in one line, never silently.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
# a wheel carries csrc inside the package; a checkout, and so an editable install, has it beside
CSRC = (PACKAGE if (PACKAGE / "csrc").is_dir() else PACKAGE.parent) / "csrc"
MODES = ("auto", "require", "off")
ARCHITECTURES = ("80", "90")  # A100, H100 and H200

# No contraction of a*b + c and no fast math: every device must give the same bits.
CXX_FLAGS = (
    "-std=c++20 -O3 -march=native -ffp-contract=off -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
)
CUDA_FLAGS = (
    "-std=c++20 -O3 --fmad=false --expt-relaxed-constexpr --Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden"
)
# For tests only. Lines of a report (-g1) and checks for null, which address has too, would be a third of the
# compilation.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=null,vptr -fno-sanitize-recover=all"
SANITIZED_FLAGS = f"{CXX_FLAGS} -O0 {SANITIZERS}"  # the last -O counts: half of the compilation of -O1
# The CUDA kernels as C++ for the CPU, where sanitizers see every index: slow.
HOST_FLAGS = f"-std=c++20 -O0 -x c++ {SANITIZERS} -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
# The same with a thread of the CPU's for each of theirs, where a sanitizer sees races: slower yet. Of what a
# thread has of its own, GCC 12's sanitizer misreads the size where that is not placed when the thread begins.
THREADS_FLAGS = HOST_FLAGS.replace(SANITIZERS, "-fsanitize=thread -ftls-model=initial-exec -DEMBEDDINGS_THREADS")
DEFINES = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10: one source for every later torch


def load(mode: str = "auto") -> bool:
    """Make the compiled kernels available and say whether they are; the first call decides for the process.

    mode: "auto" falls back to the reference with one line that says why, "require" raises RuntimeError with the
    compiler's words, "off" keeps to the reference. Raises ValueError for another mode, and for "off" once
    the kernels are loaded; RuntimeError also for "require" once the reference was chosen.
    """
    if mode not in MODES:
        raise ValueError(f"native={mode!r} is not one of {', '.join(MODES)}")
    if not _decided:
        _decided.append(mode != "off" and _try_to_load(mode))
    if mode == "require" and not _decided[0]:
        raise RuntimeError("native=require, but this process has already chosen the reference kernels")
    if mode == "off" and _decided[0]:
        raise ValueError("native=off, but this process has already loaded the compiled kernels")
    return _decided[0]


_decided: list[bool] = []  # empty, or the answer: torch cannot unload a library, so it holds for the process


def _try_to_load(mode: str) -> bool:
    try:
        torch.ops.load_library(str(build()))
    except (OSError, RuntimeError) as error:
        if mode == "require":
            raise RuntimeError(f"native=require, but the kernels cannot be built:\n{error}") from error
        print(f"kernels: reference (the compiled ones are not available: {_first_line(error)})", file=sys.stderr)
        return False
    return True


def ensure() -> bool:
    """Whether the compiled kernels run here; without a `load` before, in mode EMBEDDINGS_NATIVE (or auto)."""
    return _decided[0] if _decided else load(os.environ.get("EMBEDDINGS_NATIVE", "auto"))


# what torch.compiler.assume_constant_result sets, without its import of the compiler: traced code calls it once
ensure._dynamo_marked_constant = True


def build() -> Path:
    """The shared library for this torch, compiler and processor, compiled if it is not in the user's cache.

    Raises RuntimeError with the compiler's words.
    """
    cuda = torch.cuda.is_available()
    if cuda and shutil.which("nvcc") is None:
        raise RuntimeError("error: there is a GPU, but nvcc is not on the PATH: install the CUDA toolkit")
    return _build_once(_cache_folder() / _key(cuda), _ninja_file(cuda))


def build_cuda_on_host() -> Path:
    """The CUDA kernels built for the CPU with address and undefined-behaviour sanitizers: torch.ops.embeddings_host.

    A process that loads it must have been started with the sanitizers' libraries preloaded. Raises RuntimeError with
    the compiler's words.
    """
    return _build_once(_cache_folder() / f"{_key(False)}-cuda-on-host", _sanitized_ninja_file(HOST_FLAGS, "*.cu"))


def build_cuda_on_threads() -> Path:
    """The same for the thread sanitizer, whose library alone is then to be preloaded."""
    key = f"{_key(False, THREADS_FLAGS)}-cuda-on-threads"
    return _build_once(_cache_folder() / key, _sanitized_ninja_file(THREADS_FLAGS, "*.cu", "thread"))


def build_sanitized() -> Path:
    """The CPU kernels built with the same sanitizers: torch.ops.embeddings. What loads and raises is as above."""
    key = f"{_key(False, SANITIZED_FLAGS)}-sanitized"
    return _build_once(_cache_folder() / key, _sanitized_ninja_file(SANITIZED_FLAGS, "*.cpp"))


def sanitizer_libraries(names: tuple[str, ...] = ("libasan.so", "libubsan.so")) -> str:
    """What LD_PRELOAD must be where they are loaded. Raises RuntimeError if the compiler has no sanitizers."""
    paths = []
    for name in names:
        path = _output_of([*shlex.split(_compiler()), f"-print-file-name={name}"]).decode().strip()
        if not Path(path).is_absolute():  # the bare name, where there is no such file
            raise RuntimeError(f"no {name}: the compiler has no sanitizers to preload")
        paths.append(path)
    return ":".join(paths)


def _build_once(folder: Path, ninja_file: str) -> Path:
    library = folder / "embeddings.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        if not library.exists():
            print(f"kernels: compiling csrc once into {folder} ...", file=sys.stderr, flush=True)
            # built beside, then renamed: a killed build is never mistaken for a finished one
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                os.replace(_run_ninja(Path(scratch), ninja_file), library)
    return library


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "compressed-embeddings"


def _key(cuda: bool, flags: str = CXX_FLAGS + CUDA_FLAGS + HOST_FLAGS) -> str:
    """Whatever changes the binary: sources, flags, torch, compiler, and the processor (-march=native)."""
    digest = hashlib.sha256()
    for source in sorted(CSRC.glob("*.*")):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(flags.encode())
    digest.update(f"{torch.__version__}{torch.version.cuda}{platform.machine()}".encode())
    if cuda:
        digest.update(" ".join(_devices()).encode() + _output_of(["nvcc", "--version"]))
    digest.update(_output_of([*shlex.split(_compiler()), "-dumpfullversion"]) + _processor())
    return f"torch{torch.__version__.split('+')[0]}-{digest.hexdigest()[:16]}"


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _processor() -> bytes:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"model name"))}))
    return platform.processor().encode()


def _output_of(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=False).stdout
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]}: no such compiler; install a C++ compiler or use native=off") from error


def _torch_root() -> Path:
    return Path(torch.__file__).parent


def nvcc(architectures: list[str]) -> str:
    """nvcc with everything but input and output, for these devices ("80" is sm_80). A CPU build of torch is enough."""
    devices = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)
    return f"nvcc {CUDA_FLAGS} {devices} {DEFINES} -DUSE_CUDA -isystem {_quote(_torch_root() / 'include')}"


def _devices() -> list[str]:
    """Architectures of the GPUs present: ["90"]."""
    present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(present)]


def _quote(path: Path) -> str:
    return shlex.quote(str(path))


def _in_ninja(path: Path) -> str:
    """A path of a build line; ninja itself quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _includes() -> str:
    return f"{DEFINES} -isystem {_quote(_torch_root() / 'include')}"


def _libraries(to_linker: str = "-Wl,") -> str:
    folder = _quote(_torch_root() / "lib")
    return f"-L{folder} {to_linker}-rpath,{folder} -ltorch_cpu -ltorch -lc10"


def _ninja_file(cuda: bool) -> str:
    """The build: every .cpp, and every .cu where torch and this machine have CUDA, for the devices present."""
    lines = []
    objects = _objects(lines, "cxx", f"{_compiler()} {CXX_FLAGS} {_includes()} -c $in -o $out", "*.cpp")
    if not cuda:
        return _link(lines, f"{_compiler()} -shared $in -o $out {_libraries()}", objects)
    objects += _objects(lines, "nvcc", f"{nvcc(_devices())} -c $in -o $out", "*.cu")
    # nvcc knows where its runtime is; a shared one, so that it is the one torch has loaded
    linker = f"nvcc -shared --cudart=shared $in -o $out {_libraries('-Xlinker ')} -ltorch_cuda -lc10_cuda"
    return _link(lines, linker, objects)


def _sanitized_ninja_file(flags: str, pattern: str, sanitizers: str = "address,undefined") -> str:
    lines = []
    objects = _objects(lines, "cxx", f"{_compiler()} {flags} {_includes()} -c $in -o $out", pattern)
    return _link(lines, f"{_compiler()} -fsanitize={sanitizers} -shared $in -o $out {_libraries()}", objects)


def _objects(lines: list[str], rule: str, command: str, pattern: str) -> list[str]:
    """The object files of csrc's sources of that pattern; adds to the lines how each is made."""
    lines.append(f"rule {rule}\n  command = {command}")
    objects = {source: f"{source.name}.o" for source in sorted(CSRC.glob(pattern))}
    lines += [f"build {name}: {rule} {_in_ninja(source)}" for source, name in objects.items()]
    return list(objects.values())


def _link(lines: list[str], command: str, objects: list[str]) -> str:
    return "\n".join([*lines, f"rule link\n  command = {command}", f"build embeddings.so: link {' '.join(objects)}\n"])


def compile_cuda() -> int:
    """Compile every CUDA source for every architecture we support. Returns the worst exit status."""
    if shutil.which("nvcc") is None:
        print("nvcc is not on the PATH: install the CUDA toolkit (13.0 or newer)", file=sys.stderr)
        return 1
    status = 0
    for source in sorted(CSRC.glob("*.cu")):
        began = time.perf_counter()
        command = [*shlex.split(nvcc(list(ARCHITECTURES))), "--threads", "0", "-c", str(source), "-o", os.devnull]
        code = subprocess.run(command, check=False).returncode
        result = "ok" if code == 0 else f"FAILED ({code})"
        names = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
        print(f"{source.name} for {names}: {result}, {time.perf_counter() - began:.0f} s", flush=True)
        status = max(status, code)
    return status


def _run_ninja(folder: Path, ninja_file: str) -> Path:
    (folder / "build.ninja").write_text(ninja_file)
    ninja = Path(sys.executable).parent / "ninja"
    command = [str(ninja) if ninja.exists() else "ninja", "-C", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("ninja is not installed: pip install ninja, or use native=off") from error
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return folder / "embeddings.so"


@contextlib.contextmanager
def _lock(path: Path):
    """One builder at a time; the kernel releases the lock of a process that died."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: Exception) -> str:
    """The line that says what is wrong: the compiler's first error, or else the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if "error:" in line), lines[-1])
