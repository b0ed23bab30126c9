"""A dataset whose samples are kept on a device, so that no batch of them is made or moved by the host."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch

PIECE = 1 << 16  # samples that are loaded at once
ORDER_BYTES = 8  # a sample's place in an epoch: of the training samples, and meanwhile of those evaluated


class Resident:
    """A prepared dataset with its samples in a device's memory.

    Batches are the dataset's own, sample for sample. Raises ValueError if they do not fit, or if samples have bags of
    ids, which are of many lengths.
    """

    def __init__(self, dataset, device: torch.device | str):
        self._dataset, self._device = dataset, torch.device(device)
        count = sum(dataset.num_samples.values())
        sample = dataset.take("train", np.arange(1))
        if sample.offsets is not None:
            raise ValueError("data_on_device=true: keeps samples with one id per feature, and this data's have bags")
        sizes = [field.numel() * field.element_size() for field in sample if field is not None]
        needed = count * (sum(sizes) + ORDER_BYTES)
        if self._device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(self._device)[0]):
            raise ValueError(
                f"data_on_device=true: the samples and their order take {needed:,} bytes, {device} has {free:,}"
            )
        print(f"data: {count:,} samples are kept on {device}, with their order: {needed / 2**20:,.1f} MiB", flush=True)
        self._kept = {split: self._load(split, sample) for split, count in dataset.num_samples.items() if count}

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)

    def batches(self, split: str, batch_size: int, *, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The dataset's, on the device."""
        picks = self._dataset.picks(split, batch_size, epoch=epoch, start=start)
        order = [torch.from_numpy(pick.astype(np.int64, copy=False)) for pick in picks]
        if not order:
            return
        dense, ids, labels = self._kept[split]
        for rows in torch.cat(order).to(self._device).split(batch_size):
            yield Batch(dense[rows], ids[rows].T.reshape(-1), None, labels[rows])

    def _load(self, split: str, sample: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of all samples of a split: dense [N, num_dense], ids [N, F], labels [N]. sample: one, for shapes."""
        count = self._dataset.num_samples[split]
        dense = torch.empty(count, sample.dense.shape[1], device=self._device)
        ids = torch.empty(count, len(sample.ids), dtype=sample.ids.dtype, device=self._device)
        labels = torch.empty(count, device=self._device)
        for first in range(0, count, PIECE):
            index = np.arange(first, min(first + PIECE, count))
            piece, rows = self._dataset.take(split, index, self._device), slice(first, first + len(index))
            dense[rows], labels[rows] = piece.dense, piece.labels
            ids[rows] = piece.ids.view(-1, len(index)).T
        return dense, ids, labels
