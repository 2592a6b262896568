"""What `import lamina` tries: that the hooks into torch's private parts lead where they have to.

Each proof is a program of a few ops whose answer is known. Where a hook is not reached torch raises
no error: an `autograd.Function` would be differentiated through its forward, and its gradient be
wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lamina.autodiff.api import grad, jvp, vjp
from lamina.batching.api import vmap
from lamina_core.errors import LaminaError
from lamina_core.level import stand_in
from lamina_core.mode import thread_mode
from lamina_core.torch_hooks.doors import proof
from lamina_core.torch_hooks.functions import USUAL_APPLY, original_apply
from lamina_core.torch_hooks.keys import excluded_keys, included_keys
from lamina_core.torch_hooks.modes import mode_count

__all__: list[str] = []

# On the CPU in double precision, whatever the defaults of the process are.
_TWO = {"device": "cpu", "dtype": torch.float64}


def _ones(*shape: int) -> Any:
    return torch.ones(shape, **_TWO)  # type: ignore[call-overload]


def _expect(actual: Any, expected: Any, what: str) -> None:
    if isinstance(actual, torch.Tensor):
        actual = actual.tolist()
    if actual != expected:
        raise AssertionError(f"{what}: {actual} where {expected} is right")


@proof("dispatch modes", "every op of user code reaches Python, composite ones whole")
def _modes() -> None:
    seen: list[str] = []

    def watched_linear(x: Any) -> Any:
        level: Any = thread_mode().top
        usual = level.process

        def process(op: Any, args: Any, kwargs: Any) -> Any:
            seen.append(str(op))
            return usual(op, args, kwargs)

        with stand_in(level, process):
            return F.linear(x, w)

    w = _ones(1, 2)
    vmap(watched_linear)(_ones(3, 2))
    _expect(seen, ["aten.linear.default"], "what F.linear under vmap was seen as")


@proof("dispatch keys", "the caller's autograd follows captured parameters")
def _keys() -> None:
    before = str(included_keys()), str(excluded_keys()), mode_count()
    w = _ones(2).requires_grad_()
    vmap(lambda x: (x * w).sum())(_ones(3, 2)).sum().backward()
    _expect(w.grad, [3.0, 3.0], "backward() to a parameter that a mapped function captures")
    after = str(included_keys()), str(excluded_keys()), mode_count()
    _expect(after, before, "the dispatch keys and modes after a transform")


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        return cts[0] * 2


@proof("wrappers in rules", "ops on wrappers find their level where no mode is on", when="nesting")
def _wrappers() -> None:
    _expect(vmap(grad(lambda x: x**3))(2 * _ones(2)), [12.0, 12.0], "vmap(grad) of a cube")
    _expect(grad(grad(lambda x: x**3))(2 * _ones()), 12.0, "grad(grad) of a cube")
    _expect(jvp(lambda x: x**3, (_ones(),), (_ones(),))[1], 3.0, "jvp of a cube")
    transposed = jvp(_Twice.apply, (_ones(),), (_ones(),))[1]
    _expect(transposed, 2.0, "jvp of a torch.autograd.Function, by its backward")


@proof("lazy conjugates", "an op in a handler sees that a plain tensor is a lazy conjugate")
def _conjugates() -> None:
    z = torch.tensor([1j, 2j], device="cpu", dtype=torch.complex128)
    _expect(vmap(lambda x: torch.conj(x) * 1j)(z), [1 + 0j, 2 + 0j], "a lazy conjugate times i")


class _Through(torch.autograd.Function):
    """A straight-through estimator: rounds, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *cts: Any) -> Any:
        return cts[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]


class _ThroughInTwoSteps(_Through):
    @staticmethod
    def forward(x: Any) -> Any:  # type: ignore[override]
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


@proof("torch.autograd.Function", "functions with a backward of their own keep it, in every form")
def _functions() -> None:
    x = 0.4 * _ones(2)
    for cls in (_Through, _ThroughInTwoSteps):
        stored = USUAL_APPLY.__get__(None, cls)  # as code has it that ran before ours
        calls = {"Fn.apply": cls.apply, "an apply stored earlier": stored}
        for how, apply in calls.items():
            _expect(vjp(apply, x)[1](x)[0], x.tolist(), f"vjp of a straight-through {how}")
            _expect(vmap(apply)(x), [0.0, 0.0], f"vmap of a straight-through {how}")
            _expect(jvp(apply, (x,), (x,))[1], x.tolist(), f"jvp of a straight-through {how}")
        _expect(original_apply(cls, x), [0.0, 0.0], "apply outside the transforms")


@proof("saved-tensor hooks", "hooks see what is kept for the backward pass, and give it back")
def _saved() -> None:
    packed: list[Any] = []

    def pack(tensor: Any) -> Any:
        packed.append(tensor)
        return tensor

    def loss(x: Any) -> Any:
        with saved_tensors_hooks(pack, lambda tensor: tensor * 2):
            return x * x

    _expect(grad(loss)(_ones()), 4.0, "grad through hooks that double what was saved")
    if not packed or any(type(tensor) is not torch.Tensor for tensor in packed):
        raise AssertionError(f"the hooks were given {[type(t).__name__ for t in packed]}")


@proof("torch.utils.checkpoint", "a checkpoint runs its function again", when="checkpoint")
def _checkpoints() -> None:
    runs: list[int] = []

    def part(x: Any) -> Any:
        runs.append(1)
        return x.sin().cos()

    plain = grad(lambda x: x.sin().cos())(_ones())
    for reentrant in (False, True):
        runs.clear()
        again = grad(lambda x, r=reentrant: checkpoint(part, x, use_reentrant=r))(_ones())
        _expect(again, plain.tolist(), f"grad through a checkpoint, use_reentrant={reentrant}")
        _expect(len(runs), 2, f"runs of a checkpointed function, use_reentrant={reentrant}")


@proof("autocast", "casts happen inside the transforms as outside")
def _autocast() -> None:
    x, w = torch.ones(2, 3, device="cpu"), torch.ones(4, 3, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for f in (F.linear, lambda x, w: torch.einsum("i,ji->j", x, w)):
            out = vmap(f, (0, None))(x.float(), w.float())
            _expect(out.dtype, torch.bfloat16, "the dtype of a mapped product under autocast")


@proof("the engine of autograd", "torch.autograd.grad on a tensor of a transform is a clear error")
def _engine() -> None:
    def inner(x: Any) -> Any:
        y = x * x
        torch.autograd.grad(y, x)
        return y

    try:
        grad(inner)(_ones())
    except LaminaError:
        return
    raise AssertionError("torch.autograd.grad on a tensor of a transform raised nothing of ours")


@proof("memory", "the memory of a wrapper, which has none, is never handed out")
def _memory() -> None:
    def export(x: Any) -> Any:
        x.__dlpack__()
        return x

    try:
        vmap(export)(_ones(2))
    except LaminaError:
        return
    raise AssertionError("a wrapper was exported by DLPack")


@proof("indices without dims", "an index that differs between examples is seen by a plain tensor")
def _indices() -> None:
    table, numbers = torch.arange(3, device="cpu"), torch.tensor([2, 0], device="cpu")
    _expect(
        vmap(lambda i: table[i])(numbers), [2, 0], "a captured table at a number of each example"
    )
