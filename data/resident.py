"""A dataset whose training samples are kept on a device, so that no batch of them is made or moved by the host."""

from collections.abc import Iterator

import numpy as np
import torch

from data.batch import Batch

PIECE = 1 << 16  # samples that are loaded at once


class Resident:
    """A prepared dataset with its training samples in a device's memory; other splits, and all else, are as they are.

    Batches of training are the dataset's own, sample for sample. Raises ValueError if they do not fit, or if samples
    have bags of ids, which are of many lengths.
    """

    def __init__(self, dataset, device: torch.device | str):
        self._dataset, device = dataset, torch.device(device)
        count = dataset.num_samples["train"]
        sample = dataset.take("train", np.arange(1))
        if sample.offsets is not None:
            raise ValueError("data_on_device=true: keeps samples with one id per feature, and this data's have bags")
        needed = count * sum(field.numel() * field.element_size() for field in sample if field is not None)
        if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
            raise ValueError(f"data_on_device=true: the training samples take {needed:,} bytes, {device} has {free:,}")
        print(f"data: {count:,} training samples are kept on {device}: {needed / 2**20:,.1f} MiB", flush=True)
        self._dense = torch.empty(count, sample.dense.shape[1], device=device)
        self._ids = torch.empty(count, len(sample.ids), dtype=sample.ids.dtype, device=device)
        self._labels = torch.empty(count, device=device)
        for first in range(0, count, PIECE):
            index = np.arange(first, min(first + PIECE, count))
            piece, rows = dataset.take("train", index), slice(first, first + len(index))
            self._dense[rows], self._labels[rows] = piece.dense, piece.labels
            self._ids[rows] = piece.ids.view(-1, len(index)).T

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)

    def batches(self, split: str, batch_size: int, *, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The dataset's; those of training are on the device."""
        if split != "train":
            yield from self._dataset.batches(split, batch_size, epoch=epoch, start=start)
            return
        picks = self._dataset.picks(split, batch_size, epoch=epoch, start=start)
        order = [torch.from_numpy(pick.astype(np.int64, copy=False)) for pick in picks]
        if not order:
            return
        for rows in torch.cat(order).to(self._labels.device).split(batch_size):
            ids = self._ids[rows].T.reshape(-1)
            yield Batch(self._dense[rows], ids, None, self._labels[rows])
