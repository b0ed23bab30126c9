"""Is a whole training step faster than the field's?  python -m benchmarks.step --facebook FOLDER [--quick]

Forward, loss, backward and both optimizers of the model for Criteo Kaggle (13-512-256-64-16, 26 tables of the real
33.8 M rows x 16, 367-512-256-1) on uniform fresh ids, against facebookresearch/dlrm (FOLDER: a checkout of it) and
TorchRec's DLRM over FBGEMM's TBE; with --device cuda against the same model in plain torch, of each precision. Each
competitor is a process that builds its model once; they train in turn, a slice of steps each, so that a slow moment
hits all alike, and sleep between. Batches are made outside the time. Who fails is left out, and the result says why.
"""

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import Progress, integers, make_parser, noted, ratio, read_options, record, words
from benchmarks.shapes import KAGGLE

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad")
OURS = {  # name -> overrides of train.py's configuration
    "ours": [],
    "ours bf16": ["precision=bf16"],
    "ours hashed 0.1": ["embedding=hashed", "compression=0.1"],
    "ours hashed 0.1 bf16": ["embedding=hashed", "compression=0.1", "precision=bf16"],
}
ON_GPU = {
    "ours": [],
    "ours tf32": ["precision=tf32"],
    "ours bf16": ["precision=bf16"],
    "ours, no graph": ["trainer.cuda_graph=false"],
    "ours hashed 0.1": ["embedding=hashed", "compression=0.1"],
}
PLAIN = ("plain torch", "plain torch tf32", "plain torch bf16")
PLAIN += ("plain torch, dense part compiled", "plain torch bf16, dense part compiled")
SHORT = "--divide 10 --optimizers rowwise_adagrad --batches 2048 --rounds 6 --seconds 0.4"
MIB = 1 << 20


