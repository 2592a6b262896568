"""Derivatives of one's own, and the memory they take.

A transform derives what the ops of a function say. Four times it pays to say more:

1. `custom_jvp`: a formula that is right, but whose derivative is not, at one point or for large x;
2. `custom_vjp`: a loop that ends at a fixed point, whose derivative needs the end and not the way;
3. `linearize`: many products with one hessian, of which nobody needs the matrix;
4. `checkpoint`: what to keep for the backward pass, and what to compute once more.

    python tutorials/custom_rules_and_memory.py

Each section prints what it shows and compares it with an answer found in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lamina import (
    checkpoint,
    checkpoint_name,
    checkpoint_policies,
    custom_jvp,
    custom_vjp,
    grad,
    hessian,
    linearize,
    print_saved_residuals,
    saved_residuals,
    vjp,
    vmap,
)

# 1. A formula with a rule ------------------------------------------------------------------------


def stable_log1pexp(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without an overflow: its value is right for every x."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


@custom_jvp
def log1pexp(x: Tensor) -> Tensor:
    """The same, with a derivative that is right for every x as well."""
    return stable_log1pexp(x)


@log1pexp.defjvp
def log1pexp_rule(primals: tuple[Tensor], tangents: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """The rule gives the value and, linear in x_t, its derivative: sigmoid(x) x_t."""
    (x,), (x_t,) = primals, tangents
    return log1pexp(x), torch.sigmoid(x) * x_t


def formulas() -> None:
    """One rule serves every transform: reverse mode is its transpose, `vmap` maps it."""
    x = torch.tensor([-3.0, 0.0, 100.0])
    print("1. d/dx log(1 + exp(x)) at", x.tolist())
    print("   log1p(exp(x)):             ", rounded(vmap(grad(lambda x: x.exp().log1p()))(x)))
    print("   the stable formula:        ", rounded(vmap(grad(stable_log1pexp))(x)))
    print("   with a rule:               ", rounded(vmap(grad(log1pexp))(x)))
    print("   sigmoid(x):                ", rounded(torch.sigmoid(x)))
    second = hessian(lambda x: log1pexp(x).sum())(x)
    print("   diagonal of the hessian:   ", rounded(second.diagonal()), "\n")
    check(vmap(grad(log1pexp))(x), torch.sigmoid(x))
    check(second, torch.diag(torch.sigmoid(x) * torch.sigmoid(-x)))


# 2. The derivative of a fixed point --------------------------------------------------------------

STEPS = 60  # each step at least halves the error, see `fixed_points`


def step(w: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """One step of the iteration. It contracts if the norm of `w` is less than 1."""
    return torch.tanh(w @ z + x)


def unrolled(w: Tensor, x: Tensor) -> Tensor:
    """The z with z = step(w, x, z); reverse mode would keep every step of the loop."""
    z = torch.zeros_like(x)
    for _ in range(STEPS):
        z = step(w, x, z)
    return z


@custom_vjp
def fixed_point(w: Tensor, x: Tensor) -> Tensor:
    """The same z."""
    return unrolled(w, x)


def fixed_point_fwd(w: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The output, and what the pullback needs: the end of the loop and the arguments."""
    z = fixed_point(w, x)
    return z, (w, x, z)


def fixed_point_bwd(residuals: tuple[Tensor, Tensor, Tensor], z_ct: Tensor) -> tuple[Tensor, ...]:
    """The implicit function theorem, with A = d step/dz and B = d step/d(w, x).

    From z = step(w, x, z) follows dz = (1 - A)^-1 B d(w, x). The pullback of that is B^T u, where
    u = (1 - A^T)^-1 z_ct is itself a fixed point, of u = z_ct + A^T u.
    """
    w, x, z = residuals
    _, pull_z = vjp(lambda z: step(w, x, z), z)
    u = z_ct
    for _ in range(STEPS):
        u = z_ct + pull_z(u)[0]
    _, pull_arguments = vjp(lambda w, x: step(w, x, z), w, x)
    return pull_arguments(u)


fixed_point.defvjp(fixed_point_fwd, fixed_point_bwd)


