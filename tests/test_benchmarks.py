"""benchmarks/: every module runs its smallest cell, says what was measured, and README says what was recorded."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks import (
    bandwidth,
    grids,
    growth,
    lookup,
    measure,
    peers,
    registers,
    roof,
    shapes,
    step,
    step_worker,
    table,
)
from data.synthetic import zipf_ids

MODULES = sorted(path.stem for path in measure.RESULTS.parent.glob("*.py"))
CELL = ["--rounds", "3", "--seconds", "0"]
once = pytest.mark.once


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A function: runs a benchmark with arguments and returns what it recorded."""
    monkeypatch.setenv("OUT", str(tmp_path))
    return lambda module, *arguments: json.loads(module.main([*CELL, *arguments]).read_text())


@once
@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_asks(name):
    if name.startswith("triton_") and not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed")
    assert importlib.import_module(f"benchmarks.{name}").__doc__.strip()


@once
def test_the_readme_has_the_tables_of_the_recorded_results():
    text = table.README.read_text()
    assert {block[1] for block in table.BLOCK.findall(text)} == {*table.TABLES, *table.COMPUTED}
    assert table.rewritten(text, measure.RESULTS) == text, "python -m benchmarks.table"


@once
def test_a_lookup_is_compared_with_every_peer_and_made_a_table(recorded, tmp_path, monkeypatch):
    monkeypatch.setitem(lookup.TABLES, "two", [4000, 3])
    shape = ["--tables", "two", "--dims", "16", "--bags", "2", "--batches", "3", "--laws", "zipf"]
    found = recorded(lookup, *shape, "--works", "forward,sgd,rowwise_adagrad", "--backends", "dense,bloom 0.1")
    forward, sgd, rowwise = found["rows"]
    fbgemm = {"fbgemm"} if peers.HAS_FBGEMM else set()
    both = {"torch, sparse gradients", "torch, dense gradients"}
    assert set(forward["microseconds"]) == {"dense", "bloom 0.1", "torch, sparse gradients"} | fbgemm
    assert set(sgd["microseconds"]) == {"dense", "bloom 0.1"} | both | fbgemm
    assert set(rowwise["microseconds"]) == {"dense", "bloom 0.1"} | fbgemm
    assert [row["rounds"] for row in found["rows"]] == [3, 3, 3]
    assert sgd["best_peer"] == min({*both, *fbgemm}, key=sgd["microseconds"].get)
    assert found["command"].startswith("python -m benchmarks.lookup --rounds 3 --seconds 0 --tables two")
    assert "| two | sgd | 1 |" in table.text_of("lookup", tmp_path)


