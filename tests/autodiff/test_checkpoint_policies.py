"""`checkpoint` and its policies: the same gradients under every transform, and what runs again."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lamina import (
    checkpoint,
    checkpoint_name,
    functional_call,
    grad,
    hessian,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from lamina import checkpoint_policies as policies
from lamina_core.errors import StructureError
from tests.errors.saying import said

DOUBLE = torch.float64
close = torch.testing.assert_close
linear = torch.nn.functional.linear
aten = torch.ops.aten

torch.manual_seed(0)
WEIGHTS = [torch.randn(4, 4, dtype=DOUBLE) / 2 for _ in range(3)]
X = torch.randn(5, 4, dtype=DOUBLE)


def network(x, weights):
    """Three layers; the first product is a batch of matrices when the weights are mapped."""
    for i, weight in enumerate(weights):
        x = checkpoint_name(linear(x, weight), f"h{i}").tanh()
        x = checkpoint_name(x.exp(), "out")
    return x


def by_autograd(f, *, twice):
    leaves = [t.clone().requires_grad_() for t in (X, *WEIGHTS)]
    found = torch.autograd.grad(f(leaves[0], leaves[1:]).sin().sum(), leaves, create_graph=twice)
    if not twice:
        return found
    return torch.autograd.grad(sum(g.square().sum() for g in found), leaves)


TRANSFORMS = {
    "autograd": lambda f: by_autograd(f, twice=False),
    "autograd twice": lambda f: by_autograd(f, twice=True),
    "grad": lambda f: grad(lambda x, ws: f(x, ws).sin().sum(), (0, 1))(X, WEIGHTS),
    "vjp twice": lambda f: [pull(X) for pull in [vjp(f, X, WEIGHTS)[1]] * 2],
    "jacrev": lambda f: jacrev(f)(X, WEIGHTS),
    "vmap": lambda f: vmap(f, (0, None))(X, WEIGHTS),
    "vmap(grad)": lambda f: vmap(grad(lambda x, ws: f(x, ws).sin().sum(), (0, 1)), (0, None))(
        X, WEIGHTS
    ),
    "vmap(grad) over weights": lambda f: vmap(
        grad(lambda x, ws: f(x, ws).sin().sum(), (0, 1)), (None, 0)
    )(X, [torch.stack([w, w.sin()]) for w in WEIGHTS]),
    "grad(vmap)": lambda f: grad(lambda ws: vmap(lambda x: f(x, ws))(X).sin().sum())(WEIGHTS),
    "grad(grad)": lambda f: grad(
        lambda x: grad(lambda x: f(x, WEIGHTS).sin().sum())(x).sin().sum()
    )(X),
    "hessian": lambda f: hessian(lambda x: f(x, WEIGHTS).sin().sum())(X[:2]),
    "jvp": lambda f: jvp(lambda x: f(x, WEIGHTS), (X,), (X,)),
    "vmap(grad) in autograd": lambda f: through_autograd(f),
}


def through_autograd(f):
    leaves = [w.clone().requires_grad_() for w in WEIGHTS]
    slopes = vmap(grad(lambda x: f(x, leaves).sin().sum()))(X)
    return torch.autograd.grad(slopes.square().sum(), leaves)


POLICIES = {
    "none": None,
    "nothing": policies.nothing_saveable,
    "everything": policies.everything_saveable,
    "dots": policies.dots_saveable,
    "dots without batch dims": policies.dots_with_no_batch_dims_saveable,
    "names": policies.save_only_these_names("h0", "h2"),
    "any names but": policies.save_any_names_but_these("h0", "out"),
    "anything except": policies.save_anything_except_these_names("h1"),
    "both": policies.save_from_both_policies(
        policies.dots_saveable, policies.save_only_these_names("out")
    ),
    "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "save and offload": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["h0"],
        names_which_can_be_offloaded=["h1"],
        offload_src="device",
        offload_dst="unpinned_host",
    ),
}


QUICK_TRANSFORMS = ["autograd", "vmap(grad)", "grad(grad)"]
QUICK_POLICIES = ["dots", "anything except"]


@pytest.mark.parametrize(
    ("transform", "policy"),
    [
        pytest.param(
            transform,
            policy,
            marks=()
            if transform in QUICK_TRANSFORMS or policy in QUICK_POLICIES
            else pytest.mark.exhaustive,
        )
        for transform in TRANSFORMS
        for policy in POLICIES
    ],
)
def test_the_same_result(transform, policy):
    run = TRANSFORMS[transform]
    close(run(checkpoint(network, policy=POLICIES[policy])), run(network))


class Count(TorchDispatchMode):
    """Counts the ops on plain tensors."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


