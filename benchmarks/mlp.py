"""Are the dense layers faster than nn.Linear and nn.ReLU? Forward and backward of the two MLPs of Criteo Kaggle's DLRM.

python -m benchmarks.mlp        # a minute; writes results/mlp-cpu.json
"""

import argparse
import os
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py

import torch
from torch import nn

from benchmarks.measure import interleave, record
from dlrm.linear import cpu_flags, mkl_is_slow, mlp, onednn_fault, use

BOTTOM, TOP, HEAD = [13, 512, 256, 64, 16], [367, 512, 256], [256, 1]
BATCHES = {128: 100, 2048: 20, 8192: 10}  # batch size -> rounds


class MLPs(nn.Module):
    """The parts of DLRM on either side of its interaction; layers: how a part's widths become its layers."""

    def __init__(self, layers):
        super().__init__()
        self.bottom, self.top, self.head = layers(BOTTOM), layers(TOP), nn.Linear(*HEAD)

    def step(self, dense: torch.Tensor, interacted: torch.Tensor) -> None:
        """Forward and backward, in which the top's input has a gradient too."""
        self.zero_grad()
        (self.bottom(dense).sum() + self.head(self.top(interacted)).sum()).backward()


def plain(widths: list[int]) -> nn.Sequential:
    steps = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*(layer for step in steps for layer in (nn.Linear(*step), nn.ReLU())))


def measure(batch_size: int, rounds: int) -> dict:
    """Milliseconds of each competitor, and the time of nn.Linear over that of the others."""
    models = {"nn.Linear": MLPs(plain), "torch": MLPs(mlp)}
    if onednn_fault() is None:
        models["onednn"] = MLPs(mlp)
        use(models["onednn"], "onednn")
    inputs = torch.rand(batch_size, BOTTOM[0]), torch.rand(batch_size, TOP[0], requires_grad=True)
    work = {name: lambda _, model=model: model.step(*inputs) for name, model in models.items()}
    seconds = interleave(work, rounds=rounds, device="cpu")
    row = {"batch_size": batch_size}
    for name, ours in seconds.items():
        row[f"{name}_ms"] = median(ours) * 1e3
        row[f"nn.Linear/{name}"] = median(a / b for a, b in zip(seconds["nn.Linear"], ours, strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=float, default=1.0, help="multiplies the rounds of every batch size")
    rounds = parser.parse_args().rounds
    print(f"linear=auto runs {'onednn' if mkl_is_slow(cpu_flags()) else 'torch'} on this CPU")
    rows = [measure(batch_size, max(3, int(rounds * count))) for batch_size, count in BATCHES.items()]
    print(*rows, sep="\n")
    print(record("mlp", "cpu", rows))


if __name__ == "__main__":
    main()
