"""What a person reads: tables for the terminal and for TensorBoard, and the warning that nothing was learned.

python -m dlrm.report FOLDER  writes the report of a sweep: `dlrm.sweep_report`.
"""

import math
import sys

from dlrm import expected
from dlrm.memory import format_bytes

NOT_LEARNED = """\
************************************************************************************************
THE MODEL HAS NOT BEATEN THE CONSTANT PREDICTOR: normalized entropy {entropy:.4f} >= 1 on {split} at step {step:,}.
Always predicting the click rate would do as well. Likely causes:
  - a learning rate that is too high (loss jumps) or too low (loss stands still): optimizer.*.lr
  - too few steps: trainer.max_steps, trainer.epochs; or a warm-up that never ends: trainer.warmup_steps
  - labels that do not belong to the rows, or a column that is constant: look at the data's schema
  - {split} ids that training never saw: compare the splits, or use embedding=hashed
  - overfitting (train/loss far below eval/log_loss): fewer epochs
************************************************************************************************"""

NOT_SAVED = """\
************************************************************************************************
NO CHECKPOINT OF THIS RUN: {error}
The run goes on to its evaluation; the weights are lost when it ends.
************************************************************************************************"""


def markdown_table(rows: list[dict]) -> str:
    """rows, dicts with the same keys, as a Markdown table with a header."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def nominal(summary: dict) -> float | None:
    """The ratio asked of the features that are compressed: 1 if none is, None if they differ or nothing says it."""
    asked = {row.get("nominal") for row in summary.get("features", [])} - {1}
    return asked.pop() if len(asked) == 1 else None if asked or "features" not in summary else 1


def final_table(summary: dict) -> str:
    """The result of a run in a dozen lines. summary: as in summary.json."""
    last = summary["last"]

    def number(tag: str, digits: int = 4) -> str:
        value = last.get(tag)
        return f"{value:.{digits}f}" if value is not None else f"none ({summary['reasons'].get(tag, 'not measured')})"

    auc = number("test/auc", 5)
    if "test_at_best/step" in last:
        auc += f" last; {number('test_at_best/auc', 5)} at the best validation AUC (step {last['test_at_best/step']:,})"
    if last.get("test/best_possible_auc") is not None and last.get("test/auc") is not None:
        share, best = last["test/share_of_best_auc"], last["test/best_possible_auc"]
        auc += f"  (best possible {best:.5f}; ours is {share:.1%} of its gain above 0.5)"
    dense = format_bytes(summary["dense_equivalent_bytes"])
    asked = f"; {ratio:g} asked for" if (ratio := nominal(summary)) not in (None, 1) else ""
    size = f"{format_bytes(last['memory/embedding_bytes'])}  ({number('memory/compression')} of {dense} dense{asked})"
    rows = {
        "test AUC": auc,
        "test log loss": f"{number('test/log_loss', 5)}  (normalized entropy {number('test/normalized_entropy')})",
        "embeddings": size,
        "optimizer": format_bytes(last["memory/optimizer_bytes"]),
        "peak memory": format_bytes(last["memory/peak_bytes"]),
        "throughput": f"{summary['samples_per_second']:,.0f} samples/s without evaluation",
        "trained": f"{summary['steps']:,} steps, {summary['epochs']:.2f} epochs, {summary['seconds']:.0f} s",
        "status": summary["status"],
        "data": summary["data"],
        "run folder": summary["folder"],
    }
    width = max(map(len, rows))
    table = [*rows.items(), *(("expected", line) for line in expected.lines(summary))]
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    from dlrm.sweep_report import main  # only here: it imports what training does not need

    sys.exit(main())