@once
def test_who_fails_is_left_out_with_the_reason_and_a_run_that_stops_leaves_its_rows(recorded, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no memory\nfor it")

    monkeypatch.setitem(lookup.TABLES, "two", [4000, 3])
    monkeypatch.setattr(peers.TorchBags, "forward", fails)
    shape = ["--tables", "two", "--dims", "16", "--bags", "1", "--batches", "3", "--laws", "uniform"]
    found = recorded(lookup, *shape, "--works", "forward", "--backends", "dense")
    assert found["rows"][0]["left_out"] == {"torch, sparse gradients": "RuntimeError: no memory"}
    assert set(found["rows"][0]["microseconds"]) == {"dense"} | ({"fbgemm"} if peers.HAS_FBGEMM else set())
    measure_cell, calls = lookup.measure, []
    monkeypatch.setattr(
        lookup, "measure", lambda *x: calls.append(x) or (measure_cell if len(calls) < 2 else fails)(*x)
    )
    with pytest.raises(RuntimeError):
        lookup.main([*CELL, *shape, "--works", "forward,forward+backward", "--backends", "dense"])
    assert [row["work"] for row in json.loads((tmp_path / "lookup-cpu.json").read_text())["rows"]] == ["forward"]


@once
def test_kernels_are_compared_with_the_roofs_measured_beside_them(recorded, tmp_path, monkeypatch):
    monkeypatch.setitem(roof.TABLES, "two", [4000, 3])
    monkeypatch.setitem(roof.OPTIMIZERS, "adam", lambda parameters: 1 / 0)  # the last
    cell = ["--tables", "two", "--dims", "16", "--batches", "3", "--mebibytes", "1"]
    rows = recorded(roof, *cell, "--backends", "dense,bloom 0.1")["rows"]
    found = {(row["backend"], row["kernel"]): row for row in rows}
    assert found["dense", "all"]["error"] == found["bloom 0.1", "all"]["error"] == "ZeroDivisionError: division by zero"
    kernels = {"forward", "gradient of touched rows", "fused sgd", "fused adagrad", "fused rowwise_adagrad", "all"}
    assert {kernel for backend, kernel in found if backend == "dense"} == kernels
    assert found["dense", "forward"]["num_bytes"] == found["torch", "gather"]["num_bytes"] == 6 * (4 + 64 + 64)
    assert found["bloom 0.1", "forward"]["num_bytes"] == 3 * (4 + 64 + 64) + 3 * (
        4 + 64 + 2 * 64
    )  # the small one is dense
    assert "| two | dense | all | failed |" in table.text_of("roof", tmp_path)


@once
def test_a_share_is_of_the_fastest_roof_of_its_kind():
    def work(whose: str, which: str, num_bytes: int, launches: int = 1) -> roof.Work:
        return roof.Work((whose, which), num_bytes, launches, None, None)

    medians = {
        work("torch", "copy", 400): 1e-4,
        work("torch", "gather", 100): 1e-4,
        work("triton", "gather", 100): 5e-5,
    }
    medians |= {work("dense", "forward", 100): 1e-4, work("dense", "fused sgd", 100, launches=50): 2e-4}
    copy, slow, fast, forward, fused = roof.shares(medians)
    assert [row["of_copy"] for row in (copy, fast, forward, fused)] == [1, 0.5, 0.25, 0.125]
    assert [row.get("of_rows") for row in (copy, slow, fast, forward, fused)] == [None, 0.5, 1, 0.5, None]
    assert [row["predicted_us"] for row in (forward, fused)] == [25, 100]  # 100 bytes at 4 MB/s; 50 launches


@once
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_registers_are_those_that_ptxas_counts():
    update = "_ZN10embeddings4cuda13update_kernelILNS0_7SquaresE1ENS0_8KeptSumsIN3c108BFloat16EEEEEvT0_i"
    touch = "_ZN10embeddings4cuda12touch_kernelINS_7HashMapEEEvNS0_5BatchIT_EENS0_7TouchesEi"
    said = "".join(
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    344 bytes stack frame, {spilled} bytes spill stores, 7 bytes spill loads\n"
        f"ptxas info    : Used {used} registers, used 0 barriers\n"
        for name, used, spilled in ((update, 255, 528), ("_ZN3cub11EmptyKernelIvEEvv", 4, 0), (touch, 60, 0))
    )
    rows = [tuple(row.values()) for row in registers.kernels(said)]
    assert rows == [
        ("update_kernel", "row-wise Adagrad, kept sums", "bf16", 255, 256, 528),
        ("touch_kernel", "hash", "any", 60, 1024, 0),
    ]


@once
def test_on_a_gpu_graphs_are_timed_by_events_and_what_cannot_be_captured_is_left_out(monkeypatch):
    class Graphs:  # a device that is none of "cpu" stands for a GPU
        def __init__(self, device):
            self.captures = 0

        def warm_up(self, run):
            run()

        def capture(self, run):
            self.captures += 1
            if self.captures == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            return run

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.ms = time.perf_counter() * 1e3

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.ms - self.ms

    monkeypatch.setattr(roof, "CudaGraphs", Graphs)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    options = roof.parse(["--device", "cpu:0", "--backends", "dense", "--mebibytes", "1", "--rounds", "2"])
    found = {(row["backend"], row["kernel"]): row for row in roof.measure([4000, 3], 16, 3, options)}
    assert "not permitted" in found["torch", "gather"]["error"] and "of_rows" not in found["dense", "forward"]
    captured = {kernel for (backend, kernel), row in found.items() if row.get("captured") and backend == "dense"}
    assert captured == {"forward", *(f"fused {name}" for name in roof.OPTIMIZERS)}


@once
def test_sets_are_of_the_rows_that_they_say():
    sets = roof.Sets([40, 3], 2, "cpu")
    read = [ids.data_ptr() for ids in sets.ids]
    sets.of_all()
    assert all(ids[:2].max() < 40 <= ids[2:].min() and ids.max() < 43 for ids in sets.ids)
    sets.apart()
    assert all(len(ids.unique()) == 4 and ids.max() < 43 for ids in sets.ids)
    sets.of_features()
    assert all(ids[:2].max() < 40 and ids[2:].max() < 3 for ids in sets.ids)
    assert read == [ids.data_ptr() for ids in sets.ids]


@once
@pytest.mark.parametrize("name", ["dense", "hashed 0.1 block 8", "bloom 0.1", "qr 0.1"])
def test_bags_made_on_a_device_read_what_those_of_the_host_would(name):
    rows, backend = [40, 3000], shapes.backends(16)[name]
    on_host, there = shapes.make_bags(backend, rows), shapes.make_bags(backend, rows, "cpu:0")
    there.load_state_dict(on_host.state_dict() | {k: v for k, v in there.state_dict().items() if "tables" in k})
    ids = shapes.Draws(rows, law="uniform", bag=1, batch_size=6, device="cpu")().ids
    assert there(ids).equal(on_host(ids))


@once
def test_growth_has_every_axis_and_no_dense_table_of_a_billion_rows(recorded):
    found = recorded(growth, "--rows", "100,1000000000", "--batches", "2", "--tables", "3")
    names = {(row["axis"], row["value"]): set() for row in found["rows"]}
    for row in found["rows"]:
        names[row["axis"], row["value"]].add(row["name"])
    assert {axis for axis, _ in names} == {"rows", "batch", "tables"}
    assert names["rows", 10**9] == {"hashed", "bloom"}
    assert names["rows", 100] >= {"dense", "hashed", "bloom"}


@once
def test_grids_compare_equal_work(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "HASHED", {"max": 16, "single": 16})
    sizes = ["--rows", "10", "--dims", "8", "--batches", "4", "--mixes", "10XS", "--multi-ids", "all uniform"]
    found = recorded(grids, *sizes)
    assert [row["grid"] for row in found["rows"]] == ["fast"] * 5 + ["multi"] + ["hashed"] * 4
    assert all(row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2] for row in found["rows"])
    assert "| hashed | max, hash=affine | 1 |" in table.text_of("grids", tmp_path)


