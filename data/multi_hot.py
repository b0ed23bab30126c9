"""One id per feature made several, as in MLPerf's DLRM-DCNv2, whose public data has one."""

from collections.abc import Sequence

import numpy as np
import torch

from data.arrays import GAMMA, mix64, shifted
from data.batch import Batch
from data.teacher import stream_keys

CHUNK = 1024  # samples drawn for at once: the scratch stays in cache, four times as fast at 100 ids


def multi_hot(batch: Batch, sizes: Sequence[int], rows: Sequence[int]) -> Batch:
    """The same batch with bags of sizes[f] ids: the feature's own, then ids that are a hash of (f, own id, k), uniform
    in range(rows[f]): the same id always draws the same ones. batch: with one id per feature.

    TorchRec's example draws them so (facebookresearch/dlrm, torchrec_dlrm/multi_hot.py, "uniform"), with other numbers.
    """
    num_samples = len(batch.labels)
    bags = [bags_of(own, f, sizes[f], rows[f]) for f, own in enumerate(batch.ids.view(len(sizes), num_samples).numpy())]
    lengths = np.repeat(np.asarray(sizes, np.int64), num_samples)  # feature-major [F * B]
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    return batch._replace(ids=torch.from_numpy(np.concatenate(bags)), offsets=offsets)


def bags_of(own: np.ndarray, feature: int, size: int, rows: int) -> np.ndarray:
    """Ids [B * size] of a feature: each of own [B], then its size - 1 draws. rows: fewer than 2^31."""
    bags = np.empty((len(own), size), own.dtype)
    bags[:, 0] = own
    keys = stream_keys(size - 1, "multi_hot", feature)  # [size - 1]
    for start in range(0, len(own) if size > 1 else 0, CHUNK):
        chunk = slice(start, start + CHUNK)
        bits = mix64(own[chunk].astype(np.int64)[:, None] * GAMMA + keys)
        bags[chunk, 1:] = (shifted(bits, 32) * rows) >> 32  # Lemire's range reduction of the upper half
    return bags.reshape(-1)
