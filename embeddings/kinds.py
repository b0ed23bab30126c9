"""The numbers of the operators' schema, by name: csrc/index_map.h and csrc/bag.h have the same."""

from enum import IntEnum


class IndexMap(IntEnum):
    """Which weights an id reads: csrc/index_map.h."""

    PARTITION = 0  # (id // divisor) % slots: dense tables, quotients, remainders
    MIXED = 1  # SplitMix64, any 64-bit id
    SIGNED = 2  # the same, half of the chunks negated
    AFFINE = 3  # HashedEmbeddingBag's
    MURMUR3 = 4  # Spotlight's


class Combine(IntEnum):
    """How the vectors of an id's probes become one."""

    ADD = 0
    MULTIPLY = 1
    CONCAT = 2  # each probe in its own columns
    WEIGHTED = 3  # the sum of all but the last, each times its number of the last probe's vector


class Pooling(IntEnum):
    """How the vectors of a bag become one."""

    SUM = 0
    MEAN = 1
    MAX = 2


class Accumulate(IntEnum):
    """How a slab's gradient is made: dense and repeatable, dense by atomics, or touched units only (repeatable)."""

    SORTED = 0
    ATOMIC = 1
    ROWS = 2
