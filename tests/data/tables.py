"""What the data tests share: the options of a table, and batches as nested lists."""

import torch

TABLE = {
    "file": None,
    "files": None,
    "delimiter": None,
    "quote": None,
    "header": True,
    "columns": None,
    "joins": [],
    "label": "y",
    "label_threshold": None,
    "dense": {"d": "none"},
    "categorical": ["c"],
    "buckets": [],
    "multi_valued": {},
    "time": None,
    "split": {"train": 0.5, "valid": 0, "test": 0.5},
    "order": "file",
    "split_seed": 0,
    "last": "test",
    "vocabulary": "train",
    "min_count": 1,
    "id_order": "appearance",
    "max_rows": None,
    "on_error": "stop",
    "memory_limit": "500MB",
    "shuffle": True,
    "shuffle_block": 1 << 20,
    "shuffle_seed": 0,
}


def bags_of(batch):
    """ids of a batch as nested lists [B][F] of bags."""
    size = len(batch.labels)
    if batch.offsets is None:
        return [[[i] for i in row] for row in batch.ids.view(-1, size).T.tolist()]
    ends = batch.offsets.tolist()
    bags = [batch.ids[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]
    return [bags[i::size] for i in range(size)]


def samples_of(dataset, split, batch_size=7):
    """All samples of a split, in the order of its batches: (dense list, bags, label)."""
    samples = []
    for batch in dataset.batches(split, batch_size):
        samples += zip(batch.dense.tolist(), bags_of(batch), batch.labels.tolist(), strict=True)
        assert batch.dense.dtype == batch.labels.dtype == torch.float32 and batch.ids.dtype == torch.int32
    return samples