def fixed_points() -> None:
    """The gradients agree; what has to be kept for them does not depend on the number of steps."""
    w, xs = torch.randn(50, 50, dtype=torch.float64), torch.randn(4, 50, dtype=torch.float64)
    w = w / (2 * torch.linalg.matrix_norm(w, 2))
    print(f"2. A fixed point, reached in {STEPS} steps: gradients of 4 examples in w and x")
    found = {}
    print(f"   of a w of {w.nbytes / 1024:.1f} KiB")
    for function in (unrolled, fixed_point):

        def loss(w: Tensor, x: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(w, x).square().sum()

        found[function] = vmap(grad(loss, (0, 1)), (None, 0))(w, xs)
        kept = sum(residual.bytes for residual in saved_residuals(loss, w, xs[0]))
        name = "through the loop" if function is unrolled else "with a rule"
        print(f"   {name + ':':18}keeps {kept / 1024:4.1f} KiB, w among it")
    pairs = list(zip(*found.values(), strict=True))
    print(f"   largest difference: {max((a - b).abs().max().item() for a, b in pairs):.1e}\n")
    for ours, through_the_loop in pairs:
        check(ours, through_the_loop)


# 3. Conjugate gradients --------------------------------------------------------------------------


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> tuple[Tensor, int]:
    """Solves A x = b for a positive definite A that is known by its products alone."""
    x, r = torch.zeros_like(b), b
    p, rr, products = r, r @ r, 0
    while rr.sqrt() > 1e-9 * b.norm() and products < 10 * len(b):
        Ap = product(p)
        products += 1
        alpha = rr / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        p, rr = r + (r @ r) / rr * p, r @ r
    return x, products


def newton() -> None:
    """Newton's method: `linearize` runs the gradient once, each product replays its linear part."""
    points = torch.randn(500, 200, dtype=torch.float64)
    labels = (points @ torch.randn(200, dtype=torch.float64) > 0).double()
    calls = []

    def loss(w: Tensor) -> Tensor:
        calls.append(w.shape)
        fit = F.binary_cross_entropy_with_logits(points @ w, labels)
        return fit + 0.01 * w.square().sum()

    w = torch.zeros(200, dtype=torch.float64)
    print("3. Newton's method with conjugate gradients: logistic regression in 200 parameters")
    for _ in range(8):
        calls.clear()
        gradient, hvp = linearize(grad(loss), w)
        move, products = conjugate_gradients(hvp, -gradient)
        norm, runs = gradient.norm(), len(calls)
        print(f"   gradient {norm:.1e}: {products:2d} products, {runs} run of the loss")
        if norm < 1e-10:
            break
        check(move, torch.linalg.solve(hessian(loss)(w), -gradient))
        w = w + move
    check(grad(loss)(w), torch.zeros_like(w))
    print()


# 4. What is kept ---------------------------------------------------------------------------------

Weights = list[tuple[Tensor, Tensor]]


def block(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[N, D] -> [N, D]; the wide values in the middle are what takes the memory."""
    h = checkpoint_name(F.layer_norm(x, x.shape[-1:]) @ up, "wide")
    return x + F.gelu(h).sin() @ down


def memory() -> None:
    """Keep less, compute more: the gradient is the same, and so is the code of the network."""
    weights = [(torch.randn(64, 256) / 8, torch.randn(256, 64) / 16) for _ in range(8)]
    x = torch.randn(1024, 64)
    named = checkpoint_policies.save_only_these_names("wide")
    print("4. A gradient through 8 blocks of 1024 x 64 values (0.25 MiB), 1024 x 256 in the middle")
    blocks = {
        "no checkpoint": block,
        'keep "wide"': checkpoint(block, policy=named),
        "keep matrix products": checkpoint(block, policy=checkpoint_policies.dots_saveable),
        "keep the arguments": checkpoint(block),
    }
    expected = grad(network(block))(weights, x)
    for name, one in blocks.items():
        loss = network(one)
        kept = sum(residual.bytes for residual in saved_residuals(loss, weights, x)) / 2**20
        peak = peak_memory(partial(grad(loss), weights, x)) / 2**20
        print(f"   {name:21} {kept:5.1f} MiB kept, {peak:5.1f} MiB at the peak")
        for pair in zip(grad(loss)(weights, x), expected, strict=True):
            for ours, plain in zip(*pair, strict=True):
                check(ours, plain)
    for name in ("no checkpoint", 'keep "wide"'):
        print(f"\n   one block, {name}:")
        print_saved_residuals(lambda x, name=name: blocks[name](x, *weights[0]), x)


def network(one: Callable[..., Tensor]) -> Callable[[Weights, Tensor], Tensor]:
    """The loss of blocks in a row."""

    def loss(weights: Weights, x: Tensor) -> Tensor:
        for up, down in weights:
            x = one(x, up, down)
        return x.square().mean()

    return loss


def peak_memory(thunk: Callable[[], object]) -> int:
    """The most bytes that `thunk` holds at once, from torch's log of allocations and releases."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        thunk()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(accumulate(size for _, size in changes))


# What the sections share -------------------------------------------------------------------------


def rounded(x: Tensor) -> list[float]:
    """Numbers to print."""
    return [round(value, 4) for value in x.tolist()]


def check(actual: Tensor, expected: Tensor) -> None:
    """Ends the program if two tensors are not close."""
    torch.testing.assert_close(actual, expected)


if __name__ == "__main__":
    torch.manual_seed(0)
    for section in (formulas, fixed_points, newton, memory):
        section()
