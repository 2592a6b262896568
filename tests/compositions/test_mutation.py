"""In-place semantics: each function is compared with the same one written out of place."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from tests import under
from tests.under import ALL

TRANSFORMS = [
    *("plain", "vmap", "vmap last", "vmap(vmap)", "grad", "vjp", "jacrev", "jvp", "jacfwd"),
    *("grad(vmap)", "vmap(grad)", "jvp(vmap)", "vmap(jvp)", "jvp(grad)", "grad(grad)"),
]
PAIRS = []

# What the functions capture.
ROW = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
pair = functools.partial(under.pair, into=PAIRS)


@pair(lambda x: x.sin() + x)
def add_to_a_fresh_tensor(x):
    y = x.sin()
    y.add_(x)
    return y


@pair(lambda x: (x.cos() * x - 0.5) / 2)
def a_chain_of_writes(x):
    y = x.cos()
    y *= x
    y -= 0.5
    y /= 2
    return y


@pair(lambda x: x.exp() * x.sin())
def overwrite_everything(x):
    y = x.cos()
    y[...] = x.exp() * x.sin()
    return y


@pair(lambda x: torch.cat([x[:1].sin(), x[1:2] * 3, x[2:]]))
def write_at_indices(x):
    y = x.clone()
    y[0] = x[0].sin()
    y[1] *= 3
    return y


@pair(lambda x: torch.cat([x[:1] * 2, x[1:3] * 2 + 1, x[3:] * 2]).sin())
def base_written_after_the_view_was_made(x):
    y = x.clone()
    view = y[1:3]
    y.mul_(2)
    view.add_(1)
    return y.sin()


@pair(lambda x: x[1:3] * 2 * x[:2])
def view_read_after_the_base_was_written(x):
    y = x.clone()
    view = y[1:3]
    y.mul_(2)
    return view * x[:2]


@pair(lambda x: torch.cat([x[:1], x[1:3].sin(), x[3:]]))
def view_written_base_read(x):
    y = x.clone()
    y[1:3].sin_()
    return y


@pair(lambda x: torch.cat([x[:1], x[1:2], x[2:3].exp() * 2, x[3:] * 2]))
def view_of_a_view(x):
    y = x.clone()
    tail = y[2:]
    tail[:1].exp_()
    tail.mul_(2)
    return y


@pair(lambda x: x[1:] * x[:-1].sin() + x[1:] * 0)
def two_views_that_overlap(x):
    y = x.clone()
    left, right = y[:-1], y[1:]
    kept = left.sin()
    left.zero_()
    right.copy_(x[1:])
    return right * kept


@pair(lambda x: torch.stack([x[0] * 2, x[2] * 2, x[1] * 2 + 1, x[3] * 2 + 1]))
def write_through_a_transpose(x):
    y = x.reshape(2, 2).clone()
    z = y.t()
    y.mul_(2)
    z[1].add_(1)
    return z.t().t().reshape(-1)


# "vmap last" puts the batch dim between the dims that are merged here, which then are copied.
WITH_FIRST = lambda x: torch.cat([x[1:2] * 3, x[1:], x * 2])


@pair(WITH_FIRST)
def write_through_a_reshape(x):
    y = torch.stack([x, x * 2], 0)
    flat = y.reshape(-1)
    flat[0] = y[0, 1] * 3
    return y.reshape(-1)


@pair(WITH_FIRST)
def write_through_a_flatten(x):
    y = torch.stack([x, x * 2], 0)
    y.flatten()[0] = y[0, 1] * 3
    return y.view(-1)


@pair(lambda x: torch.outer(x, x).T.sin().sum(0) + x)
def transpose_written_whole(x):
    y = torch.outer(x, x)
    y.mT.sin_()
    return y.sum(1) + x


@pair(lambda x: (torch.outer(x, x) + torch.diag(x)).sum(0))
def write_to_a_diagonal(x):
    y = torch.outer(x, x)
    y.diagonal().add_(x)
    return y.sum(0)


@pair(lambda x: torch.cat([x.sin()[:2], x.sin()[2:] * 3]))
def write_through_flatten_and_view(x):
    y = x.sin().view(2, 2)
    y.view(-1)[2:].mul_(3)
    return y.flatten()


@pair(lambda x: torch.stack([x, x.cos()]).sum(0))
def unbind_and_write(x):
    y = torch.stack([x, x])
    _, second = y.unbind()
    second.cos_()
    return y.sum(0)


@pair(lambda x: torch.cat([x[:2] * 2, x[2:] * 3]))
def split_and_write(x):
    y = x.clone()
    first, second = y.split(2)
    first.mul_(2)
    second.mul_(3)
    return y


@pair(lambda x: torch.full_like(x, 3.0) * x)
def fill(x):
    y = x.sin()
    y.fill_(3.0)
    return y * x


@pair(lambda x: x[0].sin() * x)
def fill_with_a_tensor(x):
    y = torch.zeros_like(x)
    y.fill_(x[0].sin())
    return y * x


@pair(lambda x: torch.zeros_like(x) + x)
def zero(x):
    y = x.sin()
    y.zero_()
    return y + x


@pair(lambda x: x.sin() * x)
def copy_into(x):
    y = x.cos()
    y.copy_(x.sin())
    return y * x


@pair(lambda x: x.sin())
def fill_fresh_zeros_entry_by_entry(x):
    y = torch.zeros(4, dtype=x.dtype)
    for i in range(4):
        y[i] = x[i].sin()
    return y


@pair(lambda x: torch.stack([x[0], x[0] + x[1], x[0] + x[1] + x[2], x.sum()]))
def running_sum_in_a_buffer(x):
    y = torch.empty(4, dtype=x.dtype)
    y[0] = x[0]
    for i in range(1, 4):
        y[i] = y[i - 1] + x[i]
    return y


@pair(lambda x: torch.stack([x, x.sin(), x.sin().sin()]).sum(0))
def rows_of_fresh_zeros(x):
    y = torch.zeros(3, 4, dtype=x.dtype)
    y[0] = x
    for i in range(1, 3):
        y[i] = y[i - 1].sin()
    return y.sum(0)


@pair(lambda x: torch.stack([x * 2, torch.full_like(x, 2.0)]))
def view_of_fresh_zeros_made_before_the_write(x):
    y = torch.ones(2, 4, dtype=x.dtype)
    row = y[0]
    row.copy_(x)
    y.mul_(2)
    return y


@pair(lambda x: x * 2 + 1)
def accumulate_in_a_fresh_scalar_and_vector(x):
    total = torch.zeros((), dtype=x.dtype)
    total += 1
    out = torch.zeros(4, dtype=x.dtype)
    out += x
    out += x
    return out + total


@pair(lambda x: x.sum() * x)
def accumulate_in_a_loop(x):
    total = torch.zeros((), dtype=x.dtype)
    for entry in x:
        total += entry
    return total * x


@pair(lambda x: (x.sin() * 2) * x.sin().cos())
def residual_written_over_by_mul(x):
    y = x.sin()
    z = y.cos()  # y is its residual
    y.mul_(2)
    return y * z


@pair(lambda x: x.exp() + x.exp() * 0)
def residual_of_exp_zeroed(x):
    y = x.exp()  # its own output is the residual
    kept = y * 1
    y.zero_()
    return kept + y


@pair(lambda x: torch.outer(x.tanh(), x).sum(0) + x)
def residual_of_a_product_written_over(x):
    a, b = x.tanh(), x.clone()
    product = torch.outer(a, b)
    a.fill_(5.0)
    b.copy_(x.exp())
    return product.sum(0) + x


@pair(lambda x: torch.cat([x.sin()[:2] * x.sin()[:2].cos(), x.sin()[2:] * x.sin()[2:].cos()]))
def residual_written_through_a_view(x):
    y = x.sin()
    z = y.cos() * y
    y[:2].zero_()
    y[2:] = 7.0
    return z


@pair(lambda x: x.sigmoid() * (1 + x.sigmoid()))
def a_write_between_two_reads(x):
    y = x.sigmoid()
    first = y * 1
    y.add_(1)
    return first * y


@pair(lambda x: torch.where(x > 0.1, torch.full_like(x, 2.0), x.sin()))
def masked_fill(x):
    y = x.sin()
    y.masked_fill_(x > 0.1, 2.0)
    return y


@pair(lambda x: x.sin().index_add(0, torch.tensor([2, 0]), x[:2] * 3))
def index_add(x):
    y = x.sin()
    y.index_add_(0, torch.tensor([2, 0]), x[:2] * 3)
    return y


@pair(lambda x: torch.stack([x[0].sin(), x[3], x[2].sin(), x[1] * 2]))
def write_at_a_list_of_indices(x):
    y = x.sin()
    y[[1, 3]] = torch.stack([x[3], x[1] * 2])
    return y


@pair(lambda x: x.sin().scatter_add(0, torch.tensor([1, 1, 0, 3]), x.cos()))
def scatter_add(x):
    y = x.sin()
    y.scatter_add_(0, torch.tensor([1, 1, 0, 3]), x.cos())
    return y


@pair(lambda x: torch.relu(x.sin() - 0.1) * x)
def relu(x):
    y = torch.relu_(x.sin() - 0.1)
    return torch.nn.functional.relu(y, inplace=True) * x


@pair(lambda x: torch.sin(x) * x)
def out_variant(x):
    y = torch.zeros(4, dtype=x.dtype)
    torch.sin(x, out=y)
    return y * x


@pair(lambda x: x.sin() * x.detach())
def a_write_to_a_detached_copy(x):
    y = x.detach().clone()
    z = x.sin()
    z.mul_(y)
    y.zero_()
    return z


@pair(lambda x: x.sin().unsqueeze(0).T.squeeze(1) * 2)
def shape_changed_in_place(x):
    y = x.sin()
    y.unsqueeze_(0)
    y.t_()
    y.squeeze_(1)
    return y.mul_(2)


@pair(lambda x: ROW.sin() + x + ROW * x)
def clones_of_captured_tensors(x):
    y = ROW.sin()
    y.add_(x)
    z = ROW.clone()
    z *= x
    return y + z


@pair(lambda x: batch_normed(x)[0] * batch_normed(x)[1].sum())
def statistics_of_batch_norm_made_inside(x):
    mean, var = ROW[:2].clone(), ROW[2:].square()
    out = torch.nn.functional.batch_norm(x.reshape(2, 2), mean, var, training=True)
    return out.reshape(-1) * mean.detach().sum()


def batch_normed(x):
    """The output of batch norm in train mode and the running mean, which no derivative goes to."""
    x = x.reshape(2, 2)
    mean = x.mean(0)
    out = (x - mean) / torch.sqrt((x - mean).square().mean(0) + 1e-5)
    return out.reshape(-1), (0.9 * ROW[:2] + 0.1 * mean).detach()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("writes", "plain"), PAIRS)
def test_writing_equals_not_writing(writes, plain, transform):
    torch.manual_seed(0)
    xs = torch.randn(3, 4, dtype=torch.float64)
    kept = xs.clone()
    apply = ALL[transform]
    torch.testing.assert_close(apply(writes, xs), apply(plain, xs))
    assert torch.equal(xs, kept), "the input was written to"


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "vmap(grad)"])
def test_a_deep_copy_is_a_copy(name):
    xs = torch.randn(3, 4, dtype=torch.float64)
    apply = ALL[name]

    def copied(x):
        y = copy.deepcopy(x)
        y.mul_(2)
        return y * x

    # As in PyTorch, the copy of a leaf is a leaf: nothing flows back through it.
    actual, expected = apply(copied, xs.clone()), apply(lambda x: 2 * x.detach() * x, xs.clone())
    torch.testing.assert_close(actual, expected)
