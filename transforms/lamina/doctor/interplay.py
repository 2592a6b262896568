"""Checks of Lamina together with the parts of PyTorch that look beneath its surface."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from lamina.autodiff.api import grad, jvp
from lamina.batching.api import vmap
from lamina.checkpointing.rematerialise import checkpoint
from lamina.custom.batching import custom_vmap
from lamina.custom.jvp import custom_jvp
from lamina.custom.vjp import custom_vjp
from lamina.doctor.checks import Kit, WrongAnswerError, check
from lamina.extending.batching import batching_rule
from lamina.extending.derivatives import pointwise
from lamina.extending.everywhere import temporary_rules
from lamina.jacobians.api import jacrev
from lamina_core.errors import MutationError, RandomnessError

__all__: list[str] = []

Tensor = torch.Tensor


def _slopes(function: Any, xs: Tensor) -> Tensor:
    """PyTorch's own gradient of each example."""
    leaves = [x.clone().requires_grad_() for x in xs]
    return torch.stack([torch.autograd.grad(function(leaf), leaf)[0] for leaf in leaves])


# -- functions with rules of their own -------------------------------------------------------------


@check("custom_vjp")
def _custom_vjp(kit: Kit) -> None:
    @custom_vjp
    def f(x: Tensor) -> Tensor:
        return x.sin()

    f.defvjp(lambda x: (x.sin(), x), lambda x, ct: (5 * ct * x,))
    xs = kit.numbers(4, 3)
    kit.close(grad(lambda x: f(x).sum())(xs), 5 * xs, "grad of a custom_vjp")
    kit.close(vmap(grad(lambda x: f(x).sum()))(xs), 5 * xs, "vmap(grad) of a custom_vjp")
    kit.close(jvp(f, (xs,), (xs,))[1], 5 * xs * xs, "jvp of a custom_vjp")
    leaf = xs.clone().requires_grad_()
    f(leaf).sum().backward()
    kit.close(leaf.grad, 5 * xs, "backward() through a custom_vjp")


@check("custom_jvp")
def _custom_jvp(kit: Kit) -> None:
    @custom_jvp
    def f(x: Tensor) -> Tensor:
        return x.sin()

    @f.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return f(*primals), 5 * tangents[0] * primals[0]

    xs = kit.numbers(4, 3)
    kit.close(jvp(f, (xs,), (xs,))[1], 5 * xs * xs, "jvp of a custom_jvp")
    kit.close(vmap(grad(lambda x: f(x).sum()))(xs), 5 * xs, "vmap(grad) of a custom_jvp")
    second = grad(lambda x: grad(lambda x: f(x).sum())(x).sum())(xs)
    kit.close(second, torch.full_like(xs, 5), "grad(grad) of a custom_jvp")


@check("custom_vmap")
def _custom_vmap(kit: Kit) -> None:
    @custom_vmap
    def f(x: Tensor) -> Tensor:
        return x.sin()

    @f.def_vmap
    def _(size: int, in_batched: Any, x: Tensor) -> Any:
        return 5 * x.sin(), in_batched[0]

    xs = kit.numbers(4, 3)
    kit.close(f(xs), xs.sin(), "a custom_vmap without vmap")
    kit.close(vmap(f)(xs), 5 * xs.sin(), "vmap of a custom_vmap")
    kit.close(vmap(grad(lambda x: f(x).sum()))(xs), 5 * xs.cos(), "vmap(grad) of a custom_vmap")


