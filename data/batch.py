"""The one type that leaves this package: a batch, as a plain tuple of tensors."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """B samples. Ids are feature-major: all ids of feature 0 for the whole batch, then those of feature 1, ...

    dense [B, num_dense] float32 (num_dense may be 0); ids [N] int32 or int64; labels [B] float32, 0 or 1.
    offsets [F*B+1] int64 begins with 0 (bag f*B+b is ids[offsets[f*B+b] : offsets[f*B+b+1]], as torchrec's
    KeyedJaggedTensor); None when every feature has exactly one id per sample, and then N = F*B."""

    dense: Tensor
    ids: Tensor
    offsets: Tensor | None
    labels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return self._make(field if field is None else field.to(device) for field in self)
