"""What a page of Triton makes of random rows: copied out, or each with another row added; roofs of benchmarks.roof.

Needs triton."""

import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048  # of a program: four 16-byte loads of each of its threads


@triton.jit
def _gather(table, rows, out, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there, columns = (at < num_rows)[:, None], tl.arange(0, DIM)[None, :]
    row = tl.load(rows + at, mask=at < num_rows, other=0).to(tl.int64)
    values = tl.load(table + row[:, None] * DIM + columns, mask=is_there)
    tl.store(out + at[:, None] * DIM + columns, values, mask=is_there)


@triton.jit
def _add(table, rows, values, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there, columns = (at < num_rows)[:, None], tl.arange(0, DIM)[None, :]
    row = tl.load(rows + at, mask=at < num_rows, other=0).to(tl.int64)
    place = table + row[:, None] * DIM + columns
    total = tl.load(place, mask=is_there) + tl.load(values + at[:, None] * DIM + columns, mask=is_there)
    tl.store(place, total, mask=is_there)


def gather(table: Tensor, rows: Tensor, out: Tensor) -> None:
    """out [n, D] = table[rows]. D: a power of two up to 2048; all contiguous."""
    _launch(_gather, table, rows, out)


def add_(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """table[rows] += values [n, D], without atomics: no row may come twice."""
    _launch(_add, table, rows, values)


def _launch(kernel, table: Tensor, rows: Tensor, side: Tensor) -> None:
    dim = table.shape[1]
    block = NUMBERS // dim
    kernel[(triton.cdiv(len(rows), block),)](table, rows, side, len(rows), DIM=dim, BLOCK=block)
