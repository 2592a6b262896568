"""The loop over the examples: which ops take it on purpose, and that it is right."""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina import vmap
from lamina.batching.looped import LOOPED
from lamina.batching.table import RULES
from lamina_core.errors import FallbackWarning


@pytest.fixture(autouse=True)
def _silent(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "silent")


def test_the_list_is_short_and_says_why():
    assert len(LOOPED) <= 25
    names = [str(op) for op in LOOPED]
    assert names == sorted(names)
    for op, reason in LOOPED.items():
        assert len(reason) > 20, op
        assert RULES.lookup(op) is None, f"{op} has a rule: take it off the list"


def test_the_warning_tells_the_reason(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "warn")
    with pytest.warns(FallbackWarning, match="no product of batches of integer matrices"):
        vmap(torch._int_mm)(*[torch.ones(2, 3, 3, dtype=torch.int8)] * 2)


@pytest.mark.parametrize("in_dims", [(0, 0), (2, 0), (0, None), (None, 1)])
def test_any_batch_dims(in_dims):
    integers = torch.randint(-9, 9, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    rows, columns = integers.to(torch.int8), integers.mT.to(torch.int8)
    args = [
        x[0] if d is None else x.movedim(0, d)
        for x, d in zip((rows, columns), in_dims, strict=True)
    ]
    expected = (integers if in_dims[0] is not None else integers[:1]) @ (
        integers.mT if in_dims[1] is not None else integers[:1].mT
    )
    actual = vmap(torch._int_mm, in_dims)(*args)
    assert torch.equal(actual, expected.to(torch.int32))


def test_no_examples():
    out = vmap(torch._int_mm)(
        torch.zeros(0, 5, 4, dtype=torch.int8), torch.zeros(0, 4, 3, dtype=torch.int8)
    )
    assert out.shape == (0, 5, 3)
    assert out.dtype == torch.int32


def unscaled(slope, found, scale):
    """Gradients divided by their scale, by a kernel that writes to a list and to a tensor."""
    slope, found = slope.clone(), found.clone()
    torch._amp_foreach_non_finite_check_and_unscale_([slope], found, scale)
    return slope, found


def scaled():
    slopes = torch.arange(6.0).reshape(3, 2)
    slopes[1, 0] = torch.inf
    return slopes, torch.zeros(3, 1), torch.tensor([1.0, 0.5, 0.25])


def test_an_op_that_writes_to_its_arguments():
    args = scaled()
    before = args[0].clone()
    actual = vmap(unscaled)(*args)
    rows = [unscaled(*row) for row in zip(*args, strict=True)]
    for a, column in zip(actual, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(column))
    assert torch.equal(args[0], before)
    shapes = [out.shape for out in vmap(unscaled)(*(arg[:0] for arg in args))]
    assert shapes == [(0, 2), (0, 1)]


def test_an_op_that_writes_to_an_argument_of_the_caller():
    slopes, found, scales = scaled()
    expected = torch.stack([unscaled(*row)[0] for row in zip(slopes, found, scales, strict=True)])

    def f(slope, found, scale):
        torch._amp_foreach_non_finite_check_and_unscale_([slope], found, scale)
        return slope

    torch.testing.assert_close(vmap(f)(slopes, found, scales), expected)
    torch.testing.assert_close(slopes, expected)
    assert found.tolist() == [[0], [1], [0]]


def test_at_two_levels():
    integers = torch.randint(-9, 9, (2, 3, 5, 4), generator=torch.Generator().manual_seed(0))
    rows = integers.to(torch.int8)
    actual = vmap(vmap(torch._int_mm), in_dims=(0, 1))(rows, rows.mT.movedim(0, 1))
    assert torch.equal(actual, (integers @ integers.mT).to(torch.int32))