# How many of three products, tanh and exp run again.
AGAIN = {
    "none": (3, 3, 3),
    "nothing": (3, 3, 3),
    "everything": (0, 0, 0),
    "dots": (0, 3, 3),
    "dots without batch dims": (0, 3, 3),
    "names": (1, 3, 3),
    "any names but": (1, 3, 3),
    "anything except": (1, 0, 0),
    "both": (0, 3, 0),
    "offload": (0, 3, 3),
    "save and offload": (1, 3, 3),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("transform", ["autograd", "grad", "vmap(grad)"])
def test_what_runs_again(transform, policy):
    def counted(f):
        with Count() as count:
            TRANSFORMS[transform](f)
        products = count.calls[aten.linear.default] + count.calls[aten.mm.default]
        return products, count.calls[aten.tanh.default], count.calls[aten.exp.default]

    plain = counted(network)
    found = counted(checkpoint(network, policy=POLICIES[policy]))
    again = tuple(more - once for more, once in zip(found, plain, strict=True))
    # The second run stops where it has what was asked for: before the last op.
    assert again in (AGAIN[policy], (*AGAIN[policy][:2], max(AGAIN[policy][2] - 1, 0)))


def test_batch_dims():
    def f(x, w, batch):
        return (x @ w + (batch @ batch).sum() + torch.einsum("ij,jk->ik", x, w)).sin()

    def products(policy):
        with Count() as count:
            grad(lambda x, w, b: checkpoint(f, policy=policy)(x, w, b).sum())(X, W, B)
        return sum(count.calls[op] for op in (aten.bmm.default, aten.matmul.default))

    W, B = WEIGHTS[0], torch.randn(2, 3, 3, dtype=DOUBLE)
    none, free, dots = map(
        products,
        (None, policies.dots_with_no_batch_dims_saveable, policies.dots_saveable),
    )
    assert none - free == 2  # x @ w, and the one matrix of einsum
    assert free - dots == 1  # batch @ batch


def test_attention_is_a_dot():
    q = torch.randn(1, 2, 3, 4, dtype=DOUBLE)
    f = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q).sin()

    def run(transform, policy):
        with Count() as count:
            found = transform(checkpoint(f, policy=policy))
        names = [op for op in count.calls if "scaled_dot_product" in str(op)]
        forward = [op for op in names if "backward" not in str(op)]
        return found, sum(count.calls[op] for op in forward)

    def autograd(f):
        leaf = q.clone().requires_grad_()
        return torch.autograd.grad(f(leaf).sum(), leaf)[0]

    for transform in (autograd, lambda f: grad(lambda q: f(q).sum())(q)):
        expected, more = run(transform, None)
        found, less = run(transform, policies.dots_saveable)
        close(found, expected)
        assert more - less == 1


def test_a_name_for_one_of_several_outputs():
    """The op gives the others as well, so it is kept as a whole."""
    keep = policies.save_only_these_names("values")

    def f(x):
        values, order = x.sort(-1)
        return checkpoint_name(values, "values").sin() * order

    leaf = X.clone().requires_grad_()
    with Count() as count:
        (found,) = torch.autograd.grad(checkpoint(f, policy=keep)(leaf).sum(), leaf)
    close(found, torch.autograd.grad(f(leaf).sum(), leaf)[0])
    assert count.calls[aten.sort.default] == 1


def test_draws_are_repeated():
    def f(x):
        return torch.nn.functional.dropout(x.sin(), 0.5) * x

    x = torch.ones(64, dtype=DOUBLE)
    for policy in (None, policies.everything_saveable):
        out, pull = vjp(checkpoint(f, policy=policy), x)
        close(pull(x)[0], (out != 0) * 2 * (x.cos() * x + x.sin()))
        leaf = x.clone().requires_grad_()
        out = checkpoint(f, policy=policy)(leaf)
        out.sum().backward()
        close(leaf.grad, (out != 0) * 2 * (x.cos() * x + x.sin()))


def test_parameters_that_the_function_closes_over():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).double()
    expected = torch.autograd.grad(module(X).sum(), list(module.parameters()))
    for policy in (None, policies.dots_saveable):
        run = checkpoint(module.forward, policy=policy)
        close(torch.autograd.grad(run(X).sum(), list(module.parameters())), expected)
        params = {name: p.detach() for name, p in module.named_parameters()}
        again = Deep(module, policy)
        found = grad(lambda p, again=again: functional_call(again, p, (X,)).sum())(
            {f"module.{name}": p for name, p in params.items()}
        )
        close(tuple(found.values()), expected)


