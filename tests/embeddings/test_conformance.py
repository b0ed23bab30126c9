"""What the systems that came before compute, where they are right; and that what they get wrong is right here.

H: HashedEmbeddingBag and dlrm_ssm. F: FastEmbedding and FastMultiEmbedding. B: Spotlight's BloomEmbedding. Q: QR of
facebookresearch/dlrm and DeepRec. D: what any trainer of theirs lacks. Of their modules ours are the drop-in ones
(`embeddings.modules`); docs/conformance.md lists all lines. Their numbers are in oracles/: weights there are
dyadic rationals, so that sums and products are exact in float32 in any order and are compared with ==.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from builders import (
    DIM,
    YAMLS,
    dense,
    each_choice,
    each_yaml,
    from_yaml,
    make_bags,
    make_batch,
    make_slab,
    named,
    slots_of,
    vectors,
)
from oracle import (
    ADD,
    AFFINE,
    CONCAT,
    KINDS,
    MAX,
    MEAN,
    MIXED,
    MULTIPLY,
    MURMUR3,
    PARTITION,
    POOLINGS,
    SUM,
    Case,
    Table,
    assert_same_bits,
    make_case,
)
from torch import nn

from embeddings import Slab, index_map, native, optim
from embeddings.bloom import MURMUR3_SEEDS
from embeddings.mixed_dimensions import mixed_dimensions
from embeddings.modules import (
    BloomEmbedding,
    FastEmbedding,
    FastMultiEmbedding,
    HashedEmbedding,
    HashedEmbeddingBag,
    MultiHashEmbedding,
    QREmbeddingBag,
    ScaledEmbeddingBag,
    ZeroEmbedding,
)
from embeddings.ops import Pooling

POOLING_NAMES = ["sum", "mean", "max"]
each_pooling = pytest.mark.parametrize("pooling", POOLINGS, ids=POOLING_NAMES)
each_pooling_name = pytest.mark.parametrize("pooling", POOLING_NAMES)


def recorded(name: str) -> dict:
    return json.loads((Path(__file__).parent / "oracles" / f"{name}.json").read_text())


def dyadic(*shape: int, mul=37, mod=101, off=50, den=64) -> torch.Tensor:
    """The weights and gradients of the recorded numbers: ((k * mul mod mod) - off) / den, row-major."""
    k = torch.arange(int(np.prod(shape)))
    return ((k * mul % mod - off) / den).float().reshape(shape)


def grads(*shape: int) -> torch.Tensor:
    return dyadic(*shape, mul=13, mod=29, off=14, den=16)


def make_call(
    weights, tables: list[Table], ids, offsets=None, *, index_map, combine=ADD, probes=1, weighted=None
) -> Case:
    """A call by hand: one feature for every `probes` tables, bags of offsets (of one id if None)."""
    features = len(tables) // probes
    ids = torch.as_tensor(ids).flatten()
    num_bags = len(ids) if offsets is None else len(offsets) - 1
    own = tables if combine == CONCAT else tables[::probes]
    return Case(
        weights=weights,
        ids=ids,
        offsets=None if offsets is None else torch.as_tensor(offsets),
        sample_weights=weighted,
        tables=torch.tensor(tables),
        batch_size=num_bags // features,
        columns=sum(table.dim for table in own),
        probes=probes,
        chunks=max(table.dim // table.width for table in tables),
        index_map=index_map,
        combine=combine,
        features=oracle.SEPARATOR.join(f"C{f + 1}" for f in range(features)),
    )


def slab_of(backend, n: int, weight: torch.Tensor | None = None, pooling=Pooling.SUM) -> Slab:
    """One feature of n ids, with these weights."""
    slab = make_slab({"C1": backend}, [n], pooling=pooling)
    if weight is not None:
        with torch.no_grad():
            slab.weight.view(-1).copy_(weight.flatten())
    return slab


def look_up(slab: Slab, ids, offsets=None, weights=None) -> torch.Tensor:
    ids = torch.as_tensor(ids)
    offsets = None if offsets is None else torch.tensor(offsets)
    return slab(ids, offsets, weights, len(ids) if offsets is None else len(offsets) - 1)


def dense_grad(slab: Slab) -> torch.Tensor:
    return slab.weight.grad.to_dense()


# --- H: HashedEmbeddingBag --------------------------------------------------------------------------------------------


def affine_call(ids, offsets=None, *, dim=16, weights=None) -> Case:
    """HashedEmbeddingBag(1000, 16, compression=0.1), of numbers that are their own index if no others are given."""
    weights = torch.arange(1600.0) if weights is None else weights
    table = Table(0, 0, dim, 1, 0, 1600, 1000)
    return make_call(weights[:, None], [table], ids, offsets, index_map=AFFINE)


def test_h1_index_oracle_of_rows_0_to_15_edge_rows_and_all_1000(kernels, device):
    known = recorded("heb_hash")
    found = affine_call(torch.arange(1000)).to(device).forward(kernels, SUM).long().cpu()
    assert found[:16].tolist() == known["index_rows0_15"]
    digest = hashlib.sha256(found.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == known["full_index_sha256_int64_le"]
    edges = known["edge_cases"]  # negative, 2^31, 2^40, and where uint64 first wraps
    rows = sorted({row for row, *_ in edges})
    assert min(rows) < 0 and max(rows) >= 2**40
    found = affine_call(torch.tensor(rows), dim=129).to(device).forward(kernels, SUM).long().cpu()
    for row, column, raw, slot in edges:
        assert index_map.affine(torch.tensor(row), torch.tensor(column)).item() == raw == oracle.affine(row, column)
        assert column > 128 or found[rows.index(row), column] == slot


def test_h1_the_drop_in_modules_read_upstreams_indices(device):
    numbers = torch.arange(1600.0)  # that are their own index
    known = recorded("heb_hash")
    for kind in (HashedEmbeddingBag, HashedEmbedding):
        module = kind(1000, 16, compression=0.1, hash="affine")
        assert module.weight_size == known["weight_size"] == 1600
        module = kind(1000, 16, hash="affine", _weight=numbers, device=device)
        found = module(torch.arange(1000, device=device)[:, None]).reshape(1000, 16).long().cpu()
        assert found[:16].tolist() == known["index_rows0_15"]
        digest = hashlib.sha256(found.numpy().astype("<i8").tobytes()).hexdigest()
        assert digest == known["full_index_sha256_int64_le"]
        edges = [(row, column, slot) for row, column, _, slot in known["edge_cases"] if column < 16]
        for row, column, slot in edges:
            assert module(torch.tensor([[row]], device=device)).flatten()[column] == slot


@each_pooling
def test_h2_bags_with_an_empty_middle_one_and_duplicates(kernels, device, pooling):
    known = recorded("heb_bag")
    case = affine_call(known["indices"], [*known["offsets"], 11], weights=dyadic(1600)).to(device)
    wanted = known["modes"][POOLING_NAMES[pooling]]
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if pooling == MEAN else {"rtol": 0, "atol": 0}
    out = case.forward(kernels, pooling).cpu()
    torch.testing.assert_close(out, torch.tensor(wanted["output"]), **tolerance)
    grad = case.backward(kernels, grads(5, 16).to(device), pooling).flatten().cpu()
    by_hand = torch.zeros(1600)
    for i, g in wanted["grad_weight_nonzero"].items():
        by_hand[int(i)] = g
    torch.testing.assert_close(grad, by_hand, **tolerance)


@each_pooling_name
def test_h2_the_drop_in_modules_bags_and_gradients(device, pooling):
    known = recorded("heb_bag")
    module = HashedEmbeddingBag(1000, 16, mode=pooling, hash="affine", _weight=dyadic(1600), device=device)
    out = module(torch.tensor(known["indices"], device=device), torch.tensor(known["offsets"], device=device))
    out.backward(grads(5, 16).to(device))
    by_hand, wanted = torch.zeros(1600), known["modes"][pooling]
    for i, g in wanted["grad_weight_nonzero"].items():
        by_hand[int(i)] = g
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if pooling == "mean" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(out.cpu(), torch.tensor(wanted["output"]), **tolerance)
    torch.testing.assert_close(module.hashed_weight.grad.cpu(), by_hand, **tolerance)


BAG_MODULES = {
    "dense": lambda **how: ScaledEmbeddingBag(50, 6, **how),
    "hashed": lambda **how: HashedEmbeddingBag(50, 6, 0.5, **how),
    "qr": lambda **how: QREmbeddingBag(50, 6, 4, **how),
    "qr legacy": lambda **how: QREmbeddingBag(50, 6, 4, order="legacy", **how),
}


@each_pooling_name
@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("kind", BAG_MODULES)
def test_h3_rows_of_ids_are_bags_of_regular_offsets(device, kind, padding_idx, pooling):
    module = BAG_MODULES[kind](mode=pooling, padding_idx=padding_idx, device=device)
    for size in (1, 3):
        rows = (torch.arange(4 * size, device=device) * 7 % 50).view(4, size)
        bags = rows.flatten(), torch.arange(0, 4 * size, size, device=device)
        assert_same_bits(module(rows), module(*bags))
        found, wanted = (
            torch.autograd.grad(out.pow(2).sum(), list(module.parameters())) for out in (module(rows), module(*bags))
        )
        assert found[0].any()
        assert_same_bits(found[0], wanted[0])


@each_pooling
@pytest.mark.parametrize("kind", ["dense", "affine", "bloom learned", "qr mult", "qr concat"])
def test_h4_one_id_without_offsets_is_a_bag_of_one_in_every_mode(kernels, device, kind, pooling):
    case = make_case(np.ones((2, 5), int), **KINDS[kind], weighted=pooling != MAX).to(device)
    alone, grad = case._replace(offsets=None), case.random_grad().to(device)
    assert_same_bits(alone.forward(kernels, pooling), case.forward(kernels, pooling))
    assert_same_bits(alone.backward(kernels, grad, pooling), case.backward(kernels, grad, pooling))
    plain = case._replace(sample_weights=None)
    assert_same_bits(plain.forward(kernels, pooling), plain.forward(kernels, SUM))


@each_yaml
@each_pooling_name
def test_h5_the_gradient_of_a_sum_is_that_of_the_same_numbers_in_full(yaml, pooling):
    rows = [300, 400]
    bags = make_bags([from_yaml(yaml, compression=0.5, accumulate="sorted")] * 2, rows, pooling=pooling)
    (weight,), (ids, offsets) = bags.parameters(), make_batch(rows)
    out = bags(ids, offsets)
    (expanded,) = torch.autograd.grad(out.sum(), weight, retain_graph=True)
    (full,) = torch.autograd.grad((out * torch.ones_like(out)).sum(), weight, retain_graph=True)
    assert expanded.abs().sum() > 0
    assert_same_bits(expanded, full)
    padded = torch.cat([torch.ones(7, 1, DIM), torch.full((7, 1, DIM), 2.0), torch.ones(7, 1, DIM)], 1)
    (sliced,) = torch.autograd.grad(out, weight, padded[:, 1:2].expand(7, 2, DIM))  # of a wider tensor, and expanded
    assert_same_bits(sliced, 2 * full)


def test_h6_int32_ids_and_offsets_mean_what_int64_ones_do():
    rows = [300 + f for f in range(len(YAMLS))]
    bags = make_bags([from_yaml(path, compression=0.5) for path in YAMLS], rows)
    ids, offsets = make_batch(rows)
    assert_same_bits(bags(ids.int(), offsets.int()), bags(ids, offsets))


def test_h7_ids_and_offsets_of_a_wrong_shape_or_order_are_refused(kernels):
    case = affine_call([1, 2, 3, 4], [0, 1, 4])
    wrong = {
        "ids must be 1-D": case._replace(ids=case.ids.view(2, 2, 1)),
        "offsets must be 1-D": case._replace(offsets=case.offsets[None]),
        "offsets must not descend": case._replace(offsets=torch.tensor([0, 5, 4])),
        "offsets must not descend or leave the ids": case._replace(offsets=torch.tensor([0, 1, 9])),
        "offsets must begin with 0": case._replace(offsets=torch.tensor([1, 2, 4])),
        "end with the number of ids": case._replace(offsets=torch.tensor([0, 1, 3])),
    }
    for words, call in wrong.items():
        with pytest.raises(RuntimeError, match=words):
            call.forward(kernels, SUM)
    with pytest.raises(ValueError, match="3 bags are not a multiple of 2 features"):
        make_bags([dense()] * 2, [9, 9])(torch.tensor([1, 2, 3]))


@each_yaml
def test_h8_no_feature_is_without_weights(yaml):
    backend = from_yaml(yaml, compression=1 / 64)
    for n, slots in slots_of(backend, {"C1": 3, "C2": 1_000_000}).items():
        assert all(number >= 1 for number in slots), n
    if yaml.stem not in ("dense", "fast"):
        with pytest.raises(ValueError, match="the smallest it can is"):
            slots_of(backend, {"C1": 3})


def test_h8_a_drop_in_module_of_three_ids_has_weights():
    for module in (HashedEmbeddingBag(3, 16), HashedEmbedding(3, 16), BloomEmbedding(3, 16)):  # int(0.75) and int(0.6)
        (weight,) = module.parameters()
        assert weight.numel() == (16 if isinstance(module, BloomEmbedding) else 1)
        assert module(torch.tensor([[1, 2]])).abs().sum() > 0


@pytest.mark.cuda
def test_h9_side_streams_and_every_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = [300 + f for f in range(len(YAMLS))]
    bags = make_bags([from_yaml(path, compression=0.5, accumulate="sorted") for path in YAMLS], rows)
    ids, offsets = make_batch(rows)
    here = bags(ids, offsets)
    for device in map(torch.device, range(torch.cuda.device_count())):
        there = make_bags([from_yaml(path, compression=0.5, accumulate="sorted") for path in YAMLS], rows).to(device)
        with torch.cuda.device(0):  # not always the tensors' own
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                batch = ids.to(device, non_blocking=True), offsets.to(device, non_blocking=True)
                out = there(*batch)
                out.pow(2).sum().backward()
            stream.synchronize()
        assert_same_bits(out, here)
        here_grads = torch.autograd.grad(here.pow(2).sum(), list(bags.parameters()), retain_graph=True)
        for found, wanted in zip(there.parameters(), here_grads, strict=True):
            assert_same_bits(found.grad, wanted)


def rows_that_share_a_vector(call: Case) -> int:
    """Of a slab whose numbers are their own index."""
    _, counts = call.forward(torch.ops.embeddings, SUM).long().unique(dim=0, return_counts=True)
    return int(counts[counts > 1].sum())


def test_h10_no_two_of_100_000_rows_share_their_vector_at_one_64th():
    native.ensure()
    table, weights = Table(0, 0, 16, 1, 0, 25_000, 100_000, 1, 7), torch.arange(25_000.0)[:, None]
    assert rows_that_share_a_vector(make_call(weights, [table], torch.arange(100_000), index_map=MIXED)) == 0
    out = look_up(slab_of(named("hashed", compression=1 / 64), 100_000), range(100_000))
    assert len(out.detach().unique(dim=0)) == 100_000  # also in blocks
    # and the compatible hash collides as often as the one it repeats
    assert rows_that_share_a_vector(make_call(weights, [table], torch.arange(100_000), index_map=AFFINE)) == 58_646


def test_h11_two_tables_read_other_weights_for_the_same_id():
    bags = make_bags([named("hashed", compression=0.5, block=1)] * 2, [1000] * 2)
    with torch.no_grad():
        for slab in bags.slabs:
            for begin, slots, _ in (slices[0] for slices in slab.slices.values()):
                slab.weight[begin : begin + slots] = torch.arange(slots)[:, None].float()
    out = bags(torch.arange(1000).repeat(2))
    assert (out[:, 0] == out[:, 1]).float().mean() < 0.01  # chance: one in 8000


@each_yaml
def test_h12_ids_need_not_be_contiguous(yaml):
    bags = make_bags([from_yaml(yaml, compression=0.5)], [300])
    ids = torch.arange(300).view(150, 2)
    assert not ids[:, 0].is_contiguous()
    assert_same_bits(bags(ids[:, 0]), bags(ids[:, 0].contiguous()))


def test_h13_hash_affine_reads_upstreams_weights():
    backend = named("hashed", compression=0.1, block=1, hash="affine")
    slab = slab_of(backend, 1000)
    (slots,) = (num_slots for _, num_slots, _ in slab.slices["C1"])
    with torch.no_grad():
        slab.weight.copy_(torch.arange(slots)[:, None])
    known = recorded("heb_hash")["raw_hash_rows0_15"]
    assert look_up(slab, range(16)).long().tolist() == [[h % slots for h in row] for row in known]
    slab.tables[0, 5] = 1600  # as upstream counts, without its row of the table
    slab.weight = nn.Parameter(torch.arange(1600.0)[:, None])
    assert look_up(slab, range(16)).long().tolist() == recorded("heb_hash")["index_rows0_15"]


H14 = """
import sys
sys.path[:0] = {paths!r}
import torch
from builders import YAMLS, from_yaml, make_bags
from embeddings import native
native.load({mode!r})
torch.set_num_threads(1)

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def growth(path, n, num_ids):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = memory("VmRSS")
    bags = make_bags([from_yaml(path, embedding_dim=64, compression=1 / 640 if n > 10**6 else 0.5)], [n])
    ids = torch.randint(n, (num_ids,), generator=torch.Generator().manual_seed(0))
    bags(ids, torch.arange(0, num_ids + 1, 2)).sum().backward()
    reads = bags.slabs[0].layout[1] * bags.slabs[0].layout[2]  # slots that an id reads
    return memory("VmHWM") - before, reads

