"""Do runs that start at the same moment get in each other's way?  python -m benchmarks.reliability.launches

Twenty at once, each to a folder of its own; then twenty of one command with resume=auto, which is one folder: one of
them trains, and the others are refused with its process's number.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.reliability.runs import command, differences, finish, report, start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=20)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    findings = []
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch)
        words = [word for word in command(runs, 1280) if not word.startswith(("hydra.run.dir", "resume="))]
        processes = [
            start([*words, f"hydra.run.dir=${{run_folder:never,{runs}/at-once}}"]) for _ in range(options.launches)
        ]
        outputs = [process.communicate(timeout=900)[0] for process in processes]
        findings += [text[-300:] for p, text in zip(processes, outputs, strict=True) if p.returncode]
        folders = [folder for folder in runs.iterdir() if (folder / "summary.json").exists()]

        whole = runs / "whole"
        finish(command(whole, 12_800))
        words = command(runs / "one", 12_800)
        processes = [start(words) for _ in range(options.launches)]
        outputs = [process.communicate(timeout=900)[0] for process in processes]
        pairs = list(zip(processes, outputs, strict=True))
        trained = [text for p, text in pairs if p.returncode == 0 and "has its result" not in text]
        after = [text for p, text in pairs if p.returncode == 0 and "has its result" in text]
        refused = [text for p, text in pairs if p.returncode == 2 and "is training there" in text]
        findings += [f"in one folder: {what} is not a lone run's" for what in differences(runs / "one", whole)]
    if len(folders) != options.launches:
        findings.append(f"{options.launches} launches made {len(folders)} complete runs")
    if len(trained) != 1 or len(trained) + len(after) + len(refused) != options.launches:
        findings.append("in one folder: " + "\n".join(text[-300:] for _, text in pairs))
    counts = {
        "launches at once": options.launches,
        "complete runs in folders of their own": len(folders),
        "launches at once of one command with resume=auto": options.launches,
        "that trained": len(trained),
        "refused, as another process trains there": len(refused),
        "that came when it had its result": len(after),
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.launches", *given])
    return report("launches", counts, findings, command=words)


if __name__ == "__main__":
    sys.exit(main())
