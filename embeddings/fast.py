"""fast: a dense table whose gradient is summed by atomics: quick where few ids fill a batch, in no fixed order."""

from dataclasses import dataclass

from embeddings.dense import Dense


@dataclass(frozen=True, kw_only=True)
class Fast(Dense):
    """As `Dense`, with accumulate=atomic in its yaml: no sorting of ids. FastEmbedding (RTB House, 2018).

    On a CPU the sorted sum serves instead, and repeats. Tables of any sizes and dims are one flat buffer and one
    launch, without padding. init=upstream: N(0, 1).
    """

    accumulate: str = "atomic"