for path in YAMLS:
    growth(path, 2000, 2000)  # what is made once
    if path.stem not in ("dense", "fast"):
        print(path.stem, *growth(path, 20_000_000, 2000), *growth(path, 20_000_000, 60_000))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_h14_no_table_of_all_ids_and_a_bounded_backward(request):
    is_native = os.environ.get("EMBEDDINGS_NATIVE") != "off" and native.ensure()
    paths = [str(request.config.rootpath), str(request.path.parent)]
    code = H14.format(paths=paths, mode="require" if is_native else "off")
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # what is freed is given back
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: tuple(map(int, sizes)) for name, *sizes in map(str.split, done.stdout.splitlines())}
    assert set(found) == {path.stem for path in YAMLS} - {"dense", "fast"}
    for name, (few, _, many, reads) in found.items():
        # weights and gradient are 8 MB each; one byte for every id would be 20 MB, an int64 of its own 160 MB
        assert few < 40e6, name
        # kernels keep and sort where a slot is read, not what; upstream: 48 bytes for each number of every id
        per_id = 40 * reads + 8 * 64 if is_native else 24 * 64 * max(reads, 2)
        assert many - few < 60_000 * per_id, name


@pytest.fixture
def deterministic():
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@each_choice
def test_h15_deterministic_runs_repeat_bit_for_bit(deterministic, yaml, changes):
    rows, results = [300, 400], []
    ids, offsets = make_batch(rows, batch_size=60)
    for threads, accumulate in ((1, "sorted"), (2, "sorted"), (1, "rows"), (1, "auto"), (2, "atomic")):
        torch.set_num_threads(threads)
        bags = make_bags([from_yaml(yaml, compression=0.5, accumulate=accumulate, **changes)] * 2, rows)
        out = bags(ids, offsets)
        out.pow(2).sum().backward()
        results.append((out, bags.slabs[0].weight.grad.to_dense()))
    for out, grad in results[1:]:
        assert_same_bits(out, results[0][0])
        assert grad.equal(results[0][1])  # not as bits: rows that are made dense are added to 0.0


