"""load_dense: uncompressed tables from the checkpoints of torch.nn, TorchRec and facebookresearch/dlrm."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from embeddings.dense import Dense

# keys of a table's rows
KEYS = (
    r"(.+\.)?embedding_bags\.(?P<table>[^.]+)\.weight",  # TorchRec's EmbeddingBagCollection
    r"(.+\.)?embeddings\.(?P<table>[^.]+)\.weight",  # TorchRec's EmbeddingCollection
    r"(.+\.)?emb_l\.(?P<number>\d+)\.weight",  # facebookresearch/dlrm: the features' tables, in order
    r"weight",  # torch.nn.EmbeddingBag and Embedding: the only table
)


def load_dense(module: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Copy rows of uncompressed tables into a module's tables of the same names, and return those.

    module: EmbeddingBags, an EmbeddingBagCollection or EmbeddingCollection, a drop-in module with a row per id, or a
    model that holds one of them. state_dict: a torch.nn.EmbeddingBag's or Embedding's own; or one of TorchRec's
    collections, of facebookresearch/dlrm (its files have it under "state_dict") or of a model that holds them, where
    other keys are ignored.
    The module's compressed tables keep their weights. Raises ValueError, and changes nothing, if the state_dict has
    no table, or two of one name, or one that the module has not, or keeps compressed, or in another shape; or lacks one
    of the module's; or if the module is on the meta device.
    """
    holders = [part for part in module.modules() if hasattr(part, "table_weights")]
    if len(holders) != 1:
        raise ValueError(f"{type(module).__name__} holds {len(holders)} modules of tables: pass the one to be loaded")
    backends, weights = holders[0].table_backends(), holders[0].table_weights()
    if any(part.is_meta for parts in weights.values() for part in parts):
        raise ValueError(f"{type(module).__name__} is on the meta device: first to_empty and reset_parameters")
    found = _tables(state_dict, list(weights))
    for table, rows in found.items():
        if table not in weights:
            raise ValueError(f"the state_dict has table {table!r}; the module's are {_some(weights)}")
        if not isinstance(backends[table], Dense):
            raise ValueError(f"table {table!r} is {backends[table].name} here: only dense and fast keep a row per id")
        if rows.shape != weights[table][0].shape:
            wanted = list(weights[table][0].shape)
            raise ValueError(f"table {table!r} is {list(rows.shape)} in the state_dict, and {wanted} here")
    missing = [table for table in weights if isinstance(backends[table], Dense) and table not in found]
    if missing:
        raise ValueError(f"the state_dict has no table {missing[0]!r}; its tables are {_some(found)}")
    with torch.no_grad():
        for table, rows in found.items():
            weights[table][0].copy_(rows)
    return list(found)


def _tables(state_dict: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Table -> its rows. The first pattern that fits any key is the state_dict's."""
    patterns = KEYS if len(state_dict) == 1 else KEYS[:-1]  # a weight with a bias is no table
    for pattern in patterns:
        matches = {key: re.fullmatch(pattern, key) for key in state_dict}
        if any(matches.values()):
            break
    else:
        raise ValueError(f"the state_dict has no tables: its keys are {_some(state_dict)}")
    found = {}
    for key, match in matches.items():
        if match:
            parts = match.groupdict()
            number = int(parts.get("number") or 0)
            numbered = names[number] if number < len(names) else f"number {number}"
            table = parts.get("table") or numbered
            if table in found:
                raise ValueError(f"the state_dict has two tables {table!r}, the second as {key!r}")
            found[table] = state_dict[key]
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "") or "none"
