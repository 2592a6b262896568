"""The loop over the examples: which ops take it on purpose, and that it is right."""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina import vmap
from lamina.vmap.looped import LOOPED
from lamina.vmap.table import RULES
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
    x, scale = torch.linspace(-1, 1, 6).reshape(2, 3), torch.tensor([[0.1], [0.3]])
    zero = torch.zeros(1)
    with pytest.warns(FallbackWarning, match="scale and the zero point of one tensor"):
        vmap(lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s, zero, -8, 7))(
            x, scale
        )


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


def sgd(weight, slope):
    """One step, by a kernel that writes to lists of tensors."""
    weight, slope, momentum = weight.clone(), slope.clone(), torch.zeros_like(weight)
    torch._fused_sgd_(
        [weight],
        [slope],
        [momentum],
        weight_decay=0.1,
        momentum=0.9,
        lr=0.1,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    )
    return weight, momentum


def test_an_op_that_writes_to_its_arguments():
    weight, slope = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)
    before = weight.clone()
    actual = vmap(sgd)(weight, slope)
    rows = [sgd(w, s) for w, s in zip(weight, slope, strict=True)]
    for a, column in zip(actual, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(column))
    assert torch.equal(weight, before)
    assert [out.shape for out in vmap(sgd)(weight[:0], slope[:0])] == [(0, 2), (0, 2)]


def test_an_op_that_writes_to_an_argument_of_the_caller():
    weight, slope = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)
    expected = torch.stack([sgd(w, s)[0] for w, s in zip(weight, slope, strict=True)])

    def f(weight, slope):
        torch._fused_sgd_(
            [weight],
            [slope],
            [torch.zeros_like(weight)],
            weight_decay=0.1,
            momentum=0.9,
            lr=0.1,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=True,
        )
        return weight

    torch.testing.assert_close(vmap(f)(weight, slope), expected)
    torch.testing.assert_close(weight, expected)


def test_at_two_levels():
    integers = torch.randint(-9, 9, (2, 3, 5, 4), generator=torch.Generator().manual_seed(0))
    rows = integers.to(torch.int8)
    actual = vmap(vmap(torch._int_mm), in_dims=(0, 1))(rows, rows.mT.movedim(0, 1))
    assert torch.equal(actual, (integers @ integers.mT).to(torch.int32))
