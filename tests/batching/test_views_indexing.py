"""Views, copies, joining, indexing, scattering and sorting under `vmap`: what op samples leave out.

The oracle is always the loop: `vmap(f)(x) == stack([f(x[0]), f(x[1]), ...])`.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from lamina import grad, jvp, vmap
from lamina_core.errors import DataDependentError, MutationError
from lamina_core.wrapper import shares_memory

B = 3


def loop(f, in_dims, *args):
    """`f` on each example, stacked."""
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    rows = [
        f(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    return torch.stack(rows)


def agrees(f, *examples, batched=None):
    """Compares `vmap(f)` with the loop, for every choice of batched arguments and batch dims.

    Args:
        f: the function of one example.
        examples: batched tensors, batch dim first.
        batched: which arguments may be batched; all by default.
    """
    positions = range(len(examples)) if batched is None else batched
    for count in range(1, len(positions) + 1):
        for chosen in itertools.combinations(positions, count):
            for last in (False, True):
                args, dims = [], []
                for k, x in enumerate(examples):
                    if k not in chosen:
                        args.append(x[0])
                        dims.append(None)
                        continue
                    dim = x.dim() - 1 if last else 0
                    args.append(x.movedim(0, dim).contiguous())  # the batch dim in memory, too
                    dims.append(dim)
                expected = loop(f, dims, *args)
                torch.testing.assert_close(vmap(f, tuple(dims))(*args), expected)


def numbers(*shape, dtype=torch.float64):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape) + 1


VIEWS = {
    "alias": lambda x: torch.ops.aten.alias(x),
    "diagonal": lambda x: x.diagonal(1, -1, 0),
    "expand in front": lambda x: x.unsqueeze(0).expand(5, -1, -1, -1),
    "getitem": lambda x: x[:, None, -1, ..., ::2],
    "movedim": lambda x: x.movedim(-1, 0),
    "narrow": lambda x: x.narrow(-2, 1, 2),
    "permute": lambda x: x.permute(-1, 0, 1),
    "select": lambda x: x.select(-1, -2),
    "split": lambda x: x.split(2, -1)[1],
    "split of unbind": lambda x: x.unbind(-1)[2].split(2, 0)[0],
    "squeeze": lambda x: x.unsqueeze(1).squeeze(),
    "squeeze dims": lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze((-1, 1)),
    "t": lambda x: x[0].t(),
    "transpose": lambda x: x.transpose(-1, 0),
    "unfold": lambda x: x.unfold(-1, 2, 1),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "view dtype": lambda x: x.view(torch.int64).view(torch.float64),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("bdim", [0, 1, 2, 3])
def test_views_agree_with_the_loop_and_stay_views(name, bdim):
    f, x = VIEWS[name], numbers(2, 3, 4, 5).movedim(bdim, 0).contiguous().movedim(0, bdim)
    shared = []

    def spied(a):
        out = f(a)
        shared.append(shares_memory(out, x))
        return out

    torch.testing.assert_close(vmap(spied, bdim)(x), loop(f, [bdim], x))
    assert shared == [True]


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_no_examples(name):
    f = VIEWS[name]
    assert vmap(f)(numbers(0, 3, 4, 5)).shape == (0, *f(numbers(3, 4, 5)).shape)


@pytest.mark.parametrize("name", VIEWS)
def test_views_under_two_levels(name):
    f, x = VIEWS[name], numbers(2, 3, 4, 5, 6)
    expected = torch.stack([loop(f, [2], a) for a in x.unbind(3)])
    torch.testing.assert_close(vmap(vmap(f, 2), 3)(x), expected)


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_a_view_reaches_its_base(name):
    def f(x):
        base = x.clone()
        VIEWS[name](base).mul_(-1) if "expand" not in name else base.mul_(-1)
        return base

    agrees(f, numbers(B, 3, 4, 5))


def test_a_view_that_would_merge_dims_around_the_batch_dim_is_copied_and_still_written_through():
    def f(x):
        base = x.clone()
        base.view(-1)[1] = 7.0
        return base

    agrees(f, numbers(B, 2, 4))


@pytest.mark.parametrize("bdim", [0, 1, 2])
def test_pairs_are_viewed_as_complex_numbers(bdim):
    x = numbers(B, 4, 2)
    for batched in (x.movedim(0, bdim), x.movedim(0, bdim).contiguous()):
        out = vmap(torch.view_as_complex, bdim)(batched)
        torch.testing.assert_close(out, torch.view_as_complex(x))


@pytest.mark.parametrize("part", [torch.real, torch.imag])
def test_parts_of_a_lazily_conjugated_value_below_a_derivative(part):
    x = torch.randn(3, 4, dtype=torch.complex128)

    def f(x):
        return part(x.conj())

    def loss(f, x):
        return f(x).square().sum()

    expected = torch.func.grad(lambda x: loss(f, x))(x)
    torch.testing.assert_close(grad(lambda x: loss(vmap(f), x))(x), expected)
    torch.testing.assert_close(jvp(vmap(f), (x,), (x.cos(),))[1], f(x.cos()))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.transpose(0, -1),
        lambda x: x.t(),
        lambda x: x.squeeze(),
        lambda x: x.squeeze(0),
        lambda x: x.unsqueeze(-1),
        lambda x: x.reshape(1, -1),
        lambda x: x.expand(2, 3),
        lambda x: x.repeat(2),
        lambda x: x.flip(0),
        lambda x: x.roll(1),
        lambda x: x.sort(-1).values,
        lambda x: x.topk(1).values,
        lambda x: x.median(0).values + x.median(),
        lambda x: x.mode(keepdim=True).values,
        lambda x: x.kthvalue(1).values,
        lambda x: x.unfold(0, 1, 1),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: x.gather(0, torch.tensor(0)),
        lambda x: x.scatter(0, torch.tensor(0), 5.0),
        lambda x: x.index_fill(0, torch.tensor(0), 5.0),
        lambda x: torch.stack([x, x], -1),
    ],
)
def test_scalars_have_one_dim_where_aten_says_so(f):
    agrees(f, numbers(B))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.half, torch.complex64])
def test_dtypes_are_kept(dtype):
    x, index = numbers(B, 4, dtype=torch.float32).to(dtype), torch.tensor([[0, 2], [1, 1], [3, 0]])
    agrees(
        lambda x, i: torch.cat([x[i], x.index_select(0, i), x.gather(0, i), x.take(i)]), x, index
    )
    agrees(lambda x, i: x.index_copy(0, i[:1], x[:1]), x, index)
    agrees(lambda x, i: x.clone().index_put_((i,), x[0]), x, index)


INDEX = {
    "one": (lambda x, i, j: x[i], lambda x, i, j, v: (i,)),
    "behind": (lambda x, i, j: x[:, i], lambda x, i, j, v: (slice(None), i)),
    "last": (lambda x, i, j: x[..., i], lambda x, i, j, v: (..., i)),
    "neighbours": (lambda x, i, j: x[:, i, j], lambda x, i, j, v: (slice(None), i, j)),
    "apart": (lambda x, i, j: x[i, :, j], lambda x, i, j, v: (i, slice(None), j)),
    "broadcast": (lambda x, i, j: x[i[:, None], j], lambda x, i, j, v: (i[:, None], j)),
    "negative": (lambda x, i, j: x[i - 2, j], lambda x, i, j, v: (i - 2, j)),
    "with an int": (lambda x, i, j: x[1, i], lambda x, i, j, v: (1, i)),
}


@pytest.mark.parametrize("name", INDEX)
def test_reading_by_every_mix_of_batched_and_unbatched_indices(name):
    i, j = torch.tensor([[0, 1], [1, 1], [1, 0]]), torch.tensor([[1, 0], [0, 1], [1, 1]])
    agrees(INDEX[name][0], numbers(B, 2, 3, 4), i, j)


@pytest.mark.parametrize("name", INDEX)
def test_writing_by_every_mix_of_batched_and_unbatched_indices(name):
    where = INDEX[name][1]
    i, j = torch.tensor([[0, 1], [1, 0], [1, 0]]), torch.tensor([[1, 0], [0, 1], [0, 1]])
    values = torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64)

    def f(x, i, j, v):
        x = x.clone()
        x[where(x, i, j, v)] = v
        return x

    def whole(x, i, j, v):
        x = x.clone()
        at = where(x, i, j, v)
        x[at] = x[at] * v + 1
        return x

    agrees(f, numbers(B, 2, 3, 4), i, j, values)
    agrees(whole, numbers(B, 2, 3, 4), i, j, values)


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
def test_accumulating_writes():
    i = torch.tensor([[0, 0], [1, 0], [1, 1]])
    v = numbers(B, 2, 3)
    agrees(lambda x, i, v: x.index_put((i,), v, accumulate=True), numbers(B, 2, 3), i, v)
    agrees(lambda x, i, v: x.index_add(0, i, v, alpha=2), numbers(B, 2, 3), i, v)
    agrees(lambda x, i, v: x.index_reduce(0, i, v, "amax"), numbers(B, 2, 3), i, v)
    agrees(lambda x, i, v: x.scatter_add(1, i, v), numbers(B, 2, 3), i.unsqueeze(-1), v)


@pytest.mark.parametrize(("rank", "at"), [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1)])
def test_a_number_is_written_to_the_places_of_a_mask(rank, at):
    x = numbers(B, 2, 3, 4)
    shape = x.shape[1 + at : 1 + at + rank]
    mask = torch.rand(B, *shape, generator=torch.Generator().manual_seed(0)) > 0.5

    def f(x, mask, v):
        x = x.clone()
        x[(slice(None),) * at + (mask,)] = v
        return x

    agrees(f, x, mask, torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64))


def test_rows_are_written_to_the_places_of_a_mask():
    def f(x, mask, row):
        x = x.clone()
        x[mask] = row
        x[mask] += 1
        return x

    def g(x, mask, row):
        x = x.clone()
        x[mask] = row
        return x

    mask = torch.tensor([[True, False], [True, True], [False, False]])
    agrees(g, numbers(B, 2, 3), mask, -numbers(B, 3))
    agrees(g, numbers(B, 2, 3), mask, -numbers(B, 1, 3))
    with pytest.raises(DataDependentError, match="own shape"):
        vmap(f)(numbers(B, 2, 3), mask, -numbers(B, 3))


def test_values_that_run_over_the_places_of_a_batched_mask_are_refused():
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    with pytest.raises(DataDependentError, match=r"torch\.where"):
        vmap(lambda x, m: x.index_put((m,), torch.ones(2)), (0, 0))(torch.zeros(3, 2), mask)


def test_an_index_that_is_out_of_range_for_its_example_reaches_no_other_example():
    for f in (
        lambda x, i: x[i],
        lambda x, i: x.index_select(0, i),
        lambda x, i: x.index_add(0, i, torch.ones(1)),
        lambda x, i: x.index_copy(0, i, torch.ones(1)),
        lambda x, i: x.gather(0, i),
        lambda x, i: x.take(i),
    ):
        with pytest.raises((IndexError, RuntimeError)):
            vmap(f)(torch.zeros(3, 2), torch.tensor([[2], [0], [0]]))


def test_a_batched_index_into_a_captured_tensor():
    table = numbers(5, 2)
    agrees(lambda i: table[i], torch.tensor([[4, 0], [1, 1], [2, 3]]))
    agrees(lambda i: table.index_select(1, i), torch.tensor([[1, 0], [1, 1], [0, 0]]))
    with pytest.raises(MutationError, match="captured"):
        vmap(lambda i: table.index_fill_(0, i, 0.0))(torch.tensor([[4, 0], [1, 1]]))


def test_cat_skips_tensors_without_elements_as_aten_does():
    empty = torch.empty(B, 0)
    agrees(lambda e, x: torch.cat([e, x], 1), empty, numbers(B, 2, 3))
    agrees(lambda e, x: torch.cat([x, e, x]), empty, numbers(B, 2))


@pytest.mark.parametrize("size", [0, 1])
def test_no_examples_and_one_example(size):
    x, i = numbers(size, 4, 3), torch.zeros(size, 2, dtype=torch.int64)
    assert vmap(lambda x, i: x[i])(x, i).shape == (size, 2, 3)
    assert vmap(lambda x, i: x.index_add(0, i, x[:2]))(x, i).shape == (size, 4, 3)
    assert vmap(lambda x: x.squeeze())(numbers(size, 1, 3)).shape == (size, 3)
    assert vmap(lambda x: torch.cat([x, x], -1))(x).shape == (size, 4, 6)
    assert vmap(lambda x: x.sort(0).values)(x).shape == (size, 4, 3)
    assert vmap(lambda x, i: x.scatter(0, i[:, None], 1.0))(x, i).shape == (size, 4, 3)


def test_indexing_under_two_levels():
    x, i = numbers(2, B, 4, 3), torch.tensor([[0, 1], [3, 3], [1, 2]])
    f = lambda x, i: x[i].index_add(1, i % 3, x[:2, :2])
    expected = torch.stack([loop(f, [0, 0], a, i) for a in x])
    torch.testing.assert_close(vmap(vmap(f), (0, None))(x, i), expected)
    g = lambda x, i: x[i]
    expected = torch.stack([torch.stack([g(b, k) for k in i]) for b in x[0]])
    torch.testing.assert_close(vmap(lambda b: vmap(lambda k: g(b, k))(i))(x[0]), expected)


def test_lazy_conjugation_is_not_lost():
    x = torch.view_as_complex(numbers(B, 4, 2))
    agrees(lambda x: torch.fft.fft(x.conj()) + x.conj().imag + torch.sin(x.mH), x[:, :, None])
    torch.testing.assert_close(vmap(torch.sin)(x.conj()), torch.sin(x.conj()))


def test_results_made_after_the_likeness_of_an_argument_can_be_written_to():
    def f(x):
        zeros, new = torch.zeros_like(x), x.new_zeros(2, 3)
        zeros[0] = x[1]
        new[:, 1] = x[:, 0]
        return zeros + new

    agrees(f, numbers(B, 2, 3))
