"""Counted bytes are exact; the measured peak follows what was allocated since the reset."""

import pytest
import torch

from dlrm import memory


def test_optimizer_bytes_counts_each_state_tensor():
    weight = torch.nn.Parameter(torch.zeros(10, 3))
    weight.grad = torch.ones(10, 3)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    assert memory.optimizer_bytes(optimizer) == 0  # Adam's state comes with the first step
    optimizer.step()
    assert memory.optimizer_bytes(optimizer) == 2 * 30 * 4 + 4  # two moments and a float32 step count


def test_peak_sees_what_was_freed_and_forgets_it_on_reset():
    if not memory.reset_peak("cpu"):
        pytest.skip("this system cannot reset the peak")
    before = memory.peak_bytes("cpu")
    torch.ones(50 * 2**20 // 4)  # 50 MiB, touched, then freed
    grown = memory.peak_bytes("cpu") - before
    assert 45 * 2**20 < grown < 60 * 2**20
    memory.reset_peak("cpu")
    assert memory.peak_bytes("cpu") - before < 10 * 2**20


def test_a_gpus_peak_is_restarted_once_torch_knows_its_devices(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "init", lambda: called.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", called.append)
    assert memory.reset_peak("cuda:0") and called == ["init", "cuda:0"]


def test_format_bytes_is_in_units_of_1024_squared():
    assert [memory.format_bytes(n) for n in (0, 3 * 2**19, 25 * 2**20, 2000 * 2**20)] == [
        "0.00 MiB",
        "1.50 MiB",
        "25.0 MiB",
        "2,000 MiB",
    ]


def test_gradient_bytes_counts_indices_and_values_of_sparse_gradients():
    dense, sparse, none = (torch.nn.Parameter(torch.zeros(10, 4)) for _ in range(3))
    dense.grad = torch.ones(10, 4)
    sparse.grad = torch.sparse_coo_tensor([[1, 7, 8]], torch.ones(3, 4), (10, 4), check_invariants=True)
    assert memory.gradient_bytes([dense, sparse, none]) == 10 * 4 * 4 + 3 * (8 + 4 * 4)