@once
@pytest.mark.parametrize("peer", [None, pytest.param("torchrec", marks=pytest.mark.torchrec)])
def test_each_competitor_steps_in_a_process_of_its_own(recorded, monkeypatch, peer):
    if peer and not importlib.util.find_spec(peer):
        pytest.skip(f"{peer} is not installed")
    if not peer:
        monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(step, "KAGGLE", [40, 3])
    small = ["--optimizers", "sgd", "--batches", "2", "--ours", "ours"]
    rows = recorded(step, *small)["rows"]
    assert [row["name"] for row in rows] == ["ours", *(["torchrec, TBE"] if peer else [])]
    assert rows[0]["ratio"] == [1, 1, 1]
    for row in rows:
        assert row["samples_per_second"] == pytest.approx(2 / row["milliseconds"] * 1e3, rel=0.05)


@once
def test_a_competitor_that_cannot_be_built_is_left_out(recorded, monkeypatch):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(step, "KAGGLE", [40, 3])
    monkeypatch.setitem(step.OURS, "misspelt", ["precison=fp32"])
    found = recorded(step, "--optimizers", "sgd", "--batches", "2", "--ours", "ours,misspelt")
    assert [row["name"] for row in found["rows"]] == ["ours"]
    assert "precison" in found["left_out"]["sgd"]["misspelt"]


