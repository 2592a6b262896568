"""What does vmap cost an op that has work to do, next to the op batched by hand?

Each row is one op on 64 examples of a typical size, three times: batched by hand, as somebody would
write it who knows the op and where its batch dim goes; under `lamina.vmap`; and under the vmap of
`torch.func`. What a call of vmap costs however small the op is, is measured once and stands below
each table; in "vmap / hand" it is taken off, so that 1.00 is all that a batching rule can reach, as
far as one op comes in and one goes out. Where the op is smaller than that, the row says so.

    python benchmarks/vmap_ops.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import harness
import lamina

BATCH = 64
LIBRARIES: dict[str, Any] = {"lamina": lamina, "torch.func": torch.func}


class Op(NamedTuple):
    """An op of one example; the op by hand takes all examples at once.

    Attributes:
        name: what the row is called.
        one: the op of one example.
        hand: the same of all, with the batch dim of the result in front.
        args: all arguments.
        in_dims: as `vmap` takes them.
    """

    name: str
    one: Callable[..., Any]
    hand: Callable[..., Any]
    args: tuple[Tensor, ...]
    in_dims: tuple[int | None, ...]


def randn(*shape: int) -> Tensor:
    """Random numbers."""
    return torch.randn(shape)


def same(name: str, op: Callable[..., Any], *args: Tensor) -> Op:
    """An op that reads all dims from the end, so that by hand it is the op itself."""
    return Op(name, op, op, args, (0,) * len(args))


def by_dim(name: str, op: Callable[..., Any], *args: Tensor) -> Op:
    """An op of `dim`, dim 0 of an example: by hand the next one."""
    return Op(name, partial(op, dim=0), partial(op, dim=1), args, (0,) * len(args))


def images(name: str, op: Callable[..., Any], x: Tensor) -> Op:
    """An op on [N, C, H, W] of an example [1, C, H, W]: by hand the batch is N."""
    return Op(name, op, lambda x: op(x.flatten(0, 1)).unsqueeze(1), (x,), (0,))


def pointwise(b: int) -> list[Op]:
    """Elementwise ops."""
    x, y, row = randn(b, 64, 256), randn(b, 64, 256), randn(256)
    return [
        same("tanh", torch.tanh, x),
        same("add", torch.add, x, y),
        Op("mul by a shared row", torch.mul, torch.mul, (x, row), (0, None)),
        Op("mul by a row of each", torch.mul, lambda x, y: x * y[:, None], (x, y[:, 0]), (0, 0)),
        Op(
            "mul, in_dims (0, 2)",
            torch.mul,
            lambda x, y: x * y.movedim(2, 0),
            (x, y.movedim(0, 2).contiguous()),
            (0, 2),
        ),
        same("where", torch.where, x > 0, x, y),
        same("gelu", F.gelu, x),
        same("clamp", partial(torch.clamp, min=-1, max=1), x),
        same("x.add_ on a copy", lambda x: x.clone().add_(1), x),
    ]


def reductions(b: int) -> list[Op]:
    """Ops with fewer dims in the result, and those along one dim."""
    x = randn(b, 64, 256)
    return [
        Op("sum of all", torch.sum, lambda x: x.sum((1, 2)), (x,), (0,)),
        by_dim("sum of rows", torch.sum, x),
        Op("sum, in_dims=1", partial(torch.sum, dim=0), partial(torch.sum, dim=0), (x,), (1,)),
        by_dim("amax", torch.amax, x),
        by_dim("argmax", torch.argmax, x),
        Op("max of all", torch.max, lambda x: x.amax((1, 2)), (x,), (0,)),
        by_dim("var", torch.var, x),
        by_dim("logsumexp", torch.logsumexp, x),
        Op("norm", torch.linalg.vector_norm, lambda x: x.flatten(1).norm(dim=1), (x,), (0,)),
        by_dim("cumsum", torch.cumsum, x),
        by_dim("softmax, dim 0", torch.softmax, x),
        same("log_softmax, dim -1", partial(torch.log_softmax, dim=-1), x),
    ]


def products(b: int) -> list[Op]:
    """The matrix products."""
    x, y, v = randn(b, 64, 128), randn(b, 128, 64), randn(b, 128)
    shared, weight, bias = randn(128, 64), randn(64, 128), randn(64)
    return [
        same("matmul", torch.matmul, x, y),
        Op("matmul, left shared", torch.matmul, torch.matmul, (shared.T, y), (None, 0)),
        Op("matmul, right shared", torch.matmul, torch.matmul, (x, shared), (0, None)),
        Op(
            "matmul, in_dims (1, 1)",
            torch.matmul,
            lambda x, y: torch.einsum("nbk,kbm->bnm", x, y),
            (x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()),
            (1, 1),
        ),
        Op("matrix @ vector", torch.mv, lambda x, v: (x @ v[..., None])[..., 0], (x, v), (0, 0)),
        Op("dot", torch.dot, lambda v, w: (v * w).sum(1), (v, v.flip(0)), (0, 0)),
        Op("outer", torch.outer, lambda v, w: v[:, :, None] * w[:, None], (v, v.flip(0)), (0, 0)),
        Op("linear", F.linear, F.linear, (x, weight, bias), (0, None, None)),
        Op("linear of a vector", F.linear, F.linear, (v, weight, bias), (0, None, None)),
        Op(
            "linear, in_dims=1",
            F.linear,
            lambda x, w, b: F.linear(x, w, b).transpose(0, 1),
            (x.transpose(0, 1).contiguous(), weight, bias),
            (1, None, None),
        ),
        Op(
            "linear, weights of examples",
            F.linear,
            lambda x, w, b: torch.baddbmm(b[:, None], x, w.mT),
            (x, randn(b, 64, 128), randn(b, 64)),
            (0, 0, 0),
        ),
        Op(
            "einsum",
            partial(torch.einsum, "nk,km->nm"),
            partial(torch.einsum, "bnk,bkm->bnm"),
            (x, y),
            (0, 0),
        ),
    ]


def layers(b: int) -> list[Op]:
    """Convolutions, pooling, normalisation, attention, recurrent layers, losses."""
    x, rows = randn(b, 1, 16, 24, 24), randn(b, 64, 256)
    kernel, bias = randn(16, 16, 3, 3) / 10, randn(16)
    scale, shift = randn(256), randn(256)
    q, k, v = (randn(b, 4, 64, 32) for _ in range(3))
    mean, var = torch.zeros(16), torch.ones(16)
    logits, target = randn(b, 64, 100), torch.randint(100, (b, 64))
    lstm = torch.nn.LSTM(32, 32, batch_first=True).requires_grad_(False)
    sequence = randn(b, 20, 32)

    def conv(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, kernel, bias, padding=1)

    def conv_by_hand(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        return conv(x[:, 0], kernel, bias)[:, None]

    def conv_of_members(x: Tensor, kernel: Tensor) -> Tensor:
        out = F.conv2d(x.transpose(0, 1).flatten(1, 2), kernel.flatten(0, 1), groups=b, padding=1)
        return out.unflatten(1, (b, -1)).transpose(0, 1)

    def conv_of_one(x: Tensor, kernel: Tensor) -> Tensor:
        return conv(x, kernel.flatten(0, 1)).unflatten(1, (b, -1)).transpose(0, 1)

    def attention_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def entropy_by_hand(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none").view(b, -1).mean(1)

    def one_sequence(x: Tensor) -> Tensor:
        return lstm(x[None])[0][0]

    def batch_norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var)

    def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (256,), scale, shift)

    members = randn(b, 8, 16, 3, 3) / 10
    return [
        Op("conv2d", conv, conv_by_hand, (x, kernel, bias), (0, None, None)),
        Op("conv2d, kernels of examples", conv, conv_of_members, (x, members), (0, 0)),
        Op("conv2d, one image", conv, conv_of_one, (x[0], members), (None, 0)),
        images("max_pool2d", partial(F.max_pool2d, kernel_size=2), x),
        images("avg_pool2d", partial(F.avg_pool2d, kernel_size=2), x),
        images("adaptive_avg_pool2d", partial(F.adaptive_avg_pool2d, output_size=1), x),
        images("interpolate, bilinear", partial(F.interpolate, scale_factor=2, mode="bilinear"), x),
        images("pad, reflected", partial(F.pad, pad=(1, 1, 1, 1), mode="reflect"), x),
        same("pad", partial(F.pad, pad=(1, 1, 1, 1)), x),
        Op("layer_norm", layer_norm, layer_norm, (rows, scale, shift), (0, None, None)),
        images("group_norm", partial(F.group_norm, num_groups=4), x),
        images("batch_norm, not training", batch_norm, x),
        Op("attention", attention_by_hand, attention_by_hand, (q, k, v), (0, 0, 0)),
        Op("cross_entropy", F.cross_entropy, entropy_by_hand, (logits, target), (0, 0)),
        Op(
            "mse_loss",
            F.mse_loss,
            lambda x, y: (x - y).square().mean((1, 2)),
            (rows, rows.flip(0)),
            (0, 0),
        ),
        Op("lstm", one_sequence, lambda x: lstm(x)[0], (sequence,), (0,)),
    ]


def indices(b: int) -> list[Op]:
    """Ops that read, write and order by position."""
    x, value = randn(b, 256, 64), randn(b, 32, 64)
    at, table = torch.randint(256, (b, 32)), randn(256, 64)
    wide = at[..., None].expand(b, 32, 64).contiguous()
    number = torch.arange(b)[:, None]

    def put(x: Tensor, at: Tensor, value: Tensor) -> Tensor:
        return x.index_put((at,), value, accumulate=True)

    def put_by_hand(x: Tensor, at: Tensor, value: Tensor) -> Tensor:
        return x.index_put((number, at), value, accumulate=True)

    return [
        Op("embedding", F.embedding, F.embedding, (at, table), (0, None)),
        Op("x[i]", lambda x, i: x[i], lambda x, i: x[number, i], (x, at), (0, 0)),
        Op("table[i]", lambda x, i: x[i], lambda x, i: x[i], (table, at), (None, 0)),
        by_dim("gather", lambda x, i, dim: x.gather(dim, i), x, wide),
        by_dim("scatter_add", lambda x, i, v, dim: x.scatter_add(dim, i, v), x, wide, value),
        Op(
            "index_select",
            lambda x, i: x.index_select(0, i),
            lambda x, i: x[number, i],
            (x, at),
            (0, 0),
        ),
        Op("index_put, adding", put, put_by_hand, (x, at, value), (0, 0, 0)),
        by_dim("sort", torch.sort, x),
        Op(
            "topk",
            lambda x: x.topk(8, -1).values,
            lambda x: x.topk(8, -1).values,
            (x,),
            (0,),
        ),
        by_dim("flip", lambda x, dim: x.flip(dim), x),
        by_dim("roll", lambda x, dim: x.roll(3, dim), x),
    ]


def shapes(b: int) -> list[Op]:
    """Views, and what copies: the views end in one that is read."""
    x, y = randn(b, 64, 256), randn(b, 64, 256)
    return [
        by_dim("cat", lambda x, y, dim: torch.cat([x, y], dim), x, y),
        by_dim("stack", lambda x, y, dim: torch.stack([x, y], dim), x, y),
        same("transposed copy", lambda x: x.mT.contiguous(), x),
        same("tril", torch.tril, x),
        Op(
            "split and multiply",
            lambda x: x.chunk(2)[0] * x.chunk(2)[1],
            lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
            (x,),
            (0,),
        ),
        Op("repeat", lambda x: x.repeat(2, 1), lambda x: x.repeat(1, 2, 1), (x,), (0,)),
    ]


def algebra(b: int) -> list[Op]:
    """Linear algebra and Fourier transforms."""
    x, y, signal = randn(b, 32, 32) + 10 * torch.eye(32), randn(b, 32, 4), randn(b, 16, 256)
    positive = x @ x.mT
    return [
        same("solve", torch.linalg.solve, x, y),
        same("inv", torch.linalg.inv, x),
        same("cholesky", torch.linalg.cholesky, positive),
        same("eigvalsh", torch.linalg.eigvalsh, positive),
        same("det", torch.linalg.det, x / 10),
        same("cdist", torch.cdist, randn(b, 64, 32), randn(b, 48, 32)),
        same("rfft", torch.fft.rfft, signal),
        Op("fft2", torch.fft.fft2, torch.fft.fft2, (signal,), (0,)),
    ]


FAMILIES = [pointwise, reductions, products, layers, indices, shapes, algebra]


def loops(mapped: Callable[..., Any], args: tuple[Tensor, ...]) -> bool:
    """Whether `torch.func` warns that it runs one example after the other."""
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(RuntimeError):
        warnings.simplefilter("always")
        mapped(*args)  # an op that it refuses is noted by the race
    return any("performance drop" in str(warning.message) for warning in caught)


def fixed_costs(count: int) -> dict[str, float]:
    """Seconds of a call of vmap beyond the op's own, on a tensor too small to matter.

    Every call comes behind an op on large tensors, as in the tables, and alone is timed. Such an op
    leaves little of the interpreter in the cache: in a tight loop the cost is a third of this.
    """
    large, x = randn(BATCH, 64, 256), randn(2, 1)
    contenders = {"by hand": torch.tanh}
    contenders |= {name: lib.vmap(torch.tanh) for name, lib in LIBRARIES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, contender in contenders.items():
            torch.tanh(large)
            start = time.perf_counter()
            contender(x)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: medians[name] - medians["by hand"] for name in LIBRARIES}


def measure(ops: list[Op], fixed: dict[str, float], rounds: int, seconds: float) -> harness.Table:
    """The table of a family, one row an op."""
    table = harness.Table(
        f"{BATCH} examples",
        ["op", "by hand us", "lamina us", "torch.func us", "vmap / hand", "vmap / torch.func", ""],
    )
    cases = {}
    looping = set()
    for op in ops:
        mapped = {name: lib.vmap(op.one, op.in_dims) for name, lib in LIBRARIES.items()}
        if loops(mapped["torch.func"], op.args):
            looping.add(op.name)
        thunks = {name: partial(f, *op.args) for name, f in mapped.items()}
        cases[op.name] = {"by hand": partial(op.hand, *op.args), **thunks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the loops, which the last column tells
        result = harness.race(cases, rounds=rounds, min_seconds=seconds, rtol=1e-2, atol=1e-2)
    for name, times in result.seconds.items():
        hand, ours, peer = (times[who] for who in ("by hand", "lamina", "torch.func"))
        worth = harness.median(hand) > fixed["lamina"]
        table.add(
            str(name),
            *(harness.median(t) * 1e6 for t in (hand, ours, peer)),
            harness.median((ours - fixed["lamina"]) / hand) if worth else "smaller",
            harness.median(ours / peer),
            "loops" if name in looping else "",
        )
    costs = ", ".join(f"{name} {cost * 1e6:.1f}" for name, cost in fixed.items())
    table.notes.append(f"Microseconds for a call with one op that has nothing to do: {costs}.")
    table.note_failures(result.failures)
    return table


def main(arguments: list[str] | None = None) -> harness.Report:
    """Runs all families; returns what it printed."""
    report = harness.start("vmap of single ops, next to ops batched by hand.", arguments)
    quick = report.settings.quick
    rounds, seconds = (3, 0.0005) if quick else (9, 0.05)
    fixed = fixed_costs(20 if quick else 500)
    batch = 4 if quick else BATCH
    for family in FAMILIES:
        torch.manual_seed(0)
        table = measure(family(batch), fixed, rounds, seconds)
        table.title = f"vmap of {batch} examples: {family.__name__}"
        report.add(table)
    report.save()
    return report


if __name__ == "__main__":
    main()
