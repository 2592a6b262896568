"""An index that an op refuses alone it refuses in a batch, whichever example it is of.

It must not find an element of another example, nor count from the end where the op does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lamina import grad, vmap

V = torch.arange(4.0) + 1
M = torch.arange(12.0).reshape(4, 3) + 1
I = torch.tensor([0, 3, 1])  # noqa: E741 - as in x[i]
SCORES = torch.linspace(-1, 1, 12).reshape(3, 4)
B = 3


def _set(a: Any, i: Any) -> Any:
    a = a.clone()
    a[i] = 5.0
    return a


def _maps_back(a: Any, i: Any) -> Any:
    return grad(lambda a: a.index_select(0, i).square().sum())(a)


# Op, what it is given for one example (the index last), and numbers to put into the index.
WRONG = [4, 5, 11, 100, -1, -2, -4, -5, -100]
CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "embedding": (lambda w, i: F.embedding(i, w), (M, I)),
    "embedding, matrix": (lambda w, i: F.embedding(i, w), (M, I.reshape(3, 1))),
    "embedding, padding": (lambda w, i: F.embedding(i, w, padding_idx=2), (M, I)),
    "embedding_bag, sum": (lambda w, i: F.embedding_bag(i[None], w, mode="sum"), (M, I)),
    "embedding_bag, mean": (lambda w, i: F.embedding_bag(i[None], w), (M, I)),
    "embedding_bag, max": (lambda w, i: F.embedding_bag(i[None], w, mode="max"), (M, I)),
    "gather": (lambda a, i: a.gather(0, i), (V, I)),
    "getitem": (lambda a, i: a[i], (M, I)),
    "getitem, number": (lambda a, i: a[i], (M, torch.tensor(1))),
    "getitem, second dim": (lambda a, i: a[:, i], (M.mT, I)),
    "index_add": (lambda a, s, i: a.index_add(0, i, s), (V, V[:3], I)),
    "index_add, last dim": (lambda a, s, i: a.index_add(-1, i, s), (M.mT, M.mT[:, :3], I)),
    "index_copy": (lambda a, s, i: a.index_copy(0, i, s), (M, M[:3], I)),
    "index_fill": (lambda a, i: a.index_fill(0, i, 7), (M, I)),
    "index_fill, tensor": (lambda a, v, i: a.index_fill(0, i, v), (M, torch.tensor(2.0), I)),
    "index_put": (lambda a, s, i: a.index_put((i,), s), (V, V[:3], I)),
    "index_put, added": (lambda a, s, i: a.index_put((i,), s, accumulate=True), (V, V[:3], I)),
    "index_reduce": (lambda a, s, i: a.index_reduce(0, i, s, "amax"), (V, V[:3], I)),
    "index_select": (lambda a, i: a.index_select(0, i), (V, I)),
    "index_select, last dim": (lambda a, i: a.index_select(-1, i), (M.mT, I)),
    "index_select, its gradient": (_maps_back, (V, I)),
    "masked_scatter": (lambda a, s, i: a.masked_scatter(i < 0, s), (V[:3], V[:0], I)),
    "multi_margin_loss": (F.multi_margin_loss, (SCORES, I)),
    "multilabel_margin_loss": (F.multilabel_margin_loss, (SCORES.mT, I.expand(4, 3))),
    "narrow": (lambda a, i: torch.narrow(a, 0, i, 2), (V, torch.tensor(1))),
    "narrow, nothing": (lambda a, i: torch.narrow(a, 0, i, 0), (V, torch.tensor(1))),
    "nll_loss": (F.nll_loss, (SCORES, I)),
    "nll_loss, none": (lambda x, i: F.nll_loss(x, i, reduction="none"), (SCORES, I)),
    "nll_loss, weights": (lambda x, w, i: F.nll_loss(x, i, w), (SCORES, V, I)),
    "one_hot": (lambda i: F.one_hot(i, 4), (I,)),
    "cross_entropy": (F.cross_entropy, (SCORES, I)),
    "cross_entropy, smooth": (
        lambda x, i: F.cross_entropy(x, i, label_smoothing=0.1),
        (SCORES, I),
    ),
    "put": (lambda a, s, i: a.put(i, s), (V, V[:3], I)),
    "scatter": (lambda a, s, i: a.scatter(0, i, s), (V, V[:3], I)),
    "scatter_add": (lambda a, s, i: a.scatter_add(0, i, s), (V, V[:3], I)),
    "scatter_reduce": (lambda a, s, i: a.scatter_reduce(0, i, s, "amax"), (V, V[:3], I)),
    "sorter": (lambda a, v, i: torch.searchsorted(a, v, sorter=i), (V[:3], V, I.clamp(max=2))),
    "setitem": (_set, (M, I)),
    "take": (lambda a, i: a.take(i), (M, I)),
    "take_along_dim": (lambda a, i: torch.take_along_dim(a, i, 0), (V, I)),
    "unpool": (lambda a, i: F.max_unpool1d(a[None], i[None], 1), (V[:3], I.clamp(max=2))),
}
REFUSALS = (IndexError, RuntimeError)

pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")


def _outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except REFUSALS:
        return None


def _agree(f: Any, values: tuple[Any, ...], in_dims: tuple[Any, ...]) -> None:
    examples = [
        [x if d is None else x[b] for x, d in zip(values, in_dims, strict=True)] for b in range(B)
    ]
    alone = _outcome(lambda: torch.stack([f(*example) for example in examples]))
    got = _outcome(lambda: vmap(f, in_dims=in_dims)(*values))
    assert (got is None) == (alone is None), (in_dims, alone, got)
    if got is not None:
        torch.testing.assert_close(got, alone)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("others_mapped", [True, False])
@pytest.mark.parametrize("at_fault", range(B))
def test_an_index_out_of_range(case, others_mapped, at_fault):
    f, (*others, index) = CASES[case]
    for number in WRONG:
        numbers = index.expand(B, *index.shape).clone()
        numbers[at_fault].view(-1)[-1] = number
        mapped = [x.expand(B, *x.shape) if others_mapped else x for x in others]
        dims = [0 if others_mapped else None] * len(mapped)
        _agree(f, (*mapped, numbers), (*dims, 0))


@pytest.mark.parametrize("case", CASES)
def test_an_index_that_all_examples_share(case):
    f, (*others, index) = CASES[case]
    if not others:
        return
    for number in WRONG:
        numbers = index.clone()
        numbers.view(-1)[-1] = number
        mapped = [x.expand(B, *x.shape) for x in others]
        _agree(f, (*mapped, numbers), (*[0] * len(mapped), None))


@pytest.mark.parametrize("case", ["embedding", "index_select", "index_copy", "embedding_bag, sum"])
@pytest.mark.parametrize("outer", [0, None])
def test_under_two_maps(case, outer):
    """The index is a wrapper of the level below, or of none."""
    f, (*others, index) = CASES[case]
    numbers = index.expand(2, B, *index.shape).clone()
    numbers[1, 1].view(-1)[0] = -1
    mapped = [x.expand(B, *x.shape) for x in others]
    inner = vmap(f, in_dims=(*[0] * len(mapped), 0))
    with pytest.raises(REFUSALS, match="range"):
        vmap(inner, in_dims=(*[outer] * len(mapped), 0))(
            *[x.expand(2, *x.shape) if outer == 0 else x for x in mapped], numbers
        )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("offsets", "with_end"), [([1, 2], False), ([0, 4], False), ([0, 2, 4], True)]
)
def test_bags_that_do_not_divide_the_entries(mode, offsets, with_end):
    def bags(w, i, offsets):
        return F.embedding_bag(i, w, offsets, mode=mode, include_last_offset=with_end)

    good = torch.tensor([0, 2, 3] if with_end else [0, 2])
    for at_fault in range(B):
        numbers = good.expand(B, -1).clone()
        numbers[at_fault] = torch.tensor(offsets)
        tables = M.expand(B, -1, -1)
        with pytest.raises(REFUSALS):
            vmap(bags, in_dims=(0, None, 0))(tables, I, numbers)


@pytest.mark.parametrize("repeats", [[1, 2, 2], [1, 2, 0], [3, -1, 2]])
def test_repeats_that_do_not_fill_the_output(repeats):
    for at_fault in range(B):
        counts = torch.tensor([1, 2, 1]).expand(B, -1).clone()
        counts[at_fault] = torch.tensor(repeats)
        _agree(lambda r: torch.repeat_interleave(r, output_size=4), (counts,), (0,))
        _agree(lambda r: torch.repeat_interleave(V[:3], r, output_size=4), (counts,), (0,))


def test_what_has_no_elements_is_not_asked():
    tables, numbers = M.expand(B, -1, -1), I.expand(B, -1)
    meta = vmap(lambda w, i: F.embedding(i, w))(tables.to("meta"), numbers.to("meta"))
    assert meta.shape == (B, 3, 3)
    assert vmap(lambda w, i: F.embedding(i, w))(tables, numbers[:, :0]).shape == (B, 0, 3)
