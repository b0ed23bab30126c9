"""Does a manifest that was made to do harm do any?  python -m benchmarks.reliability.harm

Manifests with the right SHA-256, spoiled somewhere: values of another kind, or gone; and safetensors headers likewise.
Each must be refused with a ValueError, the model unchanged, or, where nothing that is read was spoiled, loaded.
"""

import argparse
import copy
import hashlib
import json
import random
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import Progress
from benchmarks.reliability.runs import report
from dlrm import checkpoint, memory

OTHERS = [None, -1, 2**63, 1e300, "", "../../etc", [], {}, [1, 2], {"a": 1}, True, "float32", ["float32", [2**40]]]
COUNTERS = {"step": 12, "epoch": 1, "sample": 34, "rows": 5, "fingerprint": "f", "identity": {"seed": 0}}


def spoil(content, rng: random.Random):
    """JSON, changed somewhere."""
    if isinstance(content, dict | list) and content and rng.random() < 0.9:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if rng.random() < 0.15:
            del content[key]
        else:
            content[key] = spoil(content[key], rng)
        return content
    return copy.deepcopy(rng.choice(OTHERS))


def make_parts(seed: int) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
    """A small model and its optimizers, after a step."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "layer": nn.Linear(3, 1)})
    optimizers = {
        "dense_optimizer": torch.optim.Adam(model["layer"].parameters(), lr=0.1),
        "embedding_optimizer": torch.optim.Adagrad(model["table"].parameters(), lr=0.1),
    }
    model["layer"](model["table"](torch.tensor([0, 1]))).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    return model, optimizers


def write_spoiled(path: Path, manifest: dict, headers: dict[str, bytes], rng: random.Random) -> str:
    """Spoils the manifest, or a file's header with its hash made right; returns which."""
    manifest = copy.deepcopy(manifest)
    what = rng.choice(["manifest", *headers])
    for name, whole in headers.items():
        (path / f"{name}.safetensors").write_bytes(whole)
    if what == "manifest":
        manifest = spoil(manifest, rng)
    else:
        length = int.from_bytes(headers[what][:8], "little")
        header = json.dumps(spoil(json.loads(headers[what][8 : 8 + length]), rng)).encode()
        said = rng.choice([len(header), len(header), rng.randrange(2**64)])
        content = said.to_bytes(8, "little") + header + headers[what][8 + length :]
        (path / f"{what}.safetensors").write_bytes(content)
        manifest["files"][what]["sha256"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(manifest).encode()
    (path / checkpoint.MANIFEST).write_bytes(text)
    (path / checkpoint.DIGEST).write_text(hashlib.sha256(text).hexdigest())
    return what


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    rng, findings, found = random.Random(options.seed), [], Counter()
    model, optimizers = make_parts(1)
    progress = Progress(20)
    with tempfile.TemporaryDirectory() as scratch:
        path = checkpoint.save(Path(scratch), model, optimizers, COUNTERS)
        manifest = json.loads((path / checkpoint.MANIFEST).read_text())
        headers = {name: (path / f"{name}.safetensors").read_bytes() for name in manifest["files"]}
        memory.reset_peak("cpu")
        before = memory.peak_bytes("cpu")
        other = make_parts(2)
        expected = [tensor.clone() for tensor in other[0].state_dict().values()]
        for i in range(options.cases):
            what = write_spoiled(path, manifest, headers, rng)
            try:
                checkpoint.load(path, *other)
            except ValueError:
                found[what, "refused"] += 1
                if not all(a.equal(b) for a, b in zip(other[0].state_dict().values(), expected, strict=True)):
                    findings.append(f"case {i}: {what} was refused, but the model changed")
            except Exception as error:
                findings.append(f"case {i}: {what}: {type(error).__name__}: {error}")
            else:
                found[what, "loaded"] += 1
                other = make_parts(2)
            if (i + 1) * 20 // options.cases > i * 20 // options.cases:
                progress.say(f"{i + 1:,} cases, {len(findings)} findings")
        grown = memory.peak_bytes("cpu") - before
    counts = {
        "manifests and headers that were spoiled": options.cases,
        "refused, nothing changed": sum(count for (_, how), count in found.items() if how == "refused"),
        "loaded: what was spoiled is not read": sum(count for (_, how), count in found.items() if how == "loaded"),
        "memory grew by, MiB": round(grown / memory.MIB, 1),
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.harm", *given])
    return report("harm", counts, findings[:50], command=words)


if __name__ == "__main__":
    sys.exit(main())