# --- F: FastEmbedding -------------------------------------------------------------------------------------------------


def test_f1_upstreams_simple_backward(kernels, device):
    known = recorded("fast_multi_embedding")["upstream_test_simple_backward"]
    table, weights = Table(0, 0, 3, 3, 0, 4, 4), torch.arange(12.0).view(4, 3) * 10
    for ids, wanted in zip(known["indices"], known["expected"], strict=True):
        ids = torch.tensor(ids)
        grad = torch.tensor([[i, 10 * i, 100 * i] for i in range(1, 6)]).float()
        grad = grad.repeat_interleave(ids.numel() // 5, 0)
        case = make_call(weights, [table], ids.flatten(), index_map=PARTITION).to(device)
        assert case.forward(kernels, SUM).cpu().equal(weights[ids.flatten()])
        assert case.backward(kernels, grad.to(device), SUM).tolist() == wanted


def test_f1_the_drop_in_modules_give_upstreams_simple_backward(device):
    known = recorded("fast_multi_embedding")["upstream_test_simple_backward"]
    weight = torch.arange(12.0).view(4, 3) * 10
    for ids, wanted in zip(known["indices"], known["expected"], strict=True):
        module, ids = FastEmbedding(4, 3, weight, device=device), torch.tensor(ids, device=device)
        out = module(ids)
        assert out.shape == (*ids.shape, 3) and out.cpu().equal(weight[ids.cpu()])
        grad = torch.tensor([[i, 10 * i, 100 * i] for i in range(1, 6)], device=device).float()
        out.backward(grad.view(5, *[1] * (ids.dim() - 1), 3).expand(out.shape))
        assert module.weight.grad.tolist() == wanted


def tables_of(sizes: list[int], dims: list[int]) -> list[Table]:
    """One dense table after another in one slab, their columns side by side."""
    begins = np.cumsum([0, *(n * d for n, d in zip(sizes, dims, strict=True))]).tolist()
    columns = np.cumsum([0, *dims]).tolist()
    pairs = enumerate(zip(sizes, dims, strict=True))
    return [Table(t, columns[t], d, d, begins[t], n, n) for t, (n, d) in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_f2_every_row_of_four_tables_in_one_launch(kernels, device, dtype):
    sizes, dims = [10, 100, 1000, 10_000], [16, 9, 5, 3]
    rng = np.random.default_rng(0)
    parts = [torch.tensor(rng.standard_normal((n, d))).to(dtype) for n, d in zip(sizes, dims, strict=True)]
    ids = torch.tensor(np.array([rng.integers(0, n, 8192) for n in sizes]))
    weights = torch.cat([part.flatten() for part in parts])[:, None]
    case = make_call(weights, tables_of(sizes, dims), ids, index_map=PARTITION).to(device)
    wanted = torch.cat([part[i] for part, i in zip(parts, ids, strict=True)], 1)
    assert_same_bits(case.forward(kernels, SUM), wanted)


@pytest.mark.parametrize("dim", [3, 4, 9])
def test_f3_the_gradient_of_a_mean_squared_error(dim):
    slab = slab_of(named("fast", embedding_dim=dim), 50)
    ids, target = torch.arange(200) * 7 % 50, torch.rand(200, dim, generator=torch.Generator().manual_seed(0))
    nn.functional.mse_loss(look_up(slab, ids), target).backward()
    error = slab.weight.detach().double()[ids] - target
    by_hand = torch.zeros(50, dim, dtype=torch.float64).index_add(0, ids, 2 * error / target.numel())
    torch.testing.assert_close(dense_grad(slab).double(), by_hand, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 1024, 1025, 4096])
def test_f4_vectors_of_1_1024_1025_and_4096_numbers(kernels, device, dim):
    weights, ids = dyadic(20, dim), torch.tensor([3, 19, 3, 0])
    case = make_call(weights, [Table(0, 0, dim, dim, 0, 20, 20)], ids, index_map=PARTITION).to(device)
    assert case.forward(kernels, SUM).cpu().equal(weights[ids])
    grad = grads(4, dim)
    by_hand = torch.zeros(20, dim).index_add(0, ids, grad)
    assert by_hand.any() and case.backward(kernels, grad.to(device), SUM).cpu().equal(by_hand)


@each_choice
def test_f5_an_empty_batch_gives_empty_vectors_and_no_gradient(yaml, changes):
    bags = make_bags([from_yaml(yaml, compression=0.5, **changes)] * 2, [300, 400])
    nothing = torch.empty(0, dtype=torch.int64)
    for ids, offsets in ((nothing, None), (nothing.int(), torch.tensor([0]))):
        bags.zero_grad()
        out = bags(ids, offsets)
        assert out.shape == (0, 2, DIM)
        out.sum().backward()
        assert all(p.grad is None or not p.grad.to_dense().any() for p in bags.parameters())


def test_f6_a_batch_of_one_with_odd_strides(kernels, device):
    weights = dyadic(20, 3)
    case = make_call(weights, [Table(0, 0, 3, 3, 0, 20, 20)], torch.tensor([7]), index_map=PARTITION).to(device)
    wide = grads(1, 30).to(device)[:, 5:8]  # [1, 3] of stride 30: torch calls it contiguous
    assert wide.is_contiguous() and wide.stride(0) == 30
    one = torch.ones(1, 1, device=device).expand(1, 3)
    for grad in (wide, one, wide.clone().as_strided((1, 3), (0, 1))):
        by_hand = torch.zeros(20, 3)
        by_hand[7] = grad[0].cpu()
        assert case.backward(kernels, grad, SUM).cpu().equal(by_hand)
        units, values = case.backward_rows(kernels, grad, SUM)
        assert values.flatten().tolist() == grad.flatten().tolist()


def test_f7_tables_of_many_dims_equal_embeddings_side_by_side_and_store_no_padding():
    known = recorded("fast_multi_embedding")
    sizes, dims = known["sizes"], known["dims"]
    backends = {f"C{t}": named("fast", embedding_dim=d) for t, d in enumerate(dims)}
    slab = make_slab(backends, sizes)
    assert slab.weight.numel() == sum(n * d for n, d in zip(sizes, dims, strict=True))  # upstream: 300 * 14
    padded = dyadic(300, 14)
    columns = known["column_offsets"]
    parts = [padded[:n, columns[t] : columns[t] + d] for t, (n, d) in enumerate(zip(sizes, dims, strict=True))]
    with torch.no_grad():
        slab.weight.view(-1).copy_(torch.cat([part.flatten() for part in parts]))
    ids = torch.tensor(known["input"])
    out = slab(ids.t().flatten(), None, None, 12)
    assert out.tolist() == known["output"]
    out.backward(grads(12, 14))
    found = torch.zeros(300, 14)
    own_grads = dense_grad(slab).view(-1).split([part.numel() for part in parts])
    for t, (n, d) in enumerate(zip(sizes, dims, strict=True)):
        found[:n, columns[t] : columns[t] + d] = own_grads[t].view(n, d)
    by_hand = torch.zeros(300, 14)
    for row, column, value in known["grad_weight_nonzero"]:
        by_hand[row, column] = value
    assert found.equal(by_hand)


@pytest.mark.parametrize("is_padded", [False, True])
def test_f7_the_drop_in_module_takes_upstreams_weights_and_stores_no_padding(device, is_padded):
    known = recorded("fast_multi_embedding")
    sizes, dims, columns = known["sizes"], known["dims"], known["column_offsets"]
    padded = dyadic(300, 14)
    parts = [padded[:n, c : c + d] for n, d, c in zip(sizes, dims, columns, strict=False)]
    flat = torch.cat([part.flatten() for part in parts]).view(-1, 2)
    module = FastMultiEmbedding(sizes, dims, padded if is_padded else flat, device=device)
    assert module.weight.numel() == flat.numel() == 100 * 2 + 200 * 4 + 300 * 8
    assert all(x.cpu().equal(y) for x, y in zip(module.weights, parts, strict=True))
    out = module(torch.tensor(known["input"], device=device))
    assert out.tolist() == known["output"]
    out.backward(grads(12, 14).to(device))
    module.weight.data = module.weight.grad  # whose tables are then those of the gradient
    found = torch.zeros(300, 14)
    for part, n, d, c in zip(module.weights, sizes, dims, columns, strict=False):
        found[:n, c : c + d] = part.cpu()
    by_hand = torch.zeros(300, 14)
    for row, column, value in known["grad_weight_nonzero"]:
        by_hand[row, column] = value
    assert found.equal(by_hand)


def test_f8_an_id_of_a_larger_table_is_refused_in_a_smaller_one(kernels):
    sizes, dims = [100, 200, 300], [2, 4, 8]
    case = make_call(dyadic(100 * 2 + 200 * 4 + 300 * 8, 1), tables_of(sizes, dims), [0, 200, 299], index_map=PARTITION)
    for call in (case.forward, lambda *how: case.backward(kernels, case.random_grad(), SUM)):
        with pytest.raises(RuntimeError, match="feature C2, position 1 of the batch's ids, id 200, limit 200"):
            call(kernels, SUM)


def test_f8_the_drop_in_module_refuses_an_id_of_the_table_beside():
    module = FastMultiEmbedding([100, 200, 300], [2, 4, 8])
    with pytest.raises(IndexError, match="feature table 1, position 4 of the batch's ids, id 200, limit 200"):
        module(torch.tensor([[0, 0, 0], [99, 200, 299]]))


def test_f9_ids_in_one_dimension_are_a_single_tables():
    one, many = FastMultiEmbedding([100], [3]), FastMultiEmbedding([100, 200], [3, 4])
    ids = torch.tensor([3, 99, 3])
    assert_same_bits(one(ids), one.weight.view(100, 3)[ids])
    assert_same_bits(one(ids), one(ids[:, None]))
    with pytest.raises(ValueError, match=r"input has shape \[3\]: it must be \[B, 2\], a column per table"):
        many(ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combine", [ADD, MULTIPLY], ids=["add", "multiply"])
def test_f11_half_and_bfloat16_are_summed_in_float32(kernels, device, dtype, combine):
    ids, offsets = torch.zeros(4096, dtype=torch.int64), torch.tensor([0, 4096])
    tables = [Table(0, 0, 2, 2, 0, 1, 1), Table(0, 0, 2, 2, 2, 1, 1)]
    weights = torch.tensor([[1.0, 1.0], [0.0 if combine == ADD else 1.0] * 2]).to(dtype)
    case = make_call(weights, tables, ids, offsets, index_map=PARTITION, combine=combine, probes=2).to(device)
    assert case.forward(kernels, SUM).tolist() == [[4096, 4096]]  # in half 2048, in bfloat16 256, and no further
    assert case.backward(kernels, torch.ones(1, 2, dtype=dtype, device=device), SUM)[0].tolist() == [4096, 4096]


# --- B: Spotlight's BloomEmbedding ------------------------------------------------------------------------------------


def bloom_call(ids, weights, offsets=None, seeds=MURMUR3_SEEDS[:4]) -> Case:
    """BloomEmbedding(1000, 8, compression_ratio=0.2, num_hash_functions=4), without its padding."""
    tables = [Table(0, 0, weights.shape[1], weights.shape[1], 0, len(weights), 1000, 1, seed) for seed in seeds]
    return make_call(weights, tables, ids, offsets, index_map=MURMUR3, probes=len(seeds))


def test_b1_the_rows_of_every_id_and_the_raw_hashes_of_all_24_seeds(kernels, device):
    known = recorded("spotlight_bloom")
    assert list(MURMUR3_SEEDS) == known["seeds"]
    for seed, hashes in known["raw_signed_hash_ids0_7_all_24_seeds"].items():
        found = index_map.murmur3(torch.arange(8), torch.tensor(int(seed)))
        assert (found - (found >> 31 << 32)).tolist() == hashes
    numbers = torch.arange(200.0)[:, None]
    calls = [bloom_call(torch.arange(1000), numbers, seeds=[seed]).to(device) for seed in MURMUR3_SEEDS[:4]]
    rows = torch.cat([call.forward(kernels, SUM).cpu() for call in calls], 1).long()
    rows[known["padding_idx"]] = 0  # where Spotlight puts its padding
    assert rows[:64].tolist() == known["hashed_rows_ids0_63"]
    assert hashlib.sha256(rows.numpy().astype("<i8").tobytes()).hexdigest() == known["full_sha256_int64_le"]


def test_b1_the_drop_in_module_reads_spotlights_rows(device):
    known = recorded("spotlight_bloom")
    module = BloomEmbedding(1000, 200, hash="murmur3", _weight=torch.eye(200), padding_idx=None, device=device)
    found = module(torch.arange(1, 64, device=device)).cpu()  # [ids, rows]: how often each is read
    wanted = torch.zeros(63, 200)
    for counts, rows in zip(wanted, known["hashed_rows_ids0_63"][1:], strict=True):
        counts.index_add_(0, torch.tensor(rows), torch.ones(4))
    assert found.equal(wanted)
    assert BloomEmbedding(1000, 8).compressed_num_embeddings == known["compressed"]


def test_b2_a_negative_hash_is_reduced_as_python_does(kernels):
    seed = MURMUR3_SEEDS[0]
    hashes = [oracle.murmur3(id.to_bytes(4, "little"), seed) for id in range(1000)]
    found = bloom_call(torch.arange(1000), torch.arange(200.0)[:, None], seeds=[seed]).forward(kernels, SUM)
    assert found.long().flatten().tolist() == [h % 200 for h in hashes]
    assert sum(h % 200 != h % 2**32 % 200 for h in hashes) > 400  # what an unsigned remainder would give


def test_b3_output_and_gradient(kernels, device):
    known = recorded("spotlight_bloom")
    weights = dyadic(200, 8)
    weights[0] = 0  # Spotlight's padding row
    case = bloom_call(torch.arange(1, 64), weights).to(device)
    assert case.forward(kernels, SUM).tolist() == known["output_bag_false_ids0_63"][1:]
    grad = case.backward(kernels, grads(64, 8)[1:].to(device), SUM).cpu()
    by_hand = torch.zeros(200, 8)
    for row, values in known["grad_weight_nonzero_rows"].items():
        by_hand[int(row)] = torch.tensor(values)
    assert grad.equal(by_hand)


@pytest.mark.parametrize("bag", [False, True])
def test_b3_the_drop_in_module_gives_spotlights_output_and_gradient(device, bag):
    known = recorded("spotlight_bloom")
    weights = dyadic(200, 8)
    weights[0] = 0  # Spotlight's padding row
    module = BloomEmbedding(1000, 8, bag=bag, hash="murmur3", shapes="upstream", _weight=weights, device=device)
    out = module(torch.arange(64, device=device))
    assert out.shape == (64, 1, 8)
    assert out[:, 0].tolist() == known["output_bag_false_ids0_63"]
    out.backward(grads(64, 1, 8).to(device))
    by_hand = torch.zeros(200, 8)
    for row, values in known["grad_weight_nonzero_rows"].items():
        by_hand[int(row)] = torch.tensor(values)
    assert module.weight.grad.cpu().equal(by_hand)


def test_b4_bags_are_sums_of_what_single_ids_give(kernels, device):
    known = torch.tensor(recorded("spotlight_bloom")["output_bag_true_ids0_63_right"])
    offsets = torch.tensor([0, 1, 1, 4, 40, 63])
    out = bloom_call(torch.arange(1, 64), dyadic(200, 8), offsets).to(device).forward(kernels, SUM).cpu()
    ids = [range(1 + a, 1 + b) for a, b in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)]
    assert out.equal(torch.stack([known[list(bag)].sum(0) for bag in ids]))


@pytest.mark.parametrize("hash", ["mixed", "murmur3"])
@pytest.mark.parametrize("padding_idx", [0, 7, 999, -1])
def test_b5_any_padding_is_zero_without_gradient_and_no_other_id_loses_a_row(device, hash, padding_idx):
    how = dict(hash=hash, seed=3, _weight=dyadic(200, 8), device=device)
    padded, plain = (
        BloomEmbedding(1000, 8, padding_idx=padding_idx, **how),
        BloomEmbedding(1000, 8, padding_idx=None, **how),
    )
    ids = torch.arange(1000, device=device)
    is_padding = ids == padding_idx % 1000
    out, wanted = padded(ids), plain(ids)
    assert not out[is_padding].any() and wanted[is_padding].any()
    assert out[~is_padding].equal(wanted[~is_padding])
    out.sum().backward()
    wanted[~is_padding].sum().backward()
    assert padded.weight.grad.equal(plain.weight.grad)
    padded.weight.grad = None
    padded(ids[is_padding]).sum().backward()
    assert not padded.weight.grad.any()


@pytest.mark.parametrize("hash", ["mixed", "murmur3"])
def test_b6_without_a_padding_every_id_has_its_rows(device, hash):
    module = BloomEmbedding(1000, 8, hash=hash, padding_idx=None, device=device)
    vectors = module(torch.arange(1000, device=device))
    assert len(vectors.unique(dim=0)) == 1000 and vectors.any(1).all()


def test_b7_vectors_have_the_shape_of_the_ids_and_spotlights_by_option():
    ours, spotlights = (
        BloomEmbedding(1000, 8, seed=3, shapes=shapes, _weight=dyadic(200, 8)) for shapes in ("torch", "upstream")
    )
    ids = torch.arange(24)
    for shape in ((24,), (4, 6), (2, 3, 4), (0,), (0, 5)):
        batch = ids[: int(np.prod(shape))].view(shape)
        assert ours(batch).shape == (*shape, 8)
        assert spotlights(batch).shape == ((*shape, 1, 8) if len(shape) == 1 else (*shape, 8))
        assert_same_bits(spotlights(batch).flatten(), ours(batch).flatten())


@pytest.mark.parametrize("hash", ["mixed", "murmur3"])
def test_b8_a_checkpoint_holds_all_there_is_and_travels(hash):
    first, other = (slab_of(named("bloom", compression=0.2, num_hashes=4, hash=hash), 1000) for _ in range(2))
    with torch.no_grad():
        first.weight.normal_()
    ids = torch.arange(1000)
    kept = look_up(first, ids)  # a cache of hashes would be made here
    state = first.state_dict()
    assert set(state) == {"weight", "tables"}
    size = sum(t.numel() * t.element_size() for t in state.values())
    assert size == pytest.approx(0.2 * 1000 * DIM * 4, rel=0.01)
    other.load_state_dict(state)
    assert_same_bits(look_up(other, ids), kept)
    torch.testing.assert_close(look_up(other.double(), ids), kept.double(), rtol=1e-6, atol=1e-6)
    assert_same_bits(look_up(other.float(), ids), kept)


@pytest.mark.parametrize("combine", ["sum", "mean", "learned"])
def test_b9_a_table_of_four_ids_has_a_row_or_is_refused(combine):
    backend = named("bloom", compression=0.2, num_hashes=4, combine=combine)
    with pytest.raises(ValueError, match="cannot reach it for C1; the smallest it can is"):
        slots_of(backend, {"C1": 4})
    bags = make_bags([backend] * 2, [4, 10_000])
    assert vectors(bags, 0, torch.arange(4)).isfinite().all()
    assert bags.slabs[0].tables[:, 5].min() >= 1


@pytest.mark.parametrize(
    "ratio, share",
    [(0.2, 0.65), pytest.param(0.5, 0.55, marks=pytest.mark.once), pytest.param(1, 0.45, marks=pytest.mark.once)],
)
def test_b10_a_bloom_factorisation_learns_planted_ratings(ratio, share):
    """Spotlight's test of its explicit model, 2 hashes at these ratios. share: of the error of the mean rating."""
    generator = torch.Generator().manual_seed(0)
    num_ids, num_ratings = (300, 200), 5000
    users, items = (  # Zipf's, as in data
        torch.multinomial(1 / torch.arange(1, n + 1) ** 1.5, num_ratings, True, generator=generator) for n in num_ids
    )
    tastes, films = (torch.randn(n, 2, generator=generator) for n in num_ids)
    ratings = (3 + (tastes[users] * films[items]).sum(1)).clamp(1, 5)
    torch.manual_seed(0)
    how = dict(compression_ratio=ratio, num_hash_functions=2, padding_idx=None)
    model = nn.ModuleList([*(BloomEmbedding(n, 8, **how) for n in num_ids), ZeroEmbedding(num_ids[1], 1)])

    def error(rows: slice) -> torch.Tensor:
        user, item, bias = model[0](users[rows]), model[1](items[rows]), model[2](items[rows])[:, 0]
        return nn.functional.mse_loss(3 + (user * item).sum(1) + bias, ratings[rows])

    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(160):
        optimizer.zero_grad()
        error(slice(step % 8 * 500, (step % 8 + 1) * 500)).backward()
        optimizer.step()
    unseen = slice(4000, None)
    spread = (ratings[unseen] - ratings[:4000].mean()).pow(2).mean().sqrt()
    assert error(unseen).sqrt() < share * spread


def test_b11_the_mean_of_the_rows_is_by_option_and_the_sum_as_upstream():
    total, mean = (named("bloom", compression=0.5, num_hashes=4, hash="murmur3", combine=c) for c in ("sum", "mean"))
    weight = slab_of(total, 1000).weight.detach()
    a, b = slab_of(total, 1000, weight), slab_of(mean, 1000, weight)
    ids = torch.arange(1000)
    assert_same_bits(look_up(b, ids), look_up(a, ids) / 4)
    rows = [[slot for slot, _ in (oracle.reads(Table(*t), MURMUR3, i)[0] for t in a.tables.tolist())] for i in range(9)]
    torch.testing.assert_close(look_up(a, ids)[:9], weight[torch.tensor(rows)].sum(1), rtol=1e-6, atol=1e-6)


# --- Q: quotient and remainder ----------------------------------------------------------------------------------------

each_operation = pytest.mark.parametrize("operation", ["add", "mult", "concat"])


def facebooks(operation: str, order="compose", pooling=Pooling.SUM) -> Slab:
    """QREmbeddingBag(100, 4, 4, operation) with the recorded weights."""
    dim = 8 if operation == "concat" else 4
    how = dict(embedding_dim=dim, operation=operation, collisions=4, order=order, accumulate="sorted")
    weights = torch.cat([dyadic(25, 4), dyadic(4, 4, mul=11, mod=31, off=15, den=16)])
    return slab_of(named("qr", **how), 100, weights, pooling)


@each_operation
@pytest.mark.parametrize("order", ["compose", "legacy"])
def test_q1_every_id_and_its_gradients(operation, order):
    known, slab = recorded("qr_facebook")["ops"][operation], facebooks(operation, order)
    out = look_up(slab, range(100))
    assert out.tolist() == known["single_ids0_99"]
    out.backward(grads(*out.shape))
    assert dense_grad(slab)[:25].tolist() == known["grad_weight_q"]
    assert dense_grad(slab)[25:].tolist() == known["grad_weight_r"]


def facebooks_module(operation: str, device="cpu", **how) -> QREmbeddingBag:
    weights = [dyadic(25, 4), dyadic(4, 4, mul=11, mod=31, off=15, den=16)]
    return QREmbeddingBag(100, 4, 4, operation, _weight=weights, device=device, **how)


@each_operation
@pytest.mark.parametrize("order", ["compose", "legacy"])
@each_pooling_name
def test_q1_the_drop_in_module_gives_facebooks_vectors_and_gradients(device, operation, order, pooling):
    known = recorded("qr_facebook")["ops"][operation]
    module = facebooks_module(operation, device, order=order, mode=pooling)
    out = module(torch.arange(100, device=device)[:, None])
    assert out.tolist() == known["single_ids0_99"]
    out.backward(grads(*out.shape).to(device))
    module.weight.data = module.weight.grad  # whose tables are then those of the gradient
    assert module.weight_q.tolist() == known["grad_weight_q"]
    assert module.weight_r.tolist() == known["grad_weight_r"]


@each_operation
@each_pooling_name
def test_q2_the_drop_in_module_pools_composed_vectors_and_facebooks_by_option(device, operation, pooling):
    known = recorded("qr_facebook")
    batch = torch.tensor(known["bag_indices"], device=device), torch.tensor(known["bag_offsets"], device=device)
    legacy = facebooks_module(operation, device, mode=pooling, order="legacy")(*batch)
    torch.testing.assert_close(
        legacy.cpu(), torch.tensor(known["ops"][operation]["bags"][pooling]), rtol=1e-6, atol=1e-6
    )
    alone = torch.tensor(known["ops"][operation]["single_ids0_99"])
    ours = facebooks_module(operation, device, mode=pooling)(*batch)
    wanted = nn.functional.embedding_bag(batch[0].cpu(), alone, batch[1].cpu(), mode=pooling)
    torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-6, atol=1e-6)
    if pooling == "sum":
        assert ours.tolist() == known["ops"][operation]["compose_per_id_then_sum"]


