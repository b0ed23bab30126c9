"""Is a misspelt key or option ever taken, and is the right one named?  python -m benchmarks.reliability.typos

Every key of the configuration and every option of its groups with one letter gone, doubled, swapped with the next or
changed: the command must end with status 2 in under two seconds, before any data is read, and name the right spelling.
"""

import argparse
import contextlib
import io
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train
from benchmarks.measure import Progress
from benchmarks.reliability.runs import report
from dlrm.refusals import CONF

SECONDS, SHARE = 2.0, 0.95


def edits(word: str) -> set[str]:
    """The word with one edit."""
    found = set()
    for i in range(len(word)):
        found |= {word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]}
        found |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :]} if i + 1 < len(word) else set()
        found.add(word[:i] + ("x" if word[i] != "x" else "y") + word[i + 1 :])
    return {one for one in found if one and one != word and not one.startswith(("_", "-"))}


def keys(node: DictConfig, before: str = "") -> Iterator[str]:
    """Dotted keys of a configuration's values."""
    for key in node:
        name = f"{before}{key}"
        if str(key).startswith("_"):
            continue
        child = node._get_node(key)
        if isinstance(child, DictConfig) and len(child):
            yield from keys(child, f"{name}.")
        else:
            yield name


def cases() -> list[tuple[str, str]]:
    """Command lines with one wrong word, and the right one."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config")
    found, allowed = [], set(keys(config))
    for key in sorted(allowed):
        parent, _, last = key.rpartition(".")
        names = {f"{parent}.{wrong}" if parent else wrong for wrong in edits(last)} - allowed
        found += [(f"{name}=1", last) for name in sorted(names)]
    for group in sorted(path.name for path in CONF.iterdir() if path.is_dir()):
        options = {path.stem for path in (CONF / group).glob("*.yaml")}
        for option in sorted(options):
            wrong = {word for word in edits(option) if word not in options}
            found += [(f"{group}={word}", option) for word in sorted(wrong)]
    return found


def attempt(argument: str, folder: Path) -> tuple[int, str, float]:
    """Status, what was said, and seconds."""
    said, began = io.StringIO(), time.perf_counter()
    arguments, sys.argv = sys.argv, ["train.py", argument]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), contextlib.chdir(folder):
            status = train.main()
    finally:
        sys.argv = arguments
    return status, said.getvalue(), time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="so many of them, drawn at random; by default all")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    all_cases, findings, named, slowest = cases(), [], 0, 0.0
    chosen = all_cases if options.cases is None else random.Random(0).sample(all_cases, options.cases)
    progress, began = Progress(max(1, len(chosen) // 100)), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for i, (argument, right) in enumerate(chosen, 1):
            status, said, seconds = attempt(argument, Path(folder))
            slowest = max(slowest, seconds)
            if status != 2:
                findings.append(f"{argument}: status {status}")
            elif f"{right}?" in said or f"{right} ?" in said:
                named += 1
            if i % 100 == 0:
                progress.say(f"{i:,} of {len(chosen):,}, {len(findings)} taken, {named / i:.1%} with the right word")
        litter = [path.name for path in Path(folder).rglob("*") if path.is_file()]
    if litter:
        findings.append(f"left behind: {litter[:5]}")
    if named < SHARE * len(chosen):
        findings.append(f"the right word was named in {named / len(chosen):.1%}")
    if slowest > SECONDS:
        findings.append(f"the slowest took {slowest:.1f} s")
    counts = {
        "misspelt keys and options": len(chosen),
        "of all with one edit": len(all_cases),
        "refused with status 2": len(chosen) - sum(": status" in finding for finding in findings),
        "with the right word": f"{named / len(chosen):.1%}",
        "slowest, seconds": round(slowest, 2),
        "seconds in all": round(time.perf_counter() - began),
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.typos", *given])
    return report("typos", counts, findings[:50], command=words)


if __name__ == "__main__":
    sys.exit(main())
