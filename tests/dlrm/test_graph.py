"""The captured step: replays of it train as eager steps do, bit for bit, and nothing in it waits for the device.

Without a GPU a capture is stood in for by the function itself, called anew for each replay on the graph's own tensors.
"""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from stand_ins import SETTINGS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlrm.evaluation import predict
from dlrm.feed import on_device
from dlrm.graph import WARM_UP, CudaGraphs, DenseStep
from dlrm.log import RunLog
from dlrm.metrics import Metrics
from dlrm.settings import TrainerSettings
from dlrm.trainer import Trainer
from embeddings import EmbeddingBags

pytestmark = pytest.mark.once  # of the reference, some operators would wait
ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "compression=0.1",
    "data.cardinalities=[5000,7,300]",
    "data.num_samples={train: 300, valid: 50, test: 100}",  # 10 batches of 32: the last has 12 samples
]
# what makes the host wait for a device's numbers, or sizes a tensor by them
WAITING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::_unique2",
    "embeddings::bag_backward_rows",
    "embeddings::raise_noted",
}
EMBEDDING_OPTIMIZERS = sorted(path.stem for path in (ROOT / "conf/optimizer/embedding").glob("*.yaml"))
BACKENDS = sorted(path.stem for path in (ROOT / "conf/embedding").glob("*.yaml"))


def make_trainer(folder, *overrides, fused=True, dense="adagrad", **settings):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[*OVERRIDES, f"optimizer/dense={dense}", *overrides])
    data = instantiate(config.data)
    data.prepare(set())
    backend = instantiate(config.embedding)()
    bags = EmbeddingBags(dict.fromkeys(data.cardinalities, backend), data.cardinalities, pooling="sum", seed=0)
    torch.manual_seed(0)
    device = settings.pop("device", "cpu")
    named = "cpu" if device == "meta" else device
    settings = TrainerSettings(**SETTINGS | {"eval_every": 0, "deterministic": False, "device": named} | settings)
    object.__setattr__(settings, "device", device)  # "meta" is not for users
    model = instantiate(config.model)(bags, len(data.dense_names)).to(settings.device)
    optimizer = instantiate(config.optimizer.embedding)(bags.parameters())
    if fused:
        bags.fuse(optimizer)
    folder.mkdir()
    return Trainer(
        model,
        data,
        dense_optimizer=instantiate(config.optimizer.dense)(model.dense_parameters()),
        embedding_optimizer=optimizer,
        settings=settings,
        log=RunLog(folder, facts={}, hparams={}),
        identity={},
    )


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Weights, and the state of both optimizers."""
    found = dict(trainer.model.state_dict())
    for name, optimizer in trainer.optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            found |= {f"{name} {i} {key}": torch.as_tensor(value) for key, value in state.items()}
    return found


def assert_same_state(a, b):
    for (name, x), y in zip(state_of(a).items(), state_of(b).values(), strict=True):
        assert x.equal(y), name


class StandIn:
    """CudaGraphs without a device."""

    def __init__(self, capture):
        self.capture = capture

    def warm_up(self, run):
        run()


def refuse(run):
    raise RuntimeError("operation not permitted when stream is capturing\nand more words")


def assert_graph_trains_as_eager(tmp_path, *overrides, graphs=None, **how):
    eager = make_trainer(tmp_path / "eager", *overrides, **how)
    eager.run_step = eager._graphed_step(graphs=StandIn(refuse))
    eager.train()
    graphed = make_trainer(tmp_path / "graphed", *overrides, **how)
    graphed.run_step = graphed._graphed_step(graphs=graphs or StandIn(lambda run: run))
    graphed.train()
    assert_same_state(eager, graphed)
    assert eager.log.last["train/loss"] == graphed.log.last["train/loss"]
    return graphed


@pytest.mark.parametrize("optimizer", EMBEDDING_OPTIMIZERS)
def test_replays_train_as_eager_steps_do(tmp_path, optimizer):
    dense = "sgd" if optimizer == "sgd" else "adagrad"
    graphed = assert_graph_trains_as_eager(tmp_path, f"optimizer/embedding={optimizer}", dense=dense)
    assert graphed.run_step._num_eager == WARM_UP + 2  # the last, smaller batch of each epoch, too


def test_random_rounding_and_bf16_layers_go_on_as_they_would(tmp_path):
    overrides = ("embedding.precision=bf16", "optimizer/embedding=rowwise_adagrad")
    assert_graph_trains_as_eager(tmp_path, *overrides, precision="bf16")


# --- what may be in it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, optimizer",
    [*((backend, "rowwise_adagrad") for backend in BACKENDS), *(("hashed", x) for x in EMBEDDING_OPTIMIZERS)],
)
def test_nothing_in_a_captured_step_waits_for_the_device(tmp_path, backend, optimizer):
    compression = [] if backend in ("dense", "fast") else ["compression=0.5"]
    trainer = make_trainer(tmp_path / "run", f"embedding={backend}", f"optimizer/embedding={optimizer}", *compression)
    trainer.run_step = trainer._graphed_step(graphs=StandIn(without_waits))
    for check in ("check_loss", "check_gradients", "check_embedding_gradient"):  # on CUDA they look at nothing
        setattr(trainer.guards, check, lambda *given: None)
    trainer.train()
    assert trainer.run_step.refusal is None


def test_a_wait_in_the_step_would_have_been_seen(tmp_path, monkeypatch):
    backward = Trainer._backward
    monkeypatch.setattr(Trainer, "_backward", lambda self, batch: (self.loss_sum.item(), backward(self, batch)))
    trainer = make_trainer(tmp_path / "run")
    trainer.run_step = trainer._graphed_step(graphs=StandIn(without_waits))
    with pytest.raises(RuntimeError, match="_local_scalar_dense waits for the device"):
        trainer.train()


def without_waits(run):
    def replay():
        with Refusing():
            run()

    return replay


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func._schema.name) in WAITING:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "backend, optimizer",
    [*((backend, "rowwise_adagrad") for backend in BACKENDS), *(("hashed", x) for x in EMBEDDING_OPTIMIZERS)],
)
def test_a_step_reads_tensors_of_its_device_alone(tmp_path, monkeypatch, backend, optimizer, fused):
    """Of "meta", which has no numbers: so what would wait for them fails, too."""
    compression = [] if backend in ("dense", "fast") else ["compression=0.5"]
    overrides = [f"embedding={backend}", f"optimizer/embedding={optimizer}", "embedding.accumulate=sorted"]
    overrides.append("optimizer.dense.fused=null")  # which torch has not for "meta"
    trainer = on_meta(tmp_path, monkeypatch, *overrides, *compression, fused=fused)
    step = trainer._graphed_step(graphs=StandIn(lambda run: run)) if fused else trainer._eager_step
    metrics = Metrics("meta")
    for batch in trainer.dataset.batches("train", 32):
        batch = batch.to("meta")
        with OneDevice():
            step(batch)
            metrics.update(*predict(trainer.model, batch, trainer.settings))
    assert all(parameter.is_meta for parameter in trainer.model.parameters())


def test_a_tensor_of_another_device_in_the_step_would_have_been_seen(tmp_path, monkeypatch):
    trainer = on_meta(tmp_path, monkeypatch)
    (slab,) = trainer.model.embeddings.slabs
    slab.tables = torch.zeros(slab.tables.shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="embeddings::bag_into reads tensors on cpu and meta"), OneDevice():
        trainer._eager_step(next(trainer.dataset.batches("train", 32)).to("meta"))


def on_meta(tmp_path, monkeypatch, *overrides, **how):
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())  # it has no "meta"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    trainer = make_trainer(tmp_path / "run", *overrides, **how, device="meta")
    for check in ("check_loss", "check_gradients", "check_embedding_gradient"):  # on CUDA they look at nothing
        setattr(trainer.guards, check, lambda *given: None)
    return trainer


class OneDevice(TorchDispatchMode):
    """Refuses operators, but for copies, whose tensors are on two devices; those of no dimension are numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
        devices = sorted({x.device.type for x in tensors})
        if len(devices) > 1 and func not in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            raise RuntimeError(f"{func._schema.name} reads tensors on {' and '.join(devices)}")
        return func(*args, **(kwargs or {}))