class Worker:
    """A competitor's process, which begins to build. Raises RuntimeError with its last words if it dies."""

    def __init__(self, name: str, kind: str, optimizer: str, rows: list[int], options: argparse.Namespace) -> None:
        folder = str(Path(options.facebook).resolve()) if options.facebook else ""
        spec = {"name": name, "optimizer": optimizer, "rows": rows, "overrides": overrides(options).get(name, [])}
        spec |= {"folder": folder, "device": options.device}
        command = [sys.executable, "-m", "benchmarks.step_worker", json.dumps({"kind": kind, "spec": spec})]
        self.name, self.errors = name, tempfile.TemporaryFile("w+")
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=root
        )
        self.is_fused = False

    def run(self, batch_size: int, steps: int) -> dict:
        """seconds of each step, and peak_bytes of the process so far."""
        self.ask(batch_size, steps)
        return self.answer()

    def ask(self, batch_size: int, steps: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # its last words are the answer
            print(json.dumps({"batch_size": batch_size, "steps": steps}), file=self.process.stdin, flush=True)

    def answer(self) -> dict:
        """To `ask`; the first is to having been made."""
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            words = self.errors.read()[-2000:].strip()
            raise RuntimeError(f"{words.splitlines()[-1] if words else 'no words'}\n{self.name} stopped:\n{words}")
        return json.loads(line)

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def overrides(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name of each of ours -> overrides of train.py's configuration."""
    return OURS if options.device == "cpu" else ON_GPU


def competitors(options: argparse.Namespace) -> dict[str, str]:
    """Name -> kind, of those that can run here; who cannot is said."""
    found = {name: "ours" for name in overrides(options) if options.ours is None or name in options.ours}
    if options.device != "cpu":
        return found | dict.fromkeys(PLAIN, "plain")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("bf16 is left out: this processor has no instructions for it, so it takes far longer than fp32")
        found = {name: kind for name, kind in found.items() if "bf16" not in name}
    if options.facebook:
        found["facebookresearch/dlrm"] = "facebook"
    else:
        print("facebookresearch/dlrm is left out: --facebook names no checkout of it")
    if importlib.util.find_spec("torchrec") and importlib.util.find_spec("fbgemm_gpu"):
        found["torchrec, TBE"] = "torchrec"
    else:
        print("torchrec is left out: make torchrec VENV=.venv-torchrec, and run this with .venv-torchrec/bin/python")
    return found


def build(
    kinds: dict[str, str], optimizer: str, rows: list[int], left_out: dict[str, str], options
) -> dict[str, Worker]:
    """Every competitor's process, its model built: all at once."""
    workers = {name: Worker(name, kind, optimizer, rows, options) for name, kind in kinds.items()}
    for name, worker in workers.items():
        with noted(left_out, name):
            worker.is_fused = worker.answer()["fused"]
    return workers


def warm_up(workers: dict[str, Worker], batch_size: int, left_out: dict[str, str]) -> dict[str, Worker]:
    """Those who can take such batches. All at once, as some compile for each size."""
    able = {name: worker for name, worker in workers.items() if name not in left_out}
    for worker in able.values():
        worker.ask(batch_size, 1)
    for name, worker in able.items():
        with noted(left_out, name):
            worker.answer()
    return {name: worker for name, worker in able.items() if name not in left_out}


def compare(workers: dict[str, Worker], batch_size: int, options: argparse.Namespace) -> list[dict]:
    """A row for each competitor: all run in turn, every other round backwards."""
    steps, seconds, peaks = {}, {name: [] for name in workers}, {}
    for name, worker in workers.items():
        once = median(worker.run(batch_size, 3)["seconds"])
        steps[name] = max(2, min(200, round(options.seconds / once)))
    for i in range(options.rounds):
        for name in list(workers)[:: 1 if i % 2 else -1]:
            answer = workers[name].run(batch_size, steps[name])
            seconds[name].append(median(answer["seconds"]))
            peaks[name] = answer["peak_bytes"]
    rows = []
    for name in workers:
        time = median(seconds[name])
        row = {"batch_size": batch_size, "name": name, "steps": steps[name], "rounds": options.rounds}
        row["fused"] = workers[name].is_fused
        row |= {"milliseconds": round(time * 1e3, 3), "samples_per_second": round(batch_size / time)}
        row |= {"ratio": ratio(seconds[name], seconds["ours"]), "peak_MiB": round(peaks[name] / MIB)}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> Path:
    options = parse(arguments)
    if options.ours is not None and "ours" not in options.ours:
        raise ValueError(
            f"--ours={','.join(options.ours)}: `ours` itself, which the others are compared with, is not in"
        )
    rows = [-(-n // options.divide) for n in KAGGLE]
    batches = options.batches or ([128, 2048, 8192] if options.device == "cpu" else [65536, 2048, 8192])
    kinds = competitors(options)
    facts = {"command": options.command, "rows_of_tables": sum(rows), "left_out": {}}
    progress, results = Progress(len(options.optimizers) * len(batches)), []
    for optimizer in options.optimizers:
        workers: dict[str, Worker] = {}
        try:
            print(f"{optimizer}: building {'; '.join(kinds)}", flush=True)
            facts["left_out"][optimizer] = left_out = {}
            workers = build(kinds, optimizer, rows, left_out, options)
            for batch_size in batches:
                able = warm_up(workers, batch_size, left_out)
                if "ours" not in able:
                    raise RuntimeError(f"ours, which the others are compared with, failed: {left_out['ours']}")
                cell = [{"optimizer": optimizer} | row for row in compare(able, batch_size, options)]
                results += cell
                speeds = ", ".join(f"{row['name']} {row['samples_per_second']:,}" for row in cell)
                progress.say(f"{optimizer}, batch {batch_size}, samples/s: {speeds}")
                path = record("step", options.device, results, **facts)
        finally:
            for worker in workers.values():
                worker.stop()
    print(f"written to {path}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=15, seconds=1.0)
    parser.add_argument("--facebook", help="folder of a checkout of facebookresearch/dlrm")
    parser.add_argument("--optimizers", type=words, default=list(OPTIMIZERS))
    parser.add_argument("--batches", type=integers)
    parser.add_argument("--ours", type=words, help="of ours those with these names; by default all")
    parser.add_argument("--divide", type=int, default=1, help="the tables' rows by this")
    return read_options(parser, "step", arguments, SHORT)


if __name__ == "__main__":
    main()
