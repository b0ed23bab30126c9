"""What a run says of itself: before anything is allocated, in its summary, and to TensorBoard."""

from collections import Counter
from collections.abc import Mapping

import torch

from dlrm import linear
from dlrm.memory import Needs, format_bytes
from dlrm.run_folder import config_hash, git_commit
from embeddings import EmbeddingBags, native


def print_plan(dataset, bags: EmbeddingBags, needed: Needs) -> None:
    """Which data, and what the embeddings will take, before any of it is allocated."""
    counts = Counter(row["backend"] for row in bags.feature_table())
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"data: {dataset.describe()}")
    print(
        f"embeddings: features {kinds}, in {len(bags.slabs)} slabs; {format_bytes(bags.num_bytes())}, "
        f"all dense {format_bytes(bags.dense_equivalent_bytes())}"
    )
    print(needed, flush=True)


def say_what_is_replaced(bags: EmbeddingBags, config: dict) -> None:
    """One line for each thing that runs otherwise than the config's words suggest."""
    if config["precision"] == "bf16" and config["device"] == "cpu" and linear.emulates_bf16(linear.cpu_flags()):
        print("precision=bf16: this CPU has no bf16 instructions, so they are emulated; fp32 is 4 to 6 times as fast")
    on_cpu = [slab.backend for slab in bags.slabs if not slab.weight.is_cuda]
    if atomic := sorted({backend.name for backend in on_cpu if backend.accumulate == "atomic"}):
        print(f"{', '.join(atomic)}: on the CPU gradients are summed in order (accumulate=atomic is for CUDA)")


def fuses(config: dict, bags: EmbeddingBags, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the embeddings' optimizer steps in the backward pass; says where that is not what the config asks."""
    choice, exact = config["optimizer"]["fused"], bags.fuses_exactly(optimizer)
    if choice is True and not exact:
        print("optimizer.fused=true: only touched slots move, also where accumulate asks for a dense gradient")
    fused = exact if choice == "auto" else choice
    rounded = sorted({slab.backend.precision for slab in bags.slabs} - {"fp32"})
    if rounded and not fused:
        print(f"optimizer.fused={choice}: gradients of {', '.join(rounded)} weights are rounded to 16 bits")
    return fused


def facts(config: dict) -> dict:
    """What summary.json says of the run beside its results."""
    return {
        "seed": config["seed"],
        "device": config["device"],
        "torch": torch.__version__,
        "native": native.ensure(),
        "git_commit": git_commit(),
        "config_hash": config_hash(config),
        "expected": config["expected"],
    }


def hparams(config: dict, choices: Mapping[str, str]) -> dict:
    """The flat choices that TensorBoard compares runs by: every number and word of the config, of the data only the
    cut-off. choices: what was chosen of each group of configs."""
    names = {group: name for group, name in choices.items() if name and not group.startswith("hydra/")}
    if "min_count" in config["data"]:
        names["data.min_count"] = config["data"]["min_count"]

    def flat(node: dict, prefix: str = "") -> dict:
        found = {}
        for key, value in node.items():
            if isinstance(value, dict):
                found |= flat(value, f"{prefix}{key}.")
            elif not key.startswith("_") and value is not None:
                found[prefix + key] = value
        return found

    return names | flat({key: value for key, value in config.items() if key not in ("data", "resume", "expected")})
