"""The ops: with and without a rule, with derivatives, and such that write to their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lamina_tests", "DEF")
OPS = torch.ops.lamina_tests
CALLS: list[tuple] = []


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("lamina_tests::scaled_cube", mutates_args=())
def scaled_cube(x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(x.detach().numpy() ** 3 * scale + shift)


@scaled_cube.register_vmap
def _(info, in_dims, x, scale=1.0, *, shift=0.0):
    CALLS.append((info.batch_size, info.randomness, in_dims))
    return scaled_cube(x, scale, shift=shift), in_dims[0]


def _setup(ctx, inputs, keyword_only_inputs, output):
    x, ctx.scale = inputs
    ctx.save_for_backward(x)


scaled_cube.register_autograd(
    lambda ctx, ct: (ct * 3 * ctx.saved_tensors[0] ** 2 * ctx.scale, None), setup_context=_setup
)


@torch.library.custom_op("lamina_tests::row_times", mutates_args=())
def row_times(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[n, m], [m] -> [n, m], [n]; no rule of its own."""
    product = x.detach().numpy() * y.detach().numpy()
    return torch.from_numpy(product), torch.from_numpy(product.sum(1))


def _row_times_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _row_times_backward(ctx, product_ct, total_ct):
    x, y = ctx.saved_tensors
    ct = product_ct + total_ct[:, None]
    return ct * y, (ct * x).sum(0)


row_times.register_autograd(_row_times_backward, setup_context=_row_times_setup)


@torch.library.custom_op("lamina_tests::total", mutates_args=())
def total(xs: list[Tensor]) -> Tensor:
    return torch.from_numpy(sum(x.detach().numpy() for x in xs))


def _total_setup(ctx, inputs, output):
    ctx.count = len(inputs[0])


total.register_autograd(lambda ctx, ct: [ct] * ctx.count, setup_context=_total_setup)

LIBRARY.define("raw_sine(Tensor x) -> Tensor")
LIBRARY.impl("raw_sine", lambda x: torch.from_numpy(x.numpy()).sin(), "CPU")
torch.library.register_autograd(
    "lamina_tests::raw_sine",
    lambda ctx, ct: ct * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
LIBRARY.define("composite(Tensor x, Tensor y) -> Tensor")
LIBRARY.impl("composite", lambda x, y: x.sin() @ y, "CompositeImplicitAutograd")


@torch.library.custom_op("lamina_tests::accumulate_", mutates_args={"x"})
def accumulate_(x: Tensor, by: Tensor) -> Tensor:
    """Adds to x in place and gives the sum of the result."""
    array = x.detach().numpy()
    array += by.detach().numpy()
    return torch.tensor(array.sum(-1))


@torch.library.custom_op("lamina_tests::zero_all_", mutates_args={"xs"})
def zero_all_(xs: list[Tensor]) -> None:
    for x in xs:
        x.detach().numpy()[...] = 0


LIBRARY.define("negate_(Tensor(a!) x, *, Tensor(b!)? count=None) -> Tensor(a!)")


def _negate(x, *, count=None):
    if count is not None:
        count.add_(1)
    return x.neg_()


LIBRARY.impl("negate_", _negate, "CPU")
