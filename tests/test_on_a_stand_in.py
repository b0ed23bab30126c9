"""train.py with device=cuda, on a device that is none: every tensor is where it is used, and the numbers are the CPU's.

torch looks for CUDA once, so the runs are in a process of their own, which imports stand_in_cuda first and this file
then.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from benchmarks import grids, growth, lookup, roof, step_worker
from benchmarks.reliability.runs import differences
from dlrm import linear
from dlrm.trainer import Trainer

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.environ.get("EMBEDDINGS_NATIVE") == "off", reason="EMBEDDINGS_NATIVE=off"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch looks for devices of its own"),
]
SAMPLES = [
    "data.num_samples={train: 2000, valid: 500, test: 500}",  # 8 batches, the last one smaller
    "data.cardinalities=[50, 2000, 3000]",
]
TABLE = ["data=table", "data.path=bags.csv", "data.label=click", "data.categorical=[user]"]
TABLE += ["data.multi_valued={tags: '|'}"]
ALL = ["trainer.batch_size=256", "trainer.log_every=2", "trainer.eval_every=4"]
RUNS = {  # name -> what is said on the command line; together every backend, optimizer and way to feed a step
    "dense": "trainer.epochs=2",
    "hashed": "embedding=hashed compression=0.5 precision=bf16 data_on_device=true",
    "bags": "embedding=bloom compression=0.5 optimizer=adam trainer.average_from=0.5",
    "qr": "embedding=qr compression=0.5 embedding.precision=bf16 optimizer/embedding=rowwise_adagrad precision=tf32",
    "fast": "embedding=fast optimizer=sgd model=dcn_v2 trainer.cuda_graph=false",
    "interrupted": "embedding=hashed compression=0.5 dense_below=100 +embedding@features.C3=qr resume=auto",
}


def test_runs_on_the_device_are_those_on_the_cpu_and_benchmarks_leave_nothing_out(tmp_path):
    code = "import stand_in_cuda, test_on_a_stand_in as here; here.run_all()"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("left out") == []
    assert found == {name: {"differences": [], "device": "a stand-in"} for name in RUNS}


# --- there -----------------------------------------------------------------------------------------------------------


def run_all() -> None:
    """Writes in what each run on the device differs from that on the CPU."""
    check_refusals()
    draw = random.Random(0)
    rows = [f"{draw.randint(0, 1)},u{draw.randint(0, 99)},{'|'.join(draw.sample('abcdefg', 3))}" for _ in range(2000)]
    Path("bags.csv").write_text("\n".join(["click,user,tags", *rows]))
    found = {}
    for name, words in RUNS.items():
        command = [*ALL, *(TABLE if name == "bags" else SAMPLES), *words.split()]
        if name == "interrupted":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "_train_step", interrupted_at(5))
                assert run(name, "cuda", *command) == 128 + signal.SIGTERM
        assert run(name, "cuda", *command) == 0, name
        with pytest.MonkeyPatch.context() as patch:  # layers and steps as there
            patch.setattr(linear, "alignment", lambda device: 8)
            if "trainer.cuda_graph=false" not in command:
                patch.setattr(Trainer, "_make_step", Trainer._graphed_step)
            here = ["linear=torch", *(word for word in command if word != "precision=tf32")]
            assert run(f"{name}-cpu", "cpu", *here) == 0, name
        summary = json.loads(Path(name, "summary.json").read_text())
        found[name] = {"differences": differences(Path(name), Path(f"{name}-cpu")), "device": summary["device"]}
    Path("found.json").write_text(json.dumps(found | measure_all()))


def measure_all() -> dict[str, list]:
    """What the benchmarks of make gpu leave out on the device, but for sparse tensors, which it does not know."""
    os.environ["OUT"] = "."
    of_tables, left_out = "--tables 1e6 --dims 16 --batches 3 --backends dense", []
    for module, words in (
        (roof, f"{of_tables} --mebibytes 1"),
        (lookup, f"{of_tables} --bags 1 --laws uniform --works forward,sgd"),
        (growth, "--rows 100 --batches 2 --tables 3"),
        (grids, "--grids fast,multi --rows 10 --dims 8 --batches 32 --mixes 10XS"),
    ):
        path = module.main(["--device", "cuda", "--rounds", "3", "--seconds", "0", *words.split()])
        rows = json.loads(path.read_text())["rows"]
        assert rows
        left_out += [row["error"] for row in rows if "error" in row]
        left_out += [why for row in rows for who, why in row.get("left_out", {}).items() if "sparse" not in who]
    training = step_worker.ours(step_worker.Spec("ours", "sgd", [50, 7], [], "", "cuda"))
    for seed in range(6):  # the last ones in a graph
        generator = torch.Generator("cuda").manual_seed(seed)
        training.step(training.ready(step_worker.make_samples([50, 7], 8, generator)))
    return {"left out": left_out}


def check_refusals() -> None:
    """That is, a run with a tensor elsewhere would have failed."""
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="expected all tensors on one device, found cuda:0 and cpu"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()


def run(folder: str, device: str, *words: str) -> int:
    """The status of a command line."""
    sys.argv = ["train.py", *words, f"device={device}", f"hydra.run.dir={folder}"]
    return train.main()


def interrupted_at(step: int):
    """Trainer._train_step with a signal in its step of that number."""
    train_step = Trainer._train_step

    def interrupted(self: Trainer, batch) -> None:
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        train_step(self, batch)

    return interrupted