@each_operation
@each_pooling_name
def test_q2_bags_compose_per_id_then_pool_and_in_facebooks_order_by_option(operation, pooling):
    known = recorded("qr_facebook")
    batch = known["bag_indices"], [*known["bag_offsets"], 5]
    ours = look_up(facebooks(operation, pooling=Pooling[pooling.upper()]), *batch)
    legacy = look_up(facebooks(operation, "legacy", Pooling[pooling.upper()]), *batch)
    torch.testing.assert_close(legacy, torch.tensor(known["ops"][operation]["bags"][pooling]), rtol=1e-6, atol=1e-6)
    alone = look_up(facebooks(operation), known["bag_indices"])
    bags = [alone[0:2], alone[2:2], alone[2:3], alone[3:5]]
    if pooling == "sum":
        assert ours.tolist() == known["ops"][operation]["compose_per_id_then_sum"]
        wanted = [bag.sum(0) for bag in bags]
    elif pooling == "mean":
        wanted = [bag.sum(0) / max(1, len(bag)) for bag in bags]
    else:
        wanted = [bag.max(0).values if len(bag) else torch.zeros_like(alone[0]) for bag in bags]
    assert ours.equal(torch.stack(wanted))


def test_q2_the_gradient_of_facebooks_order_is_that_of_its_pools():
    for pooling in Pooling:
        slab = facebooks("mult", "legacy", pooling).double()
        known = recorded("qr_facebook")
        ids, offsets = torch.tensor(known["bag_indices"]), torch.tensor([*known["bag_offsets"], 5])
        weights = slab.weight.detach().clone().requires_grad_()
        mode = pooling.name.lower()
        sides = (ids // 4, weights[:25]), (ids % 4, weights[25:])
        pools = [nn.functional.embedding_bag(*side, offsets, mode=mode, include_last_offset=True) for side in sides]
        out, wanted = look_up(slab, ids, offsets.tolist()), pools[0] * pools[1]
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=0)
        out.pow(2).sum().backward()
        wanted.pow(2).sum().backward()
        torch.testing.assert_close(dense_grad(slab), weights.grad, rtol=1e-12, atol=1e-12)


