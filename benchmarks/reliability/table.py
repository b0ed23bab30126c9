"""README's table of promises, from the recorded results.  python -m benchmarks.reliability.table"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from dlrm.report import markdown_table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- promises -->\n).*?(?=<!-- end -->)", re.DOTALL)
Counts = dict[str, object]
PROMISES: list[tuple[str, str, str, Callable[[Counts], str]]] = [  # promise, how it is tested, script, what came of it
    (
        "killed at any moment, it ends with the same weights, optimizer, records",
        "kill -9 at random moments, and inside saves; then the same command",
        "kills",
        lambda c: (
            f"{c['ended as the run that was left alone']} of {c['kills']} the same, "
            f"{c['while a checkpoint was written']} of the kills inside a save; at most "
            f"{c['steps done again, at most']} steps done again, with {c['steps between checkpoints']} between saves"
        ),
    ),
    (
        "no file event of a save can lose it",
        "ckpt-chaos 0.1.8: killed before and in every file event, and by SIGTERM there",
        "chaos",
        lambda c: (
            f"{c['PASS']} of {c['crash points']} pass; {c['HARD_FAIL']} HARD_FAIL, "
            f"{c['SILENT_DIVERGENCE']} SILENT_DIVERGENCE, {c['LOST_WORK']} LOST_WORK"
        ),
    ),
    (
        "a damaged checkpoint is found, named, and the one before used",
        "one bit flipped anywhere; files cut, longer, missing, of other bytes",
        "flips",
        lambda c: (
            f"{c['found, and the checkpoint before taken']} of {c['flipped bits']} bits, "
            f"{c['of them found']} of {c['other damages']} others"
        ),
    ),
    (
        "a checkpoint that was made to do harm does none",
        "manifests and headers spoiled, with the right SHA-256",
        "harm",
        lambda c: (
            f"of {c['manifests and headers that were spoiled']:,} {c['refused, nothing changed']:,} refused, "
            f"{c['loaded: what was spoiled is not read']:,} where nothing reads; memory +{c['memory grew by, MiB']} MiB"
        ),
    ),
    (
        "a full disk keeps the last good checkpoint, says bytes needed and free",
        "a tmpfs with room for 0, 1, 2, ... checkpoints",
        "disks",
        lambda c: f"{c['last good checkpoint kept, bytes said, no litter, gone on']} of {c['disks that filled up']}",
    ),
    (
        "runs that start at once have folders of their own; one folder has one run",
        "simultaneous launches of either kind",
        "launches",
        lambda c: (
            f"{c['complete runs in folders of their own']} of {c['launches at once']} complete; of as many of one "
            f"command {c['that trained']} trained, {c['refused, as another process trains there']} were refused, "
            f"{c['that came when it had its result']} found its result"
        ),
    ),
    (
        "a killed sweep does each job once, and names those that failed",
        "12 jobs, 4 made to fail, killed at random moments",
        "sweeps",
        lambda c: f"{c['kills']} kills: {c['results']} of 8 results, {c['written again']} written again",
    ),
    (
        "the same command gives the same weights, with 1 or 2 threads",
        "five runs of every backend with deterministic=true, batches of 128 and of 2048",
        "repeats",
        lambda c: f"{c['equal to their first']} of {c['runs']} ({c['device']})",
    ),
    (
        "a misspelt key or option is refused in two seconds, and the right one named",
        "one edit in every key and option, drawn at random",
        "typos",
        lambda c: (
            f"{c['refused with status 2']:,} of {c['misspelt keys and options']:,} refused, "
            f"{c['with the right word']} with the right word; the slowest {c['slowest, seconds']} s"
        ),
    ),
    (
        "no id, offset or table makes an operator read or write out of bounds",
        "random calls of every operator under AddressSanitizer and UBSan",
        "fuzz",
        lambda c: f"{c['calls']:,} calls in {c['seconds']:,.0f} s, {len(c['findings'])} findings",
    ),
    (
        "the same, once what that found was fixed",
        "other random calls",
        "fuzz_again",
        lambda c: f"{c['calls']:,} calls in {c['seconds']:,.0f} s, {len(c['findings'])} findings",
    ),
    (
        "checkpoints hold training up by less than 5 %",
        "checkpoint.every=100 on the default data, in turn with none",
        "stall",
        lambda c: f"speed {c['of those without']} of that without",
    ),
]
TESTED = [  # promise, how it is tested, what came of it
    (
        "resumed at any batch the samples are those of a run not stopped, in later epochs too",
        "`tests/dlrm/test_resume.py`: 3 epochs of 5 batches; `tests/data`: every dataset, from any sample",
        "15 of 15 steps; also after SIGINT and SIGTERM, and in an evaluation",
    ),
    (
        "a NaN or an infinity stops before the update, named",
        "`tests/dlrm/test_trainer.py`, `test_resume.py`: input, label, loss, gradients, weights",
        "the last checkpoint on the disk is finite",
    ),
    (
        "a bad row is `file:line:column: reason`, and counted",
        "`tests/data/test_bad_rows.py`: every class of row, random damage",
        "stop, skip and quarantine with exact counts",
    ),
    (
        "prepared data is what was written, or made again",
        "`tests/data/test_prepared.py`: kills, two at once, files cut or gone, one bit flipped",
        "140 of 140 bits",
    ),
    (
        "the streaming AUC is within its own bound, the exact one exact",
        "`tests/dlrm/test_metrics.py` against scikit-learn, 3 x 300 random sets",
        "within the bound; 1e-9",
    ),
    (
        "bytes reported are bytes held",
        "`tests/test_ledger.py`, `test_compression.py`: every backend and optimizer",
        "to the byte; compression within 1 %",
    ),
]


def table(folder: Path = RESULTS) -> str:
    """Every promise whose result is recorded, then those that tests hold."""
    lines = []
    for promise, how, name, words in PROMISES:
        if (folder / f"{name}.json").exists():
            found = json.loads((folder / f"{name}.json").read_text())
            commit = found["commit"][:7] + "-dirty" * found["commit"].endswith("-dirty")
            link = f"[{commit}](benchmarks/reliability/results/{name}.json)"
            lines.append({"promise": promise, "tested by": how, "result": words(found["rows"][0] | found), "at": link})
    for promise, how, result in TESTED:
        lines.append({"promise": promise, "tested by": how, "result": result, "at": "`make test`"})
    return markdown_table(lines)


def rewritten(text: str) -> str:
    """README with the table made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{table()}\n\n", text)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
