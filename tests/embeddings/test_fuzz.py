"""The CPU kernels under sanitizers, called at random for a few seconds; and that the fuzzer would find something."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import MEAN, MIXED, SIGNED, SUM, assert_same_bits, make_case
from random_calls import DTYPES, OWN_WIDTHS

from embeddings import native, reference

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(os.environ.get("EMBEDDINGS_NATIVE") == "off", reason="EMBEDDINGS_NATIVE=off"),
]


@pytest.fixture
def fuzz(tmp_path):
    """A function: fuzzes with options, and returns the exit status, what was printed and what was recorded."""
    try:
        native.sanitizer_libraries()
    except RuntimeError as error:
        pytest.skip(str(error))

    def run(*options: str) -> tuple[int, str, dict]:
        command = [sys.executable, "-m", "benchmarks.reliability.fuzz", *options]
        env = os.environ | {"OUT": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert (tmp_path / "fuzz.json").exists(), done.stderr[-3000:]
        return done.returncode, done.stdout, json.loads((tmp_path / "fuzz.json").read_text())

    return run


@pytest.mark.slow
def test_nothing_is_found_in_a_thousand_calls(fuzz):
    status, text, record = fuzz("--seed", "0", "--calls", "1000")
    assert (status, record["calls"], record["findings"]) == (0, 1000, []), text
    good, refused = (sum(row[x] for row in record["rows"]) for x in ("good", "refused"))
    assert good + refused == 1000 and refused > 100
    assert {row["operator"].split(",")[0] for row in record["rows"] if row["good"]} == {
        "bag",
        "bag_into",
        "bag_backward",
        "bag_backward_rows",
        "bag_backward_sample_weights",
        "bag_update",
        "dot_interaction",
        "dot_interaction_backward",
        "relu_backward",
    }


@pytest.mark.slow
def test_a_read_beyond_the_slab_is_found_and_told_how_to_repeat(fuzz):
    status, text, record = fuzz("--seed", "7", "--calls", "2", "--beyond")
    assert status == 1 and len(record["findings"]) == 2
    for seed, finding in zip((7, 8), record["findings"], strict=True):
        assert "AddressSanitizer: heap-buffer-overflow" in finding and "embeddings::" in finding and finding in text
        assert f"python -m benchmarks.reliability.fuzz --seed {seed} --calls 1 --beyond" in finding


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("width", OWN_WIDTHS)
def test_a_width_with_kernels_of_its_own_gives_the_bits_of_the_reference(native_kernels, width, dtype):
    """Of means and of negated chunks: with 128 numbers of float64 both once ended the process."""
    for index_map, pooling in ((MIXED, MEAN), (SIGNED, SUM)):
        how = dict(dims=(width,), width=width, num_slots=20, dtype=dtype)
        case = make_case(np.full((2, 50), 5), index_map=index_map, **how)
        grad = case.random_grad()
        assert_same_bits(case.forward(native_kernels, pooling), case.forward(reference, pooling))
        assert_same_bits(case.backward(native_kernels, grad, pooling), case.backward(reference, grad, pooling))
