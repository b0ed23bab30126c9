"""Which test files the choice of kernels can change: those from which embeddings/ can be reached.

Read from the sources with ast, so that the others need not even be imported. When in doubt, a file reaches.
"""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
MODULES = {"embeddings", "train", "hydra"}  # hydra imports what a config names
PROGRAMS = ("import embeddings", "from embeddings", "import train", "train.py")  # in the text of another process's code
FIXTURES = {"kernels", "native_kernels"}  # of tests/conftest.py


def reaches_operators(path: Path) -> bool:
    """Whether embeddings is imported by a test file, by a module of ours that it imports, by a conftest.py that it has
    below tests/, or by a program in its text."""
    conftests = {folder / "conftest.py" for folder in path.parents if folder != TESTS and folder.is_relative_to(TESTS)}
    seen, left = set(), {path, *(file for file in conftests if file.exists())}
    while left:
        seen.add(source := left.pop())
        modules, arguments, texts = _names(source)
        if MODULES & {module.partition(".")[0] for module in modules}:
            return True
        is_test = source == path or source.is_relative_to(TESTS)
        if is_test and (FIXTURES & arguments or any(words in text for text in texts for words in PROGRAMS)):
            return True
        stems = [place / module.replace(".", "/") for module in modules for place in (ROOT, TESTS, source.parent)]
        files = {file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")}
        left |= {file for file in files if file.exists()} - seen
    return False


@functools.cache
def _names(source: Path) -> tuple[set[str], set[str], set[str]]:
    """The modules that a source imports anywhere, with their packages; its functions' arguments; its texts."""
    modules, arguments, texts = set(), set(), set()
    for node in ast.walk(ast.parse(source.read_text())):
        match node:
            case ast.Import(names=names):
                modules |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names):
                modules |= {f"{module or ''}.{alias.name}".strip(".") for alias in names}
            case ast.arg(arg=name):
                arguments.add(name)
            case ast.Constant(value=str(text)):
                texts.add(text)
    return {name.rsplit(".", n)[0] for name in modules for n in range(name.count(".") + 1)}, arguments, texts
