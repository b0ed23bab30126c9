"""What did a sweep give?  python -m benchmarks.table FOLDER [FOLDER ...]

One Markdown row per configuration (runs that differ only in seed): test AUC and log loss as mean and standard deviation
over the seeds, embedding bytes, their ratio to dense, median samples/s.
"""

import json
import statistics
import sys
from pathlib import Path

from omegaconf import OmegaConf

SHOWN = ("data", "embedding", "compression", "block", "min_count", "experiment")


def label(folder: Path) -> str:
    """The overrides that the run was started with, less its seed and trivia."""
    overrides = OmegaConf.load(folder / ".hydra/overrides.yaml")
    parts = [o for o in overrides if o.lstrip("+").split("=")[0].split(".")[-1] in SHOWN]
    return " ".join(parts) or "(default)"


def main() -> None:
    groups: dict[str, list[dict]] = {}
    for top in sys.argv[1:]:
        for path in sorted(Path(top).rglob("summary.json")):
            groups.setdefault(label(path.parent), []).append(json.loads(path.read_text()))
    print("| run | test AUC | test log loss | embedding MiB | of dense | samples/s | seeds |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in groups.items():
        last = [run["last"] for run in runs]
        cells = [name]
        for tag in ("test/auc", "test/log_loss"):
            values = [row[tag] for row in last]
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}")
        cells.append(f"{last[0]['memory/embedding_bytes'] / 2**20:.2f}")
        cells.append(f"{last[0]['memory/compression']:.3f}")
        cells.append(f"{statistics.median(run['samples_per_second'] for run in runs):,.0f}")
        print("| " + " | ".join([*cells, str(len(runs))]) + " |")


if __name__ == "__main__":
    main()
