"""Collision traffic: how much of what a batch's lookups read is read by other ids too."""

from collections.abc import Iterable

import torch
from torch import Tensor

from embeddings import reference
from embeddings.slab import Slab


@torch.no_grad()
def collision_traffic(slabs: Iterable[Slab], names: list[str], ids: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Of each lookup the share of the numbers it reads that another id of the batch reads too, 0 to 1.

    One tensor [lookups] per feature, in the order of names, which is the batch's; ids, offsets: as EmbeddingBags takes
    them. In a shared pool the other id may be another feature's. Computed on the CPU, in memory of the size of what is
    read. Raises RuntimeError for an id out of range.
    """
    ids = ids.cpu()
    if offsets is None:
        bags = ids.view(len(names), -1)
    else:
        bounds = offsets.cpu()[:: (len(offsets) - 1) // len(names)].tolist()
        bags = [ids[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    distinct, lookups = zip(*(bag.unique(return_inverse=True) for bag in bags), strict=True)
    sizes = [len(of_feature) for of_feature in distinct]
    shares = torch.zeros(sum(sizes), dtype=torch.float32, device="cpu")
    for slab in slabs:
        with torch.device("cpu"):  # whatever torch's default is
            _add_shares(shares, slab, torch.cat(distinct), torch.tensor([0, *sizes]).cumsum(0))
    return [share[of_feature] for share, of_feature in zip(shares.split(sizes), lookups, strict=True)]


def _add_shares(shares: Tensor, slab: Slab, ids: Tensor, offsets: Tensor) -> None:
    """Adds, at the ids that this slab serves, their shares. ids: [N], a bag of distinct ones for each feature."""
    layout = reference.Layout(*slab.layout[1:])
    batch = (ids, offsets, slab.tables.cpu(), 1, layout, slab.arrangement.features)
    for_each = [
        (probe.units, group.where[:, None].expand_as(probe.units))
        for group in reference.unroll(slab.weight, *batch)
        for probe in group.probes
    ]
    units, readers = (torch.cat([part.flatten() for part in parts]) for parts in zip(*for_each, strict=True))  # [reads]
    distinct, which = units.unique(return_inverse=True)
    first, last = (
        torch.empty_like(distinct).scatter_reduce(0, which, readers, how, include_self=False)
        for how in ("amin", "amax")
    )
    is_shared = (first != last)[which].float()  # a unit that one id reads twice has one reader
    shares.scatter_reduce_(0, readers, is_shared, "mean", include_self=False)