@once
def test_the_plain_model_in_bf16_is_that_of_fp32_rounded():
    samples = step_worker.make_samples([40, 3], 6, torch.Generator().manual_seed(0))
    weights = []
    for name in ("plain torch", "plain torch bf16"):
        torch.manual_seed(0)
        training = step_worker.plain(step_worker.Spec(name, "sgd", [40, 3], [], "", "cpu"))
        for _ in range(3):
            training.step(training.ready(samples))
        weights.append([parameter.detach() for parameter in training.model.parameters()])
    assert not all(a.equal(b) for a, b in zip(*weights, strict=True))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@once
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_the_plain_model_is_ours_in_torchs_own_operations(monkeypatch, optimizer):
    rates = [f"optimizer.{part}.lr={peers.RATE}" for part in ("dense", "embedding")]
    if optimizer == "adagrad":  # whose first step is else the sign of the gradient, of one that is rounding too
        monkeypatch.setattr(peers, "EPS", 1e-3)
        rates += ["optimizer.dense.eps=1e-3", "optimizer.embedding.eps=1e-3"]
    spec = step_worker.Spec("plain torch", optimizer, [40, 3], rates, "", "cpu")
    torch.manual_seed(0)
    ours, plain = step_worker.ours(spec), step_worker.plain(spec)
    samples = step_worker.make_samples(spec.rows, 6, torch.Generator().manual_seed(0))
    models = [training.model for training in (ours, plain)]
    for mine, theirs in zip(
        [*models[0].bottom.parameters(), *models[0].top.parameters(), *models[0].head.parameters()],
        [*models[1].bottom.parameters(), *models[1].top.parameters()],
        strict=True,
    ):
        theirs.data.copy_(mine)
    for (mine,), theirs in zip(models[0].embeddings.table_weights().values(), models[1].bags, strict=True):
        theirs.weight.data.copy_(mine)
    logits = models[0](samples.dense, samples.ids.flatten(), None), models[1](*plain.ready(samples)[:3])
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    for training in (ours, plain):
        training.step(training.ready(samples))
    weights = [[*model.bottom.parameters(), *model.top.parameters()] for model in models]
    weights[0] += models[0].head.parameters()
    tables = [part for (part,) in models[0].embeddings.table_weights().values()]
    weights[0] += tables
    weights[1] += [bag.weight for bag in models[1].bags]
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture
def make_gpu(tmp_path):
    """A function: runs gpu.sh with a stand-in for Python, which does as `cases` say or succeeds, and returns its status
    and its output; results go to tmp_path."""

    def run(cases: str, **variables: str) -> tuple[int, str]:
        programs = {"python": f'case "$*" in {cases} *) echo "ran $*" ;; esac', "nvidia-smi": "echo $GPUS"}
        for name, lines in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
            (tmp_path / name).chmod(0o755)
        places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path)}
        environment = os.environ | places | {"GPUS": "GPU 0: H100"} | variables
        command = ["bash", measure.RESULTS.parent / "gpu.sh"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout

    return run


@once
def test_make_gpu_goes_on_after_stages_that_fail_or_hang_and_lists_them(make_gpu, tmp_path):
    cases = "*'-n 8'*) echo 'FAILED tests/a.py::b - no'; exit 1 ;; *.roof*) exec sleep 60 ;;"
    status, output = make_gpu(cases, GPU_SECONDS="4")
    outcomes = dict(re.findall(r"^  (\S+) +\d+ s  (.+)$", output, re.MULTILINE))
    assert status == 1
    assert (outcomes["build"], outcomes["cuda-tests"], outcomes["roof"]) == ("ok", "failed", "timed out")
    assert outcomes["growth"] == "no time left"
    assert "\nFAILED tests/a.py::b - no\n" in output and "benchmarks.table" in output
    assert "FAILED tests/a.py::b - no" in (tmp_path / "gpu.log").read_text()
    assert not any(name in output for name in ("unbound", "syntax"))


@once
def test_make_gpu_ends_at_once_without_torchs_gpu_or_with_a_failed_build(make_gpu):
    status, output = make_gpu("*is_available*) exit 1 ;;")
    assert status == 1 and "nvidia-smi lists a GPU" in output and "compile_cuda" not in output
    status, output = make_gpu("*is_available*) exit 1 ;;", GPUS="")
    assert status == 0 and "compile_cuda" in output and "no GPU here" in output
    status, output = make_gpu("*native.load*) echo the words of the compiler; exit 1 ;;")
    assert status == 1 and "the words of the compiler" in output and "cuda-tests" not in output


@once
def test_make_gpu_names_all_that_is_missing_before_it_builds(make_gpu, tmp_path):
    for name in ("duckdb", "tqdm"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('gone')")
    status, output = make_gpu(f"-) exec {sys.executable} - ;;", PYTHONPATH=str(tmp_path))
    assert status == 1 and "duckdb (gone), tqdm (gone)" in output and "native.load" not in output


@once
def test_make_gpu_looks_for_all_that_is_imported():
    root = measure.RESULTS.parents[1]
    sources = [
        path for part in ("dlrm", "data", "embeddings", "benchmarks", "tests") for path in (root / part).rglob("*.py")
    ]
    imported = set()
    for path in [root / "train.py", *sources]:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    ours = {path.stem for path in sources} | {path.name for path in root.iterdir()} | {"train"}
    looked_for = re.search(r'modules = """(.*?)"""', (root / "benchmarks/gpu.sh").read_text(), re.DOTALL)[1].split()
    assert imported - ours - sys.stdlib_module_names - {"triton", "torchrec"} <= set(looked_for)


@once
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_row_bandwidth_compiles_and_counts(recorded):
    found = recorded(bandwidth, "--row-bytes", "64", "--mebibytes", "2", "--threads", "1")
    assert len(found["rows"]) == 4
    assert all(0.1 < row[work] < 1e4 for row in found["rows"] for work in bandwidth.WORKS)


@once
def test_the_machines_limit_is_that_of_the_nearest_table():
    fields = ("row_bytes", "table_bytes", "threads", "read", "copy", "update")
    rows = [
        (64, 1 << 20, 1, 9, 2, 3),
        (64, 1 << 20, 2, 1, 2, 3),
        (64, 1 << 30, 2, 5, 6, 7),
        (256, 1 << 30, 2, 10, 20, 30),
    ]
    rates = bandwidth.Rates([dict(zip(fields, row, strict=True)) for row in rows])
    assert rates.of("read", 64, 1 << 19) == 1
    assert rates.of("update", 128, 1 << 31) == 14
    row = {"ids": "uniform", "work": "sgd", "dim": 16, "bag": 1, "batch_size": 100, "microseconds": {"dense": 2.6}}
    assert lookup.share_of_measured(row, [1 << 24], rates) == {"dense": 0.5}  # 100 rows of 6 + 7 ns in 2.6 us


@once
def test_a_ratio_is_of_paired_rounds_and_its_interval_of_order_statistics():
    ours = [1.0] * 100
    theirs = list(np.random.default_rng(0).permutation(np.arange(1.0, 101.0)))
    assert measure.ratio(theirs, ours) == (50.5, 41, 60)  # the 41st and the 60th of 100: Conover 1999, section 3.2
    assert measure.ratio([4.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == (2, 1, 3)


@once
def test_rounds_are_in_turn_and_a_budget_ends_them():
    calls = []
    both = {name: lambda x, name=name: calls.append((x, name)) for name in ("a", "b")}
    seconds = measure.interleave(both, rounds=50, device="cpu", budget=0)
    assert list(map(len, seconds.values())) == [measure.LEAST] * 2
    assert calls[:4] == [(0, "b"), (0, "a"), (1, "a"), (1, "b")]
    measure.interleave(both, rounds=0, device="cpu", ready=dict.fromkeys(both, lambda i: 10 + i))
    assert calls[-4:] == [(10, "b"), (10, "a"), (11, "a"), (11, "b")]


@once
def test_draws_are_fresh_in_range_and_as_frequent_as_their_law_says():
    rows = [1000, 3]
    draws = shapes.Draws(rows, law="zipf", bag=4, batch_size=50_000, device="cpu")
    first, second = draws(), draws()
    assert not torch.equal(first.ids, second.ids)
    assert first.offsets.tolist() == list(range(0, 2 * 200_000 + 1, 4))
    for ids, n in zip(first.ids.chunk(2), rows, strict=True):
        counts = torch.bincount(ids, minlength=n)
        assert len(counts) == n
        # every 1/200,000th quantile of the law has one draw
        expected = np.bincount(
            zipf_ids((np.arange(200_000)[None] + 0.5) / 200_000, np.array([[n]]), 1.05)[0], minlength=n
        )
        assert np.abs(np.sort(counts.numpy()) - np.sort(expected))[-3:].max() < 5 * expected.max() ** 0.5


@pytest.mark.parametrize("work", ["forward", "sgd"])
@pytest.mark.parametrize(
    "peer", ["torch, sparse gradients", "torch, dense gradients", pytest.param("fbgemm", marks=pytest.mark.torchrec)]
)
def test_a_peer_with_our_weights_does_what_ours_does(peer, work):
    if peer == "fbgemm" and not peers.HAS_FBGEMM:
        pytest.skip("fbgemm_gpu is not installed")
    rows, dim = [40, 3], 16
    mine = lookup.ours(shapes.make_bags(shapes.backends(dim)["dense"], rows), work)
    weights = mine.module.slabs[0].weight.detach().flatten().clone()
    named = dict(lookup.theirs(rows, dim, "sgd", "cpu"))
    theirs = named[peer](weights)
    batch = shapes.Draws(rows, law="uniform", bag=3, batch_size=6, device="cpu")()
    both = [contender.call(contender.ready(batch)).reshape(6, 2, dim) for contender in (mine, theirs)]
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7)
    if work == "sgd":
        for contender in (mine, theirs):
            contender.train(torch.ones(6, 2, dim), contender.ready(batch))
        updated = torch.cat([part[0].flatten() for part in mine.module.table_weights().values()])
        torch.testing.assert_close(weights, updated, rtol=1e-6, atol=1e-7)


@once
def test_gathered_bags_are_embedding_bags():
    rows, dim = [40, 3], 16
    weights = torch.randn(43, dim)
    batch = shapes.Draws(rows, law="uniform", bag=3, batch_size=6, device="cpu")()
    theirs = peers.TorchBags(list(weights.split(rows)), sparse=True)
    gathered = peers.GatheredBags(weights, rows, compiles=False)
    torch.testing.assert_close(gathered(batch), theirs(theirs.ready(batch)), rtol=1e-6, atol=1e-6)


def test_fused_or_not_an_update_changes_what_it_should():
    bags = shapes.make_bags(shapes.backends(16)["dense"], [10])
    contender = lookup.ours(bags, "sgd")
    before = bags.table_weights()["C1"][0].clone()
    draws = shapes.Draws([10], law="uniform", bag=1, batch_size=6, device="cpu")
    batch = draws()
    contender.train(torch.ones(6, 1, 16), contender.ready(batch))
    counts = torch.bincount(batch.ids, minlength=10)[:, None]
    torch.testing.assert_close(bags.table_weights()["C1"][0], before - peers.RATE * counts, rtol=1e-6, atol=1e-7)