class _OneStep(torch.autograd.Function):
    """sin, with a gradient that nobody would guess."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 5 * cts[0] * x


class _TwoSteps(torch.autograd.Function):
    @staticmethod
    def forward(x: Any) -> Any:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 5 * cts[0] * x

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 5 * tangents[0] * x


@check("autograd.Function", quick=True)
def _functions(kit: Kit) -> None:
    xs = kit.numbers(4, 3)
    for name, cls in {"ctx in forward": _OneStep, "setup_context": _TwoSteps}.items():
        apply = cls.apply
        form = f"an autograd.Function with {name}"
        kit.close(grad(lambda x: apply(x).sum())(xs), 5 * xs, f"grad of {form}")  # noqa: B023
        each = vmap(grad(lambda x: apply(x).sum()))(xs)  # noqa: B023
        kit.close(each, 5 * xs, f"vmap(grad) of {form}")
        kit.close(vmap(apply)(xs), xs.sin(), f"vmap of {form}")
        kit.close(jvp(apply, (xs,), (xs,))[1], 5 * xs * xs, f"jvp of {form}")
        leaf = xs.clone().requires_grad_()
        vmap(apply)(leaf).sum().backward()
        kit.close(leaf.grad, 5 * xs, f"backward() through vmap of {form}")


# -- what is kept for the backward pass ------------------------------------------------------------


def _deep(x: Tensor) -> Tensor:
    return x.sin().cos() * x


@check("checkpoints")
def _checkpoints(kit: Kit) -> None:
    xs = kit.numbers(4, 3)
    plain = _slopes(lambda x: _deep(_deep(x)).sum(), xs)
    runs: list[int] = []

    def part(x: Tensor) -> Tensor:
        runs.append(1)
        return _deep(x)

    def through_torch(x: Tensor) -> Tensor:
        first = torch_checkpoint(part, x, use_reentrant=False)
        return torch_checkpoint(part, first, use_reentrant=False).sum()

    def through_lamina(x: Tensor) -> Tensor:
        return checkpoint(part)(checkpoint(part)(x)).sum()

    for name, f in {"torch": through_torch, "lamina": through_lamina}.items():
        runs.clear()
        kit.close(vmap(grad(f))(xs), plain, f"vmap(grad) through {name}'s checkpoint")
        if len(runs) != 4:
            raise WrongAnswerError(f"{name}'s checkpoint of 2 parts ran {len(runs)}, not 4 times")
        kit.close(grad(lambda xs: vmap(f)(xs).sum())(xs), plain, f"grad(vmap) with {name}'s")  # noqa: B023


@check("saved-tensor hooks")
def _hooks(kit: Kit) -> None:
    xs = kit.numbers(4, 3)
    plain = _slopes(lambda x: _deep(x).sum(), xs)
    packed: list[Tensor] = []

    def pack(x: Tensor) -> int:
        packed.append(x)
        return len(packed) - 1

    def f(x: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, lambda i: packed[i]):
            return _deep(x).sum()

    kit.close(vmap(grad(f))(xs), plain, "vmap(grad) with hooks that store what is saved")
    if not packed:
        raise WrongAnswerError("saved-tensor hooks saw nothing")


@check("captured parameters and backward()", quick=True)
def _captured(kit: Kit) -> None:
    xs, w = kit.numbers(4, 3), kit.numbers(3, seed=1).requires_grad_()
    vmap(lambda x: (x * w).sin().sum())(xs).sum().backward()
    kit.close(w.grad, ((xs * w).cos() * xs).sum(0).detach(), "backward() through vmap")
    w.grad = None
    grad(lambda x: ((x * w) ** 3).sum())(xs).sum().backward()
    kit.close(w.grad, (9 * xs**2 * w**2).sum(0).detach(), "backward() through grad")
    w.grad = None
    jvp(lambda x: (x * w) ** 2, (xs,), (xs,))[1].sum().backward()
    kit.close(w.grad, (4 * xs**2 * w).sum(0).detach(), "backward() through jvp")


@check("no_grad and detach")
def _no_grad(kit: Kit) -> None:
    x = kit.numbers(3)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = x * 3
        return (x * constant + x * x.detach()).sum()

    kit.close(grad(f)(x), 4 * x, "grad with no_grad and detach inside")
    kit.close(jvp(lambda x: x * x.detach(), (x,), (x,))[1], x * x, "jvp with detach inside")


# -- writes ----------------------------------------------------------------------------------------


@check("in-place writes", quick=True)
def _writes(kit: Kit) -> None:
    def running_maximum(x: Tensor) -> Tensor:
        out = torch.zeros(5, dtype=kit.dtype, device=kit.device)
        out[0] = x[0]
        for i in range(1, 5):
            out[i] = torch.maximum(out[i - 1], x[i])
        return out

    def through_views(x: Tensor) -> Tensor:
        y = x.clone()
        head, tail = y[:2], y[2:]
        head.mul_(tail[:2])
        y.add_(1)
        tail.sin_()
        return y.exp() * head.sum()

    def plain(x: Tensor) -> Tensor:
        head, tail = x[:2] * x[2:4] + 1, (x[2:] + 1).sin()
        return torch.cat([head, tail]).exp() * head.sum()

    xs = kit.numbers(4, 5)
    kit.close(vmap(running_maximum)(xs), xs.cummax(1).values, "vmap of a running maximum")
    right = torch.stack([plain(x) for x in xs])
    kit.close(vmap(through_views)(xs), right, "vmap of writes through views")
    found = vmap(grad(lambda x: through_views(x).sum()))(xs)
    slopes = _slopes(lambda x: plain(x).sum(), xs)
    kit.close(found, slopes, "vmap(grad) of writes")
    pushed = jvp(through_views, (xs[0],), (xs[1],))[1]
    kit.close(pushed.sum(), (slopes[0] * xs[1]).sum(), "jvp of writes through views")


@check("writes to arguments and captured tensors")
def _writes_outside(kit: Kit) -> None:
    xs, total = kit.numbers(4, 3), kit.numbers(3)
    given = xs.clone()
    kit.close(vmap(lambda x: x.mul_(2))(given), xs * 2, "what a write in a mapped function gives")
    kit.close(given, xs * 2, "an argument that a mapped function writes to")
    call = vmap(lambda x: total.add_(x))
    kit.raises(MutationError, lambda: call(xs), "a batch of values written to one captured tensor")
    statistics = nn.BatchNorm1d(3, dtype=kit.dtype, device=kit.device)
    slope = grad(lambda x: statistics(x).sum() + x.sum())(xs)
    kit.close(slope, torch.ones_like(xs), "grad of batch norm, which centres")
    kit.close(statistics.running_mean, 0.1 * xs.mean(0), "running statistics under grad")


# -- randomness, casts, threads --------------------------------------------------------------------


@check("randomness")
def _randomness(kit: Kit) -> None:
    xs = kit.numbers(4, 3)

    def noisy(x: Tensor) -> Tensor:
        return x + torch.randn(3, dtype=kit.dtype, device=kit.device)

    kit.raises(RandomnessError, lambda: vmap(noisy)(xs), "a draw under vmap")
    torch.manual_seed(0)
    different = vmap(noisy, randomness="different")(xs)
    torch.manual_seed(0)
    right = xs + torch.randn(4, 3, dtype=kit.dtype, device=kit.device)
    kit.close(different, right, "a draw per example")
    torch.manual_seed(0)
    same = vmap(noisy, randomness="same")(xs)
    torch.manual_seed(0)
    right = xs + torch.randn(3, dtype=kit.dtype, device=kit.device)
    kit.close(same, right, "one draw for all examples")
    torch.manual_seed(0)
    chunked = vmap(noisy, randomness="different", chunk_size=3)(xs)
    kit.close(chunked, different, "a draw per example, in chunks")
    torch.manual_seed(0)
    slope = grad(lambda x: F.dropout(x, 0.5).sum())(xs)
    torch.manual_seed(0)
    kit.close(slope, F.dropout(torch.ones_like(xs), 0.5), "grad of dropout")


@check("autocast")
def _autocast(kit: Kit) -> None:
    kind, low = kit.device.type, torch.bfloat16
    w, xs = kit.numbers(5, 3).float(), kit.numbers(4, 3).float()
    if kind not in ("cpu", "cuda"):
        return
    with torch.autocast(kind, low):
        eager = F.linear(xs, w)
        mapped = vmap(F.linear, (0, None))(xs, w)
        slope = grad(lambda w: F.linear(xs, w).float().square().sum())(w)
        inside = vmap(grad(lambda x, w: F.linear(x, w).float().sum(), 1), (0, None))(xs, w)
    kit.close(mapped, eager, "vmap of a linear layer under autocast")
    leaf = w.clone().requires_grad_()
    with torch.autocast(kind, low):
        loss = F.linear(xs, leaf).float().square().sum()
    kit.close(slope, torch.autograd.grad(loss, leaf)[0], "grad of a linear layer under autocast")
    right = xs.to(low).float()[:, None].expand(4, 5, 3)
    kit.close(inside, right, "vmap(grad) of a linear layer under autocast")


@check("half precision")
def _half(kit: Kit) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        xs = kit.numbers(4, 3).to(dtype)
        found = vmap(grad(lambda x: (x * x).float().sum()))(xs)
        kit.close(found, 2 * xs, f"vmap(grad) in {dtype}")
        kit.close(jvp(lambda x: x * 2, (xs,), (xs,))[1], 2 * xs, f"jvp in {dtype}")


@check("complex numbers")
def _complex(kit: Kit) -> None:
    if kit.dtype is torch.float32:
        return
    z = torch.complex(kit.numbers(4), kit.numbers(4, seed=1))
    # PyTorch's convention: the conjugate of the gradient, so that z - grad descends.
    kit.close(grad(lambda z: (z * z.conj()).real.sum())(z), 2 * z, "grad of |z|^2")
    kit.close(jacrev(lambda z: z**2, holomorphic=True)(z), torch.diag(2 * z), "jacrev of z^2")
    kit.close(vmap(lambda z: torch.conj(z) * 1j)(z), torch.conj(z) * 1j, "vmap of a conjugate")


# -- ops of the user -------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("lamina_doctor", "DEF")
_LIBRARY.define("smoothed(Tensor x) -> Tensor")
_LIBRARY.impl("smoothed", lambda x: torch.sqrt(x * x + 1), "CompositeExplicitAutograd")


@check("rules for ops of the user")
def _ops(kit: Kit) -> None:
    op = torch.ops.lamina_doctor.smoothed.default
    xs = kit.numbers(4, 3)
    with temporary_rules():

        @batching_rule(op)
        def rule(info: Any, in_dims: Any, x: Any) -> Any:
            return op(x), in_dims[0]

        pointwise(op, lambda t, x, out: t * x / out)
        right = xs / (xs * xs + 1).sqrt()
        kit.close(vmap(op, 1, 1)(xs), (xs * xs + 1).sqrt(), "vmap of an op with a rule")
        kit.close(vmap(grad(lambda x: op(x).sum()))(xs), right, "vmap(grad) of an op with rules")
        kit.close(jvp(op, (xs,), (xs,))[1], right * xs, "jvp of an op with a declared derivative")
