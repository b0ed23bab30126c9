"""What a page of Triton makes of a lookup, and of SGD fused into its gradient: a peer of benchmarks.lookup on CUDA.

A program takes BLOCK bags of one id count; the update is by atomics, so its sums have no fixed order. Needs triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from benchmarks.shapes import Bags

BLOCK = 32


@triton.jit
def _forward(weights, firsts, ids, out, bag, batch_size, num_features, DIM: tl.constexpr, BLOCK: tl.constexpr):
    bags = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # feature * B + sample
    is_there = bags < num_features * batch_size
    feature, sample = bags // batch_size, bags % batch_size
    first = tl.load(firsts + feature, mask=is_there)  # of the feature's rows
    columns = tl.arange(0, DIM)
    total = tl.zeros((BLOCK, DIM), tl.float32)
    for j in range(bag):
        row = first + tl.load(ids + bags * bag + j, mask=is_there)
        total += tl.load(weights + row[:, None] * DIM + columns[None, :], mask=is_there[:, None])
    to = (sample * num_features + feature) * DIM
    tl.store(out + to[:, None] + columns[None, :], total, mask=is_there[:, None])


@triton.jit
def _sgd(weights, firsts, ids, grad, rate, bag, batch_size, num_features, DIM: tl.constexpr, BLOCK: tl.constexpr):
    bags = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = bags < num_features * batch_size
    feature, sample = bags // batch_size, bags % batch_size
    first = tl.load(firsts + feature, mask=is_there)
    columns = tl.arange(0, DIM)
    at = (sample * num_features + feature) * DIM
    change = -rate * tl.load(grad + at[:, None] + columns[None, :], mask=is_there[:, None])
    for j in range(bag):
        row = first + tl.load(ids + bags * bag + j, mask=is_there)
        tl.atomic_add(weights + row[:, None] * DIM + columns[None, :], change, mask=is_there[:, None])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, module, batch):
        ctx.module, ctx.batch = module, batch
        return module.launch(_forward, batch, weights.new_empty(module.shape_of(batch)))

    @staticmethod
    def backward(ctx, grad):
        ctx.module.launch(_sgd, ctx.batch, grad.contiguous(), ctx.module.rate)
        return None, None, None


class TritonBags(nn.Module):
    """Tables of `rows` ids each. weights: [sum(rows) * dim] on a GPU. backward steps by SGD with this rate."""

    def __init__(self, weights: Tensor, rows: list[int], dim: int, rate: float) -> None:
        super().__init__()
        self.weights, self.num_features, self.dim, self.rate = nn.Parameter(weights), len(rows), dim, rate
        firsts = torch.tensor([0, *rows[:-1]], device=weights.device).cumsum(0)
        self.register_buffer("firsts", firsts)

    def shape_of(self, batch: Bags) -> tuple[int, int, int]:
        return batch.ids.numel() // batch.bag // self.num_features, self.num_features, self.dim

    def launch(self, kernel, batch: Bags, tensor: Tensor, *numbers: float) -> Tensor:
        """Run a kernel on a batch and a tensor [B, F, D], which it returns."""
        batch_size, num_features, dim = self.shape_of(batch)
        arguments = (self.weights, self.firsts, batch.ids, tensor, *numbers, batch.bag, batch_size, num_features)
        kernel[(triton.cdiv(batch_size * num_features, BLOCK),)](*arguments, DIM=dim, BLOCK=BLOCK)
        return tensor

    def forward(self, batch: Bags) -> Tensor:
        """Sums [B, F, D] of bags."""
        return _Lookup.apply(self.weights, self, batch)
