"""Fused optimisers under the transforms.

The kernels of a CPU are the oracle for values, one model after the other; `torch.autograd` on a
step that is spelt out is the oracle for derivatives.
"""

from __future__ import annotations

import pytest
import torch

import lamina
from lamina import functional_call, grad, jvp, stack_module_state, vmap

B = 3
ADAM = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}


@pytest.fixture(autouse=True)
def _no_loops(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")


def options(**given):
    return {"weight_decay": 0.0, "maximize": False} | given


# The kernel, how many lists of state it has, whether it has numbers of steps, and the rest.
CASES = {
    "adagrad": (
        torch._fused_adagrad_,
        1,
        True,
        options(lr=0.1, lr_decay=0.5, eps=1e-3, weight_decay=0.3),
    ),
    "adam": (torch._fused_adam_, 2, True, options(**ADAM, amsgrad=False)),
    "adam, amsgrad": (
        torch._fused_adam_,
        3,
        True,
        options(**ADAM, amsgrad=True, weight_decay=0.3, maximize=True),
    ),
    "adamw": (torch._fused_adamw_, 2, True, options(**ADAM, amsgrad=False, weight_decay=0.3)),
    "sgd": (
        torch._fused_sgd_,
        0,
        False,
        options(lr=0.1, momentum=0.0, dampening=0.0, nesterov=False, is_first_step=True),
    ),
    "sgd, first": (
        torch._fused_sgd_,
        1,
        False,
        options(lr=0.1, momentum=0.9, dampening=0.5, nesterov=True, is_first_step=True),
    ),
    "sgd, momentum": (
        torch._fused_sgd_,
        1,
        False,
        options(
            lr=0.1,
            momentum=0.9,
            dampening=0.5,
            nesterov=False,
            is_first_step=False,
            weight_decay=0.3,
            maximize=True,
        ),
    ),
}


def columns(name, dtype=torch.float64):
    """Lists of two parameters for every model, [B, ...] each, as the kernel wants them."""
    _, states, numbered, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(B, *shape, generator=generator, dtype=torch.float64).to(dtype) + 0.5

    lists = [[draw(4, 2), draw()] for _ in range(2 + states)]
    lists += [[]] * (3 - states if "adam" in name and "adagrad" not in name else 1 - states)
    numbers = torch.arange(1.0, B + 1)
    return [*lists, [numbers, numbers + 2]] if numbered else lists


def stepped(name, **scales):
    kernel, _, _, rest = CASES[name]

    def step(*lists, **given):
        lists = [[x.clone() for x in column] for column in lists]
        kernel(*lists, **(rest | scales | given))
        return lists

    return step


def one_by_one(step, lists, **given):
    rows = [
        step(
            *[[x[i] for x in column] for column in lists],
            **{k: v[i] for k, v in given.items()},
        )
        for i in range(B)
    ]
    return [
        [torch.stack([row[at][k] for row in rows]) for k in range(len(lists[at]))]
        for at in range(len(lists))
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_every_model(name, dtype):
    lists, step = columns(name, dtype), stepped(name)
    torch.testing.assert_close(vmap(step)(*lists), one_by_one(step, lists))


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", CASES)
def test_models_that_share_the_number_of_the_step(name, place):
    """One call of the kernel; gradients that all share, too, and a batch dim anywhere."""
    lists, step = columns(name), stepped(name)
    shared = [CASES[name][2] and at == len(lists) - 1 for at in range(len(lists))]
    shared[1] = True
    lists = [[x[0] for x in c] if one else c for c, one in zip(lists, shared, strict=True)]
    in_dims = [None if one else [place for _ in c] for c, one in zip(lists, shared, strict=True)]
    moved = [
        c if one else [x.movedim(0, place) for x in c] for c, one in zip(lists, shared, strict=True)
    ]
    every = [
        [x.expand(B, *x.shape) for x in c] if one else c
        for c, one in zip(lists, shared, strict=True)
    ]
    actual = vmap(step, tuple(in_dims))(*moved)
    torch.testing.assert_close(actual, one_by_one(step, every))


@pytest.mark.parametrize("name", CASES)
def test_scaled_gradients_of_which_some_are_infinite(name):
    lists, step = columns(name), stepped(name)
    given = {"grad_scale": torch.tensor([2.0, 4.0, 2.0]), "found_inf": torch.tensor([0.0, 1, 0])}
    actual = vmap(lambda given, *lists: step(*lists, **given))(given, *lists)
    torch.testing.assert_close(actual, one_by_one(step, lists, **given))


@pytest.mark.parametrize("name", CASES)
def test_a_rate_for_each_model(name):
    lists, step = columns(name), stepped(name)
    rates = torch.tensor([0.1, 0.2, 0.4])
    actual = vmap(lambda rate, *lists: step(*lists, lr=rate))(rates, *lists)
    torch.testing.assert_close(actual, one_by_one(step, lists, lr=rates))


@pytest.mark.parametrize("name", CASES)
def test_out_of_place_nothing_is_shared_with_the_arguments(name):
    kernel, _, _, rest = CASES[name]
    lists = columns(name)
    out_of_place = getattr(torch.ops.aten, kernel.__name__.removesuffix("_"))

    def step(*lists):
        outs = out_of_place(*lists, **rest)
        kept = [[x.clone() for x in column] for column in outs]
        for column in outs:
            for x in column:
                x.zero_()
        return kept, lists

    kept, after = vmap(step)(*lists)
    torch.testing.assert_close(list(after), lists)
    expected = one_by_one(stepped(name), lists)
    torch.testing.assert_close(kept, expected[: len(kept)])


def test_gradients_by_a_rate_and_by_the_parameters():
    x, slope = torch.rand(2, 3, dtype=torch.float64)
    rate = torch.tensor(0.1, dtype=torch.float64)
    zero, number = torch.zeros_like(x), torch.tensor(1.0)

    def f(rate, x, slope):
        lists = [[x.clone()], [slope], [zero.clone()], [zero.clone()], [], [number]]
        torch._fused_adam_(*lists, **(options(**ADAM, amsgrad=False) | {"lr": rate}))
        return (lists[0][0] ** 3).sum()

    def spelt_out(rate, x, slope):
        b1, b2 = ADAM["beta1"], ADAM["beta2"]
        mean, square = (1 - b1) * slope, (1 - b2) * slope**2
        scale = (square / (1 - b2)).sqrt() + ADAM["eps"]
        return ((x - rate * mean / (1 - b1) / scale) ** 3).sum()

    leaves = [t.clone().requires_grad_() for t in (rate, x, slope)]
    expected = torch.autograd.grad(spelt_out(*leaves), leaves)
    torch.testing.assert_close(grad(f, (0, 1, 2))(rate, x, slope), expected)
    tangents = (rate, x.cos(), slope.cos())
    along = sum((a * b).sum() for a, b in zip(expected, tangents, strict=True))
    torch.testing.assert_close(jvp(f, (rate, x, slope), tangents)[1], along)


def test_an_ensemble_trained_in_one_loop():
    """As each of its models alone, trained by `torch.optim`."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 2).double() for _ in range(B)]
    params, buffers = stack_module_state(models)
    xs, ys = torch.randn(B, 5, 4).double(), torch.randn(B, 5, 2).double()
    skeleton = torch.nn.Linear(4, 2).double()

    def train(params, buffers, x, y):
        params = {name: p.clone() for name, p in params.items()}
        state = [[torch.zeros_like(p) for p in params.values()] for _ in range(2)]
        for number in range(1, 4):

            def loss(params):
                return (functional_call(skeleton, (params, buffers), (x,)) - y).square().mean()

            slopes = list(grad(loss)(params).values())
            steps = [torch.tensor(float(number)) for _ in slopes]
            rest = options(**ADAM, amsgrad=False, weight_decay=0.1)
            torch._fused_adamw_(list(params.values()), slopes, *state, [], steps, **rest)
        return params

    trained = vmap(train)(params, buffers, xs, ys)
    for i, model in enumerate(models):
        optimiser = torch.optim.AdamW(
            model.parameters(), 0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, fused=False
        )
        for _ in range(3):
            optimiser.zero_grad()
            (model(xs[i]) - ys[i]).square().mean().backward()
            optimiser.step()
        found = {name: p[i] for name, p in trained.items()}
        torch.testing.assert_close(found, {k: v.detach() for k, v in model.named_parameters()})