@each_operation
def test_q3_sample_weights_are_linear_and_squared_only_in_facebooks_order(operation):
    known = recorded("qr_facebook")
    ids, offsets = known["bag_indices"], [*known["bag_offsets"], 5]
    weights = torch.tensor(known["per_sample_weights"])
    ours, alone = look_up(facebooks(operation), ids, offsets, weights), look_up(facebooks(operation), ids)
    scaled = alone * weights[:, None]
    assert ours.equal(torch.stack([scaled[0:2].sum(0), scaled[2:2].sum(0), scaled[2:3].sum(0), scaled[3:5].sum(0)]))
    assert look_up(facebooks(operation), ids, offsets, 2 * weights).equal(2 * ours)
    legacy = look_up(facebooks(operation, "legacy"), ids, offsets, weights)
    assert legacy.tolist() == known["ops"][operation]["bags_sum_per_sample_weights"]
    twice = look_up(facebooks(operation, "legacy"), ids, offsets, 2 * weights)
    assert twice.equal((4 if operation == "mult" else 2) * legacy)


@each_operation
def test_q3_the_drop_in_modules_sample_weights_are_linear_and_facebooks_by_option(device, operation):
    known = recorded("qr_facebook")
    batch = torch.tensor(known["bag_indices"], device=device), torch.tensor(known["bag_offsets"], device=device)
    weights = torch.tensor(known["per_sample_weights"], device=device)
    legacy = facebooks_module(operation, device, mode="sum", order="legacy")
    assert legacy(*batch, weights).tolist() == known["ops"][operation]["bags_sum_per_sample_weights"]
    ours = facebooks_module(operation, device, mode="sum")
    alone = torch.tensor(known["ops"][operation]["single_ids0_99"])[known["bag_indices"]]
    scaled = alone * weights.cpu()[:, None]
    assert (
        ours(*batch, weights)
        .cpu()
        .equal(torch.stack([scaled[i:j].sum(0) for i, j in ((0, 2), (2, 2), (2, 3), (3, 5))]))
    )
    assert ours(*batch, 2 * weights).equal(2 * ours(*batch, weights))


