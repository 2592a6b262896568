"""`torch.autograd.detect_anomaly` is honoured by every backward pass of ours."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lamina import grad, hessian, jacrev, jvp, vjp, vmap
from lamina_core.errors import AnomalyError

ZEROS = torch.zeros(2, 3)
ONES = torch.ones(2, 3)


def masked_too_late(x):
    return (x.sqrt() * 0).sum()


WAYS = {
    "grad": grad(masked_too_late),
    "vjp": lambda x: vjp(masked_too_late, x)[1](torch.ones(())),
    "jacrev": jacrev(masked_too_late),
    "vmap(grad)": vmap(grad(masked_too_late)),
    "grad(vmap)": grad(lambda x: vmap(masked_too_late)(x).sum()),
    "hessian": hessian(masked_too_late),
    "grad(jvp)": grad(lambda x: jvp(masked_too_late, (x,), (ONES,))[1]),
}


@pytest.fixture(autouse=True)
def on():
    with torch.autograd.set_detect_anomaly(True):
        yield


@pytest.mark.parametrize("way", WAYS)
def test_the_op_is_named(way):
    with pytest.raises(AnomalyError, match=r"aten\.\w+.* gave NaN"):
        WAYS[way](ZEROS)


@pytest.mark.parametrize("way", WAYS)
def test_finite_derivatives_are_not_disturbed(way):
    found = WAYS[way](ONES)
    with torch.autograd.set_detect_anomaly(False):
        expected = WAYS[way](ONES)
    torch.testing.assert_close(found, expected)


def test_the_name_and_the_class_are_pytorchs():
    with pytest.raises(RuntimeError, match="SqrtBackward0"):
        grad(masked_too_late)(ZEROS)


def test_nan_may_be_let_through():
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        assert bool(grad(masked_too_late)(ZEROS).isnan().all())


def test_infinities_are_let_through():
    assert bool(grad(lambda x: x.sqrt().sum())(ZEROS).isinf().all())


def test_values_without_elements_are_not_looked_at():
    f = grad(masked_too_late)
    assert f(torch.zeros(2, 3, device="meta")).shape == (2, 3)
    with FakeTensorMode():
        assert f(torch.zeros(2, 3)).shape == (2, 3)
    assert f(torch.zeros(0, 3)).shape == (0, 3)


def test_the_look_is_not_traced():
    x = ONES + 1
    graph = make_fx(grad(masked_too_late))(x)
    assert not [node for node in graph.graph.nodes if "isnan" in str(node.target)]
    with pytest.raises(AnomalyError):
        make_fx(grad(masked_too_late))(ZEROS)
