"""What the CUDA kernels should take, by the bytes they move.  python -m benchmarks.predicted

Counted, not measured: each kernel's reads and writes of device memory in whole sectors of 32 bytes, over the bandwidth
of a copy. Every row is read or written once, and nothing is found in a cache, which holds for rows of tables larger
than the L2 cache; what kernels of one call hand on to each other stays in it at small batches, so those may be faster.
A launch takes about 2 us in a graph, and that is what small batches cost.
"""

import math
from collections.abc import Iterator

from benchmarks.shapes import TABLES
from dlrm.report import markdown_table

COPY = 4.3e12  # bytes per second, of a copy on an H200
LAUNCH = 2e-6  # seconds, of a small kernel in a graph
SECTOR, FLOAT = 32, 4
STATES = {
    "sgd": 0,
    "rowwise_adagrad": 0,
    "adagrad": 1,
    "adam": 2,
}  # whole rows of state that an update reads and writes


def sectors(num_bytes: int) -> int:
    """Bytes that are moved for so many in one place."""
    return math.ceil(num_bytes / SECTOR) * SECTOR


def sort(num_touches: int, num_rows: int) -> tuple[int, int]:
    """Bytes and launches of listing and sorting touches."""
    passes = math.ceil((num_rows.bit_length() + 1) / 8)
    listed = 4 + 2 * touch_bytes(num_rows)  # the id; both arrays are filled, then written
    look = touch_bytes(num_rows) - 4  # the histogram's, at the slots
    return num_touches * (listed + look + passes * 2 * touch_bytes(num_rows)), 3 + 2 + passes


def touch_bytes(num_units: int) -> int:
    """Of a touch's slot and number."""
    return (4 if num_units < 1 << 31 else 8) + 4


def lookups(
    num_ids: int, num_units: int, dim: int, *, probes: int = 1, chunks: int = 1
) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and launches of each call on a slab of num_units units of dim / chunks numbers, fp32, one id per bag.

    An id touches probes * chunks units. What a product of probes reads of the others in an update is not counted."""
    touches, row = num_ids * probes * chunks, sectors(dim // chunks * FLOAT)
    yield "forward", num_ids * (4 + sectors(dim * FLOAT)) + touches * row, 1
    (listed, launches), touch = sort(touches, num_units), touch_bytes(num_units)
    yield "gradient of touched rows", listed + touches * (touch + 2 * row + 8 + 24), launches + 5
    for name, states in STATES.items():
        state = 2 * row * states + 2 * SECTOR * (name == "rowwise_adagrad")
        yield f"fused {name}", listed + touches * (touch + row + 2 * row + state), launches + 2


def kernels(rows: list[int], dim: int, batch_size: int) -> Iterator[tuple[str, int, int]]:
    """The same on dense tables, and of the interaction with their vectors."""
    yield from lookups(len(rows) * batch_size, sum(rows), dim)
    pairs = (len(rows) + 1) * len(rows) // 2
    vectors = (len(rows) + 1) * sectors(dim * FLOAT)
    out = sectors((dim + pairs) * FLOAT)
    yield "interaction", batch_size * (vectors + out), 1
    yield "interaction, backward", batch_size * (2 * vectors + out), 1


def table() -> str:
    """For Criteo Kaggle's 26 tables at a tenth of their rows."""
    rows = TABLES["kaggle/10"]
    lines: dict[str, dict] = {}
    for dim in (16, 64, 128):
        for batch_size in (2048, 65536):
            for name, num_bytes, launches in kernels(rows, dim, batch_size):
                microseconds = max(num_bytes / COPY, launches * LAUNCH) * 1e6
                line = lines.setdefault(name, {"kernel": name, "launches": launches})
                line[f"{dim} x {batch_size}: MB"] = f"{num_bytes / 1e6:,.1f}"
                line[f"{dim} x {batch_size}: us"] = f"{microseconds:,.0f}"
    return markdown_table(list(lines.values()))


if __name__ == "__main__":
    print(table())