class Deep(torch.nn.Module):
    def __init__(self, module, policy):
        super().__init__()
        self.module, self.policy = module, policy

    def forward(self, x):
        return checkpoint(self.module, policy=self.policy)(x)


def test_keyword_arguments_whatever_their_names():
    run = checkpoint(lambda x, *, policy, use_reentrant: x.sin() * policy * use_reentrant)
    found = grad(lambda x: run(x, policy=2.0, use_reentrant=X).sum())(X)
    close(found, 2 * X.cos() * X)


@pytest.mark.parametrize("inner", [None, policies.dots_saveable])
@pytest.mark.parametrize("outer", [None, policies.dots_saveable, policies.everything_saveable])
@pytest.mark.parametrize("transform", ["autograd", "grad(grad)"])
def test_regions_in_regions(transform, inner, outer):
    def f(x, weights):
        return checkpoint(network, policy=inner)(x * 2, weights).sin()

    run = TRANSFORMS[transform]
    close(run(checkpoint(f, policy=outer)), run(f))


def test_what_was_written_to_is_computed_again():
    def f(x, w):
        h = linear(x, w)
        return linear(h.mul_(2).sin(), w)

    keep = policies.dots_saveable
    run = lambda f: grad(lambda x, w: f(x, w).sum(), (0, 1))(X, WEIGHTS[0])
    close(run(checkpoint(f, policy=keep)), run(f))
    results = []
    for g in (f, checkpoint(f, policy=keep)):
        leaf = X.clone().requires_grad_()
        results.append(torch.autograd.grad(g(leaf, WEIGHTS[0]).sum(), leaf))
    close(*results)


def test_a_second_run_that_calls_other_ops_gets_no_wrong_answers():
    """What the first run leaves in a cache, the second does not compute."""
    cache = []

    def f(x, weights):
        if not cache:
            cache.append(linear(X, WEIGHTS[2]))
        return network(x, weights) * cache[0]

    plain = TRANSFORMS["grad"](lambda x, ws: network(x, ws) * linear(X, WEIGHTS[2]))
    close(TRANSFORMS["grad"](checkpoint(f, policy=policies.dots_saveable)), plain)


def test_what_is_kept_goes_with_the_tape():
    refs = []

    def f(x, w):
        h = linear(x, w)
        refs.append(weakref.ref(h))
        return h.sin()

    keep = policies.dots_saveable
    for transform in (
        lambda g: vjp(g, X, WEIGHTS[0]),
        lambda g: g(X.clone().requires_grad_(), WEIGHTS[0]),
    ):
        transform(checkpoint(f, policy=keep))  # the first one of a process proves its hooks
        gc.collect()
        gc.disable()
        try:
            live = _storages()
            held = transform(checkpoint(f, policy=keep))
            assert refs[-1]() is None
            del held
            assert _storages() == live
        finally:
            gc.enable()


def _storages():
    # Other tests of the process leave sparse tensors behind, which have no storage of their own.
    objects = gc.get_objects()
    tensors = [o for o in objects if type(o) is torch.Tensor and o.layout is torch.strided]
    return {t.untyped_storage()._cdata for t in tensors}


def test_a_policy_of_the_users():
    asked = Counter()

    def policy(op, *args, **kwargs):
        asked[op] += 1
        return op is aten.exp.default

    with Count() as count:
        TRANSFORMS["grad"](checkpoint(network, policy=policy))
    assert count.calls[aten.exp.default] == 3
    assert asked[checkpoint_name] == 6
    assert asked[aten.tanh.default] == 3


def test_names_elsewhere_have_no_effect():
    assert checkpoint_name(X, "x") is X
    close(grad(lambda x: checkpoint_name({"x": x.sin()}, "x")["x"].sum())(X), X.cos())
    keep = policies.save_only_these_names("x")
    f = lambda x: checkpoint_name(x, "x").sin()  # an argument: there is no op to keep
    close(grad(lambda x: checkpoint(f, policy=keep)(x).sum())(X), X.cos())


def test_options_that_do_not_fit():
    assert said(
        StructureError, lambda: policies.offload_dot_with_no_batch_dims("device", "disk")
    ) == (
        "offloading from 'device' to 'disk'\n"
        "  to fix: offload from 'device' to 'pinned_host' or 'unpinned_host'"
    )
    assert said(
        StructureError,
        lambda: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["a", "b"],
            names_which_can_be_offloaded=["b"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ) == (
        "names both to be saved and to be offloaded: b\n  to fix: put each name in one of the lists"
    )
