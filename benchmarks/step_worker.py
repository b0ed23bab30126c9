"""One competitor of benchmarks.step, in a process of its own: builds its model once, then trains as it is told.

Says whether updates are fused, when it is built. Then reads lines of JSON, {"batch_size": B, "steps": k}, and answers
each with one: seconds of the k steps, of batches made before the time runs, on a GPU their mean, and the peak of the
process. Between them it waits for a line, which takes no processor time.
"""

import atexit
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers, shapes
from dlrm import memory

NUM_DENSE, DIM = 13, 16
BOTTOM, TOP = [512, 256, 64, DIM], [512, 256, 1]
WARM_UP = 2  # steps after each wait that are not counted: others have had the caches since
SAMPLES = 1 << 19  # at least so many, in 8 batches at least, before they come again on a GPU: 13.6M rows of 64 bytes
WARM_UP_ON_GPU = 6  # the first time a graph is captured after a few


class Samples(NamedTuple):
    """dense [B, 13]; ids [F, B] int64; labels [B], 0 or 1."""

    dense: Tensor
    ids: Tensor
    labels: Tensor


class Spec(NamedTuple):
    """What a competitor is: how it is made, and the rest of its choices."""

    name: str
    optimizer: str  # of the embeddings: sgd | adagrad | rowwise_adagrad; the dense layers' is sgd or adagrad alike
    rows: list[int]
    overrides: list[str]  # of train.py's configuration
    folder: str  # of facebookresearch/dlrm
    device: str


class Training(NamedTuple):
    """ready: what samples become before the time runs; step: takes that; is_fused: backward updates the embeddings."""

    model: nn.Module
    ready: Callable[[Samples], object]
    step: Callable[[object], None]
    is_fused: bool