def quotient_call(id: int, c: int, dtype=torch.int64) -> tuple[Case, int]:
    """A call that gives 1 where the id reads its own quotient and remainder, and 0 for every other row."""
    quotients = id // c + 3
    weights = torch.from_numpy(np.zeros((quotients + c, 1), np.float16))  # calloc: never touched, so never in memory
    weights[id // c] = weights[quotients + id % c] = 1
    tables = [Table(0, 0, 1, 1, 0, quotients, quotients * c, c), Table(0, 1, 1, 1, quotients, c, quotients * c, 1)]
    ids = torch.tensor([id], dtype=dtype)
    return make_call(weights, tables, ids, index_map=PARTITION, combine=CONCAT, probes=2)


def test_q4_ids_around_2_to_the_24_31_and_40_are_exact(kernels):
    wrong = recorded("qr_facebook")["float_division_wrong"]
    pairs = [(case["id"], case["collisions"]) for case in wrong]
    assert all(case["id"] // case["collisions"] == case["right_q"] != case["upstream_q"] for case in wrong)
    pairs += [(2**24 + d, c) for d in (-1, 0, 1, 3) for c in (2, 3, 60)]
    pairs += [(2**31 + d, 601) for d in (-2, -1, 0, 1)] + [(2**40 + d, 2**20 + 7) for d in (-1, 0, 1)]
    for id, c in pairs:
        assert quotient_call(id, c).forward(kernels, SUM).tolist() == [[1, 1]], (id, c)
        if id < 2**31:
            assert quotient_call(id, c, torch.int32).forward(kernels, SUM).tolist() == [[1, 1]], (id, c)


def test_q4_digits_of_ids_up_to_2_to_the_63_are_exact(kernels, device):
    n, radix = 2**63 - 1, 2**16
    tables = [Table(0, k, 1, 1, 0, radix, n, radix**k) for k in range(4)]  # of one slice, whose numbers are their index
    ids = torch.tensor([0, 2**24 + 1, 2**31, 2**40 + 3, 2**53 + 1, 2**62 + 12_345, 2**63 - 2])
    weights = torch.arange(radix, dtype=torch.float64)[:, None]
    case = make_call(weights, tables, ids, index_map=PARTITION, combine=CONCAT, probes=4).to(device)
    wanted = [[id // radix**k % radix for k in range(4)] for id in ids.tolist()]
    assert case.forward(kernels, SUM).tolist() == wanted


@pytest.mark.parametrize("n", [1, 2, 97, 5000])
@pytest.mark.parametrize("how", [*({"collisions": c} for c in (4, 60)), *({"partitions": p} for p in (2, 3, 5))])
def test_q5_all_ids_read_other_rows(n, how):
    backend = named("qr", compression=0.5, **how)
    slots = backend.fit(n, 0.5 * backend.dense_bytes(n))
    tables = [Table(0, 0, DIM, DIM, 0, slots[probe.slice], n, probe.divisor) for probe in backend.probes(slots)]
    pairs = {tuple(oracle.reads(table, PARTITION, id)[0][0] for table in tables) for id in range(n)}
    assert len(pairs) == n


def test_q5_the_vectors_of_all_ids_differ():
    for operation in ("add", "mult", "concat"):
        out = look_up(slab_of(named("qr", compression=0.1, operation=operation), 5000), range(5000))
        assert len(out.detach().unique(dim=0)) == 5000


def test_q6_too_few_pairs_are_refused_and_the_divisor_is_the_remainders_rows(kernels):
    def call(rows_q: int, rows_r: int, n: int) -> Case:
        tables = [Table(0, 0, 2, 2, 0, rows_q, n, rows_r), Table(0, 2, 2, 2, 2 * rows_q, rows_r, n, 1)]
        how = dict(index_map=PARTITION, combine=CONCAT, probes=2)
        return make_call(dyadic(rows_q + rows_r, 2), tables, torch.arange(min(n, 15)), **how)

    for rows_q, rows_r in ((5, 3), (3, 5), (25, 4), (4, 25)):
        n = rows_q * rows_r
        assert len(call(rows_q, rows_r, n).forward(kernels, SUM).unique(dim=0)) == min(n, 15)
        with pytest.raises(RuntimeError, match=f"feature C1: .*{n} ids apart, not {n + 1}"):
            call(rows_q, rows_r, n + 1).forward(kernels, SUM)
    for partitions in (2, 3, 4):
        tables = slab_of(named("qr", compression=0.5, partitions=partitions), 5000).tables
        slots, divisors = tables[:, 5].tolist(), tables[:, 7].tolist()
        assert divisors == [int(np.prod(slots[:p])) for p in range(partitions)]
    assert facebooks("add").tables[:, 7].tolist() == [4, 1]


@pytest.mark.parametrize(
    "known", recorded("deeprec_multihash")["cases"], ids=lambda case: f"{case['rows_q']}x{case['rows_r']}"
)
def test_q6_deeprecs_variable_with_the_right_divisor_tells_all_ids_apart(device, known):
    rows_q, rows_r = known["rows_q"], known["rows_r"]
    numbers = [torch.arange(float(n))[:, None] for n in (rows_q, rows_r)]  # that are their own row
    module = MultiHashEmbedding([[rows_q, 1], [rows_r, 1]], operation="concat", _weight=numbers, device=device)
    assert module.num_embeddings == known["capacity"] == known["distinct_pairs_right"]
    pairs = module(torch.arange(known["capacity"], device=device)).tolist()
    assert pairs[: len(known["right"])] == known["right"]
    assert len(set(map(tuple, pairs))) == known["capacity"]
    with pytest.raises(IndexError, match=f"id {known['capacity']}, limit {known['capacity']}"):
        MultiHashEmbedding([[rows_q, 1], [rows_r, 1]])(torch.tensor([known["capacity"]]))
    with pytest.raises(ValueError, match=f"tell {known['capacity']} ids apart"):
        MultiHashEmbedding([[rows_q, 1], [rows_r, 1]], num_embeddings=known["capacity"] + 1)


def test_q6_deeprecs_test_sees_that_ids_1_and_4_differ():
    known = recorded("deeprec_multihash")["test_ids"]
    module = MultiHashEmbedding(known["dims"], operation="concat")
    assert known["q"][1] == known["q"][3] and known["r"][1] == known["r"][3]  # there they share both rows
    assert len(module(torch.tensor(known["ids"])).unique(dim=0)) == len(known["ids"])


def test_q6_deeprecs_example_trains_as_its_readme_says():
    known = recorded("deeprec_multihash")["readme_example"]
    ones = [torch.ones(shape) for shape in known["dims"]]
    module = MultiHashEmbedding(known["dims"], operation=known["operation"], _weight=ones)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.1, initial_accumulator_value=0.1, eps=0)
    for wanted in known["weight_after_k_adagrad_steps"]:
        out = module(torch.tensor(known["ids"]))
        torch.testing.assert_close(out, torch.full((4, 4), wanted), rtol=1e-6, atol=0)
        optimizer.zero_grad()
        out.backward(torch.full_like(out, 2.0))
        optimizer.step()


@pytest.mark.parametrize("known", recorded("qr_facebook")["table_sizes"], ids=str)
def test_q6_facebooks_tables_have_its_sizes(known):
    assert slots_of(named("qr", collisions=known["c"]), {"C1": known["n"]}) == {"C1": (known["q"], known["r"])}


@pytest.mark.parametrize("id", [-1, 101, 102, 103, 104, 2**40, -(2**63)])
def test_q7_ids_that_are_not_of_the_feature_are_refused(id):
    slab = slab_of(named("qr", collisions=4), 101)  # 26 x 4 pairs: 101, 102 and 103 have one
    with pytest.raises(RuntimeError, match=f"feature C1, position 1 of the batch's ids, id {id}, limit 101"):
        look_up(slab, [0, id])


@pytest.mark.parametrize("how", [{"collisions": 1000}, {"partitions": 3}], ids=["pairs", "triples"])
@each_operation
def test_q8_composed_vectors_begin_around_zero_as_wide_as_a_tables_row(operation, how):
    n = 1_000_000
    slab = slab_of(named("qr", embedding_dim=24, compression=0.004, operation=operation, **how), n)
    with torch.no_grad():
        sample = look_up(slab, torch.randint(n, (20_000,), generator=torch.Generator().manual_seed(0)))
    # tables of 1000 rows, and of 17 and up in triples: their own means are seen by all
    assert sample.var().item() * 3 * n == pytest.approx(1, abs=0.1)
    assert abs(sample.mean().item()) * n**0.5 < 0.05


def test_q8_facebooks_own_range_is_by_option():
    slab = slab_of(named("qr", compression=0.1, init="upstream"), 10_000)
    for begin, slots, width in slab.slices["C1"]:
        weights = slab.weight.detach().view(-1)[begin : begin + slots * width]
        assert slots**-0.5 <= weights.min() and weights.max() <= 1
        assert weights.mean().item() == pytest.approx((1 + slots**-0.5) / 2, abs=0.1)


def test_q9_small_dense_tables_beside_large_concatenated_ones():
    rows = [3, 5000, 20, 8000]
    large = named("qr", compression=0.3, operation="concat")
    bags = make_bags([dense(), large, dense(), large], rows)
    ids, offsets = make_batch(rows)
    out = bags(ids, offsets)
    assert out.shape == (7, 4, DIM)
    out.sum().backward()
    assert all(p.grad is not None for p in bags.parameters())


def test_q10_mult_and_mul_are_one_word():
    a, b = (slab_of(named("qr", compression=0.1, operation=word), 5000) for word in ("mult", "mul"))
    assert_same_bits(look_up(a, range(100)), look_up(b, range(100)))


@pytest.mark.parametrize("changes", [{"operation": "mult"}, {"operation": "concat"}, {"order": "legacy"}])
def test_q11_gradients_of_touched_rows_are_sparse_and_train(changes):
    slab = slab_of(named("qr", compression=0.1, accumulate="rows", **changes), 5000)
    full = slab_of(named("qr", compression=0.1, accumulate="sorted", **changes), 5000)
    for found in (slab, full):
        optimizer = optim.Adagrad(found.parameters(), lr=0.1, eps=1e-8)
        look_up(found, [7, 4999, 7]).pow(2).sum().backward()
        assert found.weight.grad.is_sparse == (found is slab)
        optimizer.step()
    assert slab.weight.grad._nnz() == 4  # two quotients and two remainders
    assert slab.weight.equal(full.weight) and not slab.weight.equal(slab_of(slab.backend, 5000).weight)


@pytest.mark.parametrize(
    "case", recorded("md_solver")["cases"], ids=lambda case: f"{case['alpha']}-{case['d0']}-{case['round_dim']}"
)
def test_q12_mixed_dimensions_are_facebooks_and_whole(case):
    counts = recorded("md_solver")["criteo_kaggle_counts"]
    dims = mixed_dimensions(counts, case["d0"], case["alpha"], power_of_two=case["round_dim"])
    assert dims == case["dims"] and {type(dim) for dim in dims} == {int}


def test_q12_tables_below_the_threshold_keep_their_dim_and_all_of_them_make_embeddings():
    counts = recorded("md_solver")["criteo_kaggle_counts"]
    dims = mixed_dimensions(counts, 16, 0.3, threshold=200)
    assert all((dim == 16) == (n <= 200 or n == min(counts)) for n, dim in zip(counts, dims, strict=True))
    sizes = [min(n, 1000) for n in counts]
    vectors = FastMultiEmbedding(sizes, dims)(torch.tensor([[n - 1 for n in sizes]]))
    assert vectors.shape == (1, sum(dims)) and vectors.all()
    for wrong in ([], [3, 0]):
        with pytest.raises(ValueError, match="must be at least 1"):
            mixed_dimensions(wrong, 16, 0.3)
    with pytest.raises(ValueError, match="alpha=-1"):
        mixed_dimensions([3], 16, -1)


# --- D: what concerns every backend -----------------------------------------------------------------------------------


def test_d2_every_feature_has_its_own_backend():
    rows = [700 + f for f in range(len(YAMLS))]
    bags = make_bags([from_yaml(path, compression=0.5) for path in YAMLS], rows)
    assert [row["backend"] for row in bags.feature_table()] == [path.stem for path in YAMLS]
    assert len(bags.slabs) == len(YAMLS)


@each_choice
def test_d5_parameters_are_those_of_the_checkpoint_and_of_the_report(yaml, changes):
    bags = make_bags([from_yaml(yaml, compression=0.5, **changes)] * 2, [300, 5000])
    counted = sum(p.numel() for p in bags.parameters())
    saved = sum(t.numel() for key, t in bags.state_dict().items() if key.endswith("weight"))
    assert counted == saved == sum(row["weights"] for row in bags.feature_table())


@each_choice
def test_d7_a_batch_is_not_changed_in_place(yaml, changes):
    rows = [300, 4000]
    bags = make_bags([from_yaml(yaml, compression=0.5, **changes)] * 2, rows)
    ids, offsets = make_batch(rows)
    weights = torch.rand(len(ids))
    before = [x.clone() for x in (ids, offsets, weights)]
    versions = [x._version for x in (ids, offsets, weights)]
    bags(ids, offsets, weights).sum().backward()
    assert all(x.equal(y) for x, y in zip((ids, offsets, weights), before, strict=True))
    assert [x._version for x in (ids, offsets, weights)] == versions
