"""Draws from keys (`_philox_*`, since torch 2.12; on the CPU since 2.14) under the transforms."""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, vmap
from lamina_core.errors import AbsentOpError
from lamina_core.overloads import aten
from lamina_core.torch_hooks.registry import has_kernel_for
from lamina_core.versions import minor_version

KEY = torch.tensor([1, 2], dtype=torch.uint64)
HERE = minor_version(torch.__version__)
DRAWS = {
    "normal": lambda key: aten._philox_normal.default(torch.zeros(4), key, 1.0, 2.0),
    "uniform": lambda key: aten._philox_uniform.default(torch.zeros(2, 3), key, -1.0, 1.0),
    "one number": lambda key: aten._philox_normal.default(torch.zeros(()), key),
    "in place": lambda key: aten._philox_normal_.default(torch.zeros(4), key),
    "integers": lambda key: aten._philox_randint.default(
        torch.zeros(4, dtype=torch.int64), key, 0, 9
    ),
    "a folded key": lambda key: aten._philox_key_fold_in.default(key, 5),
    "split keys": lambda key: aten._philox_key_split.default(key, 3),
    "a number of each": lambda key: aten._philox_key_fold_in.Tensor(
        key, aten._philox_key_split.default(key, 1)[0, 0]
    ),
}
SINCE = {"integers": (2, 15), "a number of each": (2, 14)}


def available(name):
    if HERE >= (2, 14):
        return SINCE.get(name, (2, 14)) <= HERE
    return has_kernel_for("aten::_philox_normal_", "CPU") if HERE >= (2, 12) else False


def keys():
    made = [[1, 2], [3, 4], [5, 6]]
    return torch.tensor(made, dtype=torch.uint64)


@pytest.mark.parametrize("name", DRAWS)
def test_each_example_draws_from_its_key(name):
    draw = DRAWS[name]
    if not available(name):
        with pytest.raises((AbsentOpError, NotImplementedError, RuntimeError)):
            draw(KEY)
        return
    expected = torch.stack([draw(key) for key in keys()])
    assert torch.equal(vmap(draw)(keys()), expected)
    assert torch.equal(vmap(draw, 1)(keys().T.contiguous()), expected)
    twice = vmap(vmap(draw))(torch.stack([keys(), keys()]))
    assert torch.equal(twice, expected.expand(2, *expected.shape))
    alone = vmap(lambda x: draw(KEY))(torch.ones(3))
    assert torch.equal(alone, draw(KEY).expand(3, *draw(KEY).shape))


def test_a_draw_is_a_constant():
    if not available("normal"):
        return
    noise = aten._philox_normal.default(torch.zeros(3), KEY)

    def f(x):
        return (x * aten._philox_normal.default(x, KEY)).sum()

    x = torch.ones(3)
    assert torch.equal(grad(f)(x), noise)
    assert torch.equal(jvp(f, (x,), (x,))[1], noise.sum())