def ours(spec: Spec) -> Training:
    """Our trainer's own step, on what train.py builds of its configuration."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import train
    from data.batch import Batch
    from dlrm import linear
    from dlrm.log import RunLog
    from dlrm.plan import fuses
    from dlrm.progress import Progress
    from dlrm.trainer import Trainer
    from embeddings import native

    cardinalities = {f"C{i}": n for i, n in enumerate(spec.rows, 1)}
    dense = "sgd" if spec.optimizer == "sgd" else "adagrad"
    choices = ["model=dlrm_kaggle", f"optimizer={dense}", f"optimizer/embedding={spec.optimizer}", *spec.overrides]
    choices.append(f"device={spec.device}")
    with initialize_config_dir(str(train.CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", [*choices, "hydra.sweep.dir=none"]), resolve=True)
    native.load(config["native"])
    if config["precision"] == "tf32":
        torch.set_float32_matmul_precision("high")  # as the trainer does around its steps
    settings = train.trainer_settings(config)
    chosen = train.backends_of(config, list(cardinalities)).choose(cardinalities)
    bags = shapes.bags_on(spec.device, chosen, cardinalities)
    model = train.build("model", config["model"])(bags, NUM_DENSE).to(spec.device)
    linear.use(model, linear.choose(config["linear"], device=config["device"], precision=config["precision"]))
    make_dense, make_embedding = train.optimizers(config["optimizer"], config["device"])
    optimizer = make_embedding(bags.parameters())
    is_fused = fuses(config, bags, optimizer)
    if is_fused:
        bags.fuse(optimizer)
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    trainer = Trainer(
        model,
        types.SimpleNamespace(
            num_samples={"train": 1 << 40, "valid": 0, "test": 0}, feature_names=list(cardinalities), dense_names=[]
        ),
        dense_optimizer=make_dense(model.dense_parameters()),
        embedding_optimizer=optimizer,
        settings=settings,
        log=RunLog(Path(scratch.name), facts={}, hparams={}),
        identity={},
    )
    trainer.progress = Progress(1, 0)

    def ready(samples: Samples) -> Batch:
        fields = samples.dense, samples.ids.int().flatten(), samples.labels  # int32, as our data sets give
        dense, ids, labels = (field.to(spec.device) for field in fields)
        return Batch(dense, ids, None, labels)

    eager_or_graphed = functools.cache(lambda batch_size: trainer._make_step())  # a graph is of one batch size

    def step(batch: Batch) -> None:
        trainer.run_step = eager_or_graphed(len(batch.labels))
        trainer._train_step(batch)

    return Training(model, ready, step, is_fused)


class Plain(nn.Module):
    """The model in torch's own operations, those of facebookresearch/dlrm: an nn.EmbeddingBag per feature with sparse
    gradients, bmm and the lower triangle by index for the interaction. compiles: torch.compile makes the dense part,
    for each batch size."""

    def __init__(self, rows: list[int], device: str, *, compiles: bool):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, DIM, mode="sum", sparse=True, device=device) for n in rows)
        self.bottom = layers([NUM_DENSE, *BOTTOM], nn.ReLU(), device)
        num_vectors = len(rows) + 1
        self.top = layers([num_vectors * (num_vectors - 1) // 2 + DIM, *TOP], nn.Identity(), device)
        self.pairs = torch.tril_indices(num_vectors, num_vectors, -1, device=device)
        self.rest = torch.compile(self._rest, fullgraph=True, dynamic=False) if compiles else self._rest

    def forward(self, dense: Tensor, ids: list[Tensor], offsets: Tensor) -> Tensor:
        """Logits [B]. ids: [B] of each feature; offsets: [B]."""
        return self.rest(dense, [bag(x, offsets) for bag, x in zip(self.bags, ids, strict=True)])

    def _rest(self, dense: Tensor, embedded: list[Tensor]) -> Tensor:
        bottom = self.bottom(dense)
        vectors = torch.stack([bottom, *embedded], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([bottom, products], 1)).squeeze(1)


def layers(widths: list[int], last: nn.Module, device: str) -> nn.Sequential:
    """Linear layers with ReLU between, and `last` after the last one."""
    linear = [nn.Linear(a, b, device=device) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*(part for layer in linear[:-1] for part in (layer, nn.ReLU())), linear[-1], last)


def plain(spec: Spec) -> Training:
    """The same model as anybody would write it in torch; the embeddings' optimizer is torch's SGD or Adagrad. By its
    name the dense part is fp32, tf32, or under autocast to bf16."""
    if "tf32" in spec.name:
        torch.set_float32_matmul_precision("high")
    autocast = functools.partial(
        torch.autocast, torch.device(spec.device).type, torch.bfloat16, enabled="bf16" in spec.name
    )
    model = Plain(spec.rows, spec.device, compiles="compiled" in spec.name)
    make = torch.optim.SGD if spec.optimizer == "sgd" else functools.partial(torch.optim.Adagrad, eps=peers.EPS)
    embeddings = make(model.bags.parameters(), lr=peers.RATE)
    optimizers = [embeddings, make([*model.bottom.parameters(), *model.top.parameters()], lr=peers.RATE)]

    def ready(samples: Samples) -> tuple:
        offsets = torch.arange(samples.ids.shape[1], device=spec.device)
        dense, ids, labels = (field.to(spec.device) for field in samples)
        return dense, list(ids), offsets, labels

    def step(batch: tuple) -> None:
        *inputs, labels = batch
        with autocast():
            logits = model(*inputs)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return Training(model, ready, step, False)


def facebook(spec: Spec) -> Training:
    """facebookresearch/dlrm's DLRM_Net and the body of its training loop, from a checkout of it."""
    sys.path.insert(0, spec.folder)
    # imported unconditionally and used for logs alone
    sys.modules["mlperf_logger"] = types.ModuleType("mlperf_logger")
    theirs = __import__("dlrm_s_pytorch")
    vectors = len(spec.rows) + 1
    net = theirs.DLRM_Net(
        DIM,
        np.array(spec.rows),
        np.array([NUM_DENSE, *BOTTOM]),
        np.array([vectors * (vectors - 1) // 2 + DIM, *TOP]),
        arch_interaction_op="dot",
        sigmoid_top=len(TOP) - 1,
    )
    named = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    named["rowwise_adagrad"] = theirs.RowWiseSparseAdagrad.RWSAdagrad
    optimizer = named[spec.optimizer](net.parameters(), lr=peers.RATE)
    scheduler = theirs.LRPolicyScheduler(optimizer, 0, 0, 0)

    def ready(samples: Samples) -> tuple:
        offsets = torch.arange(samples.ids.shape[1]).expand(len(spec.rows), -1).contiguous()
        return samples.dense, offsets, samples.ids, samples.labels[:, None]

    def step(batch: tuple) -> None:
        dense, offsets, ids, labels = batch
        loss = net.loss_fn(net(dense, offsets, ids), labels)
        loss.detach().numpy()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    return Training(net, ready, step, False)


def torchrec(spec: Spec) -> Training:
    """TorchRec's DLRM and DLRMTrain over FBGEMM's TBE, which applies its updates in backward."""
    from torchrec.datasets.utils import Batch
    from torchrec.models.dlrm import DLRM, DLRMTrain
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

    keys = [f"C{i}" for i in range(1, len(spec.rows) + 1)]

    class Collection(nn.Module):
        """What DLRM asks of an EmbeddingBagCollection; TorchRec's own, unsharded, makes gradients of whole tables."""

        def __init__(self) -> None:
            super().__init__()
            self.tbe = peers.make_tbe(spec.rows, DIM, spec.optimizer, device="cpu")

        def embedding_bag_configs(self) -> list:
            return [types.SimpleNamespace(embedding_dim=DIM, feature_names=[key]) for key in keys]

        def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
            return KeyedTensor(keys, [DIM] * len(keys), self.tbe(features.values(), features.offsets()), key_dim=1)

    collection = Collection()
    model = DLRMTrain(DLRM(collection, NUM_DENSE, BOTTOM, TOP))
    dense = [p for name, p in model.named_parameters() if "tbe" not in name]
    make = torch.optim.SGD if spec.optimizer == "sgd" else torch.optim.Adagrad
    optimizer = make(dense, lr=peers.RATE)

    def ready(samples: Samples) -> Batch:
        offsets = torch.arange(samples.ids.numel() + 1)
        features = KeyedJaggedTensor.from_offsets_sync(keys, samples.ids.flatten(), offsets)
        return Batch(dense_features=samples.dense, sparse_features=features, labels=samples.labels)

    def step(batch: Batch) -> None:
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Training(model, ready, step, True)


MAKERS: dict[str, Callable[[Spec], Training]] = {
    "ours": ours,
    "plain": plain,
    "facebook": facebook,
    "torchrec": torchrec,
}


def make_samples(rows: list[int], batch_size: int, generator: torch.Generator) -> Samples:
    """On the generator's device. Uniform ids: few of a batch's rows are in a cache."""
    how = {"generator": generator, "device": generator.device}
    sizes = torch.tensor(rows, device=generator.device)[:, None]
    ids = (torch.rand(len(rows), batch_size, dtype=torch.float64, **how) * sizes).long()
    labels = (torch.rand(batch_size, **how) < 0.25).float()
    return Samples(torch.rand(batch_size, NUM_DENSE, **how), ids, labels)


def commands() -> Iterator[dict]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a competitor prints is no answer
    given = json.loads(sys.argv[1])
    spec, kind = Spec(**given["spec"]), given["kind"]
    torch.manual_seed(0)
    np.random.seed(0)
    generator = torch.Generator(spec.device).manual_seed(0)
    memory.keep_heap()
    _, ready, step, is_fused = MAKERS[kind](spec)
    gc.collect()
    memory.reset_peak(spec.device)
    print(json.dumps({"fused": is_fused}), file=answers, flush=True)

    @functools.cache
    def stream(batch_size: int) -> Iterator[object]:
        """Fresh batches; on a GPU some in turn, which read more rows than its cache holds."""
        fresh = (ready(make_samples(spec.rows, batch_size, generator)) for _ in itertools.count())
        if spec.device == "cpu":
            return fresh
        return itertools.cycle(list(itertools.islice(fresh, max(8, SAMPLES // batch_size))))

    for command in commands():
        batch_size = command["batch_size"]
        num_steps = command["steps"] + (WARM_UP if spec.device == "cpu" else WARM_UP_ON_GPU)
        batches = itertools.islice(stream(batch_size), num_steps)
        seconds = on_cpu(step, batches) if spec.device == "cpu" else on_gpu(step, list(batches), spec.device)
        answer = {"seconds": seconds, "peak_bytes": memory.peak_bytes(spec.device)}
        print(json.dumps(answer), file=answers, flush=True)


def on_cpu(step: Callable[[object], None], batches: Iterable[object]) -> list[float]:
    """Seconds of each step after the first WARM_UP."""
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


def on_gpu(step: Callable[[object], None], batches: list[object], device: str) -> list[float]:
    """The mean of all steps after the first WARM_UP_ON_GPU, once: the host waits at their end alone."""
    for batch in batches[:WARM_UP_ON_GPU]:
        step(batch)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for batch in batches[WARM_UP_ON_GPU:]:
        step(batch)
    torch.cuda.synchronize(device)
    return [(time.perf_counter() - began) / len(batches[WARM_UP_ON_GPU:])]


if __name__ == "__main__":
    main()