def test_the_kernels_wait_and_allocate_only_where_it_is_said():
    """In csrc, by function: all others can be captured."""
    found = set()
    for source in [*ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/cuda_*.h"), ROOT / "csrc/lookup.h"]:
        if source.name == "cuda_on_host.h":
            continue
        function = ""
        for line in source.read_text().splitlines():
            if name := re.match(r"[A-Za-z].*?(\w+)\(", line):
                function = name[1]
            calls = r"cuda\w*Synchronize|cudaMemcpy\w*|cudaMalloc\w*|cudaHostAlloc|cudaFree\w*|cudaEvent\w*"
            found |= {(function, call) for call in re.findall(rf"({calls})\(", line)}
    assert found == {
        ("error_of", "cudaHostAlloc"),  # once per slab, in its first call
        ("bag_backward_rows", "cudaMemcpyAsync"),
        ("bag_backward_rows", "cudaStreamSynchronize"),
        ("raise_noted", "cudaStreamSynchronize"),
    }


# --- what is not captured --------------------------------------------------------------------------------------------


def test_what_cannot_be_captured_is_said_once_and_training_goes_on(tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run")
    trainer.run_step = trainer._graphed_step(graphs=StandIn(refuse))
    assert trainer.train()["status"] == "completed"
    assert trainer.run_step.refusal == "operation not permitted when stream is capturing"
    assert capsys.readouterr().out.count("cuda graph: none, steps are launched one by one: operation not") == 1


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
def test_the_dense_step_is_the_optimizers_own(make):
    params = [torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    optimizers = [make([p.clone().requires_grad_() for p in params], lr=0.1) for _ in range(2)]
    dense_step = DenseStep(optimizers[1])
    for i in range(1, 5):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / i
            for j, param in enumerate(optimizer.param_groups[0]["params"]):
                param.grad = torch.sin(torch.arange(120.0).view(30, 4) * i + j)
        optimizers[0].step()
        dense_step.prepare()
        dense_step()
    for a, b in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-7)


REFUSALS = [
    (dict(dense="adam"), "Adam's step"),
    (dict(native=False), r"the reference kernels, which wait for the device \(native=require\)"),
    (dict(fused=False), r"the embeddings' step outside the backward pass \(optimizer.fused=true\)"),
]


@pytest.mark.parametrize("how, why", REFUSALS, ids=["dense-optimizer", "kernels", "embedding-optimizer"])
def test_what_a_graph_cannot_hold(tmp_path, capsys, monkeypatch, how, why):
    if how.get("native") is False:
        monkeypatch.setattr("dlrm.trainer.native.ensure", lambda: False)
    trainer = make_trainer(tmp_path / "run", **{key: value for key, value in how.items() if key != "native"})
    assert trainer._graphed_step() == trainer._eager_step
    assert re.search(f"cuda graph: none, .*: a graph cannot hold {why}", capsys.readouterr().out)
    object.__setattr__(trainer.settings, "cuda_graph", True)
    with pytest.raises(ValueError, match=f"trainer.cuda_graph=true: a graph cannot hold {why}"):
        trainer._graphed_step()


@pytest.mark.parametrize(
    "options, why",
    [(dict(momentum=0.9), "momentum=0.9"), (dict(weight_decay=0.1), "weight_decay=0.1")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_a_dense_optimizer_that_a_graph_cannot_hold(options, why):
    with pytest.raises(ValueError, match=f"SGD's step with {why}"):
        DenseStep(torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1, **options))


def test_a_capture_that_fails_half_way_leaves_nothing_behind(tmp_path):
    """The gradients that it has set were never computed."""

    def half_way(run):
        for parameter in trainer.model.dense_parameters():
            parameter.grad = torch.full_like(parameter, 1e9)
        raise RuntimeError("out of memory")

    trainers = [make_trainer(tmp_path / name) for name in ("whole", "half")]
    for trainer, capture in zip(trainers, (refuse, half_way), strict=True):
        trainer.run_step = trainer._graphed_step(graphs=StandIn(capture))
        trainer.train()
    assert_same_state(*trainers)


def test_what_the_steps_before_met_is_raised_and_not_taken_for_a_refusal(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.model.embeddings.raise_noted = lambda: (_ for _ in ()).throw(RuntimeError("id out of range"))
    trainer.run_step = trainer._graphed_step(graphs=StandIn(refuse))
    with pytest.raises(RuntimeError, match="id out of range"):
        trainer.train()


def test_the_second_of_two_batches_of_one_shape_is_captured(tmp_path):
    """Not a small last batch of an epoch, which the graph would then wait for."""
    trainer = make_trainer(tmp_path / "run")
    trainer.run_step = trainer._graphed_step(graphs=StandIn(lambda run: run))
    full, *_, small = trainer.dataset.batches("train", 32)
    for batch in (full, full, full, small, full):
        trainer.run_step(batch)
    assert trainer.run_step._num_eager == 5
    trainer.run_step(full)
    assert trainer.run_step._num_eager == 5 and len(trainer.run_step._batch.labels) == 32


def test_batches_of_bags_are_eager_and_that_is_said_once(tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run")
    trainer.run_step = trainer._graphed_step(graphs=StandIn(without_waits))
    batches = list(trainer.dataset.batches("train", 32))[:6]
    for batch in batches:
        trainer.run_step(batch._replace(offsets=torch.arange(len(batch.ids) + 1)))
    assert trainer.run_step._num_eager == 6 > WARM_UP
    assert capsys.readouterr().out.count("launched one by one: batches of bags hold another number of ids") == 1


# --- on a GPU --------------------------------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@on_cuda
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", EMBEDDING_OPTIMIZERS)
def test_a_cuda_graph_trains_as_eager_steps_do(tmp_path, backend, optimizer):
    compression = [] if backend in ("dense", "fast") else ["compression=0.5"]
    overrides = (f"embedding={backend}", f"optimizer/embedding={optimizer}", *compression)
    graphed = assert_graph_trains_as_eager(tmp_path, *overrides, graphs=CudaGraphs("cuda"), device="cuda")
    assert graphed.run_step.refusal is None


@on_cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_five_runs_on_cuda_give_the_same_weights(tmp_path, backend):
    compression = [] if backend in ("dense", "fast") else ["compression=0.5"]
    trainers = []
    for i in range(5):
        trainers.append(make_trainer(tmp_path / str(i), f"embedding={backend}", *compression, device="cuda"))
        trainers[-1].train()
        assert_same_state(trainers[0], trainers[-1])


@on_cuda
def test_batches_arrive_on_cuda_as_they_are():
    from data.batch import Batch

    batches = [Batch(torch.randn(5, 2), torch.arange(10) + i, None, torch.rand(5)) for i in range(4)]
    for sent, batch in zip(on_device(batches, "cuda"), batches, strict=True):
        assert all(a is b is None or (a.is_cuda and a.cpu().equal(b)) for a, b in zip(sent, batch, strict=True))


def test_on_the_cpu_batches_are_handed_on():
    batches = [object(), object()]
    assert list(on_device(batches, "cpu")) == batches
