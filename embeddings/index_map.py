"""Which weights an id reads: twins of csrc/index_map.h in torch int64, whose arithmetic wraps as unsigned does."""

from torch import Tensor

from embeddings.kinds import IndexMap

# columns of a slab's tables [F * K, 9]: Table in csrc/index_map.h
COLUMNS = ("position", "column", "dim", "width", "begin", "num_slots", "num_embeddings", "divisor", "seed")
NUM_COLUMNS = len(COLUMNS)
POSITION, COLUMN, DIM, WIDTH, BEGIN, NUM_SLOTS, NUM_EMBEDDINGS, DIVISOR, SEED = range(NUM_COLUMNS)

PARTITION, MIXED, SIGNED, AFFINE, MURMUR3 = IndexMap
RANGED = (PARTITION,)  # ids have an upper limit
ONE_CHUNK = (PARTITION, MURMUR3)  # a slot holds the whole vector


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the unsigned number (torch's shift copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(seed: Tensor, i: Tensor) -> Tensor:
    """Number i of the SplitMix64 stream that starts at seed (Steele, Lea, Flood, OOPSLA 2014), as int64 bits."""
    z = seed + (i + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def reduce_range(hashes: Tensor, n: Tensor) -> Tensor:
    """High 64 bits of the unsigned product hash * n: uniform in [0, n) (Lemire, ACM TOMACS 2019). n < 2^63."""
    low = (1 << 32) - 1
    a, b = _shift_right(hashes, 32), hashes & low
    c, d = n >> 32, n & low
    middle = _shift_right(b * d, 32) + ((a * d) & low) + ((b * c) & low)
    return a * c + _shift_right(a * d, 32) + _shift_right(b * c, 32) + _shift_right(middle, 32)


def affine(ids: Tensor, columns: Tensor) -> Tensor:
    """The hash of HashedEmbeddingBag and dlrm_ssm, in [0, 117130198221199): linear, so whole rows collide."""
    h = ids * 9824516537 + columns * 57857966300227 + 104729
    p = 117130198221199
    return (_shift_right(h, 1) % p * 2 + (h & 1)) % p  # the remainder of the unsigned number


def murmur3(ids: Tensor, seeds: Tensor) -> Tensor:
    """MurmurHash3_x86_32 (Appleby, 2011) of an id's 4 little-endian bytes, or of all 8 if it needs them; unsigned."""
    mask = (1 << 32) - 1

    def rotate(x: Tensor, bits: int) -> Tensor:
        return ((x << bits) | (x >> (32 - bits))) & mask

    def mix(h: Tensor, block: Tensor) -> Tensor:
        block = rotate((block & mask) * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        return (rotate(h ^ block, 13) * 5 + 0xE6546B64) & mask

    is_long = (ids < -(1 << 31)) | (ids >= 1 << 31)
    h = mix(seeds & mask, ids)
    h = mix(h, ids >> 32).where(is_long, h) ^ (4 + 4 * is_long.long())
    h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
    return h ^ (h >> 16)


def read(index_map: int, ids: Tensor, tables: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor | None]:
    """The slots that ids [M] read by the probes tables [M, 9], relative to their slices, [M, C] for chunks [C], and
    their signs [M, C] (None: all positive)."""
    num_slots = tables[:, NUM_SLOTS]
    if index_map == PARTITION:
        return (ids // tables[:, DIVISOR] % num_slots)[:, None].expand(-1, chunks.numel()), None
    if index_map == MURMUR3:
        h = murmur3(ids, tables[:, SEED])
        h = h - (h >> 31 << 32)  # as int32
        return (h % num_slots)[:, None].expand(-1, chunks.numel()), None  # torch's % is a floored one
    if index_map == AFFINE:
        return affine(ids[:, None], chunks) % num_slots[:, None], None
    hashes = splitmix64(splitmix64(tables[:, SEED], ids)[:, None], chunks)
    signs = 1 - 2 * (hashes & 1) if index_map == SIGNED else None
    return reduce_range(hashes, num_slots[:, None]), signs
