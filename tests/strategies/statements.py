"""Programs of random statements.

Every statement is run once while the program is written, so that shapes are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from tests.strategies.expressions import ALONG, BINARY, REDUCTIONS, UNARY
from tests.strategies.program import GLOBALS, Program, constant
from tests.strategies.shapes import shapes

LARGEST = 36  # elements of any value in a program
TAME = 2.5  # an operand larger than this is squashed first


@dataclass
class _Writer:
    """A program being written; every statement is run once, so that shapes are known."""

    draw: Callable
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    fills: bool
    scope: dict = field(default_factory=lambda: dict(GLOBALS))
    names: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scope |= {"x": constant(-1, self.x_shape), "y": constant(-2, self.y_shape)}
        self.names += ["x", "y"]

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one_of(self, options):
        return self.draw(st.sampled_from(options))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.scope[name].shape)

    def tame(self, name: str) -> str:
        value = self.scope[name]
        return name if value.abs().max() < TAME else f"torch.tanh({name})"

    def pick(self, where: Callable[[tuple[int, ...]], bool] = lambda _: True) -> str | None:
        """A value to work on, the latest one first in line; None where no value fits."""
        fitting = [name for name in self.names if where(self.shape(name))]
        return self.one_of(fitting[::-1]) if fitting else None

    def capture(self, kind: str, *args: object) -> str:
        name = f"c{len(self.constants)}"
        text = f"{kind}({len(self.constants)}, {', '.join(map(repr, args))})"
        self.constants.append(f"{name} = {text}")
        self.scope[name] = eval(text, self.scope)
        return name

    def dim(self, shape: tuple[int, ...]) -> int:
        return self.integer(-len(shape), len(shape) - 1)

    def emit(self, *block: str) -> bool:
        """Appends statements of which the last assigns `t`; False where the value is too large."""
        scope = dict(self.scope)
        name = f"v{len(self.names) - 2}"
        block = tuple(line.replace("t@", name) for line in block)
        exec("\n".join(block), scope)
        if not 0 < scope[name].numel() <= LARGEST or scope[name].ndim > 4:
            return False
        self.scope = scope
        self.lines += block
        self.names.append(name)
        return True


def _unary(w: _Writer) -> bool:
    name = w.pick()
    return w.emit("t@ = " + w.one_of(UNARY).format(a=w.tame(name)))


def _binary(w: _Writer) -> bool:
    a = w.pick()
    b = w.pick(lambda s: _broadcasts(s, w.shape(a)))
    return w.emit("t@ = " + w.one_of(BINARY).format(a=w.tame(a), b=w.tame(b)))


def _along(w: _Writer) -> bool:
    name = w.pick(lambda s: len(s) > 0)
    if name is None:
        return False
    return w.emit("t@ = " + w.one_of(ALONG).format(a=w.tame(name), dim=w.dim(w.shape(name))))


def _reduction(w: _Writer) -> bool:
    name = w.pick()
    shape = w.shape(name)
    if not shape or w.integer(0, 3) == 0:
        return w.emit(f"t@ = {w.tame(name)}.{w.one_of(('sum', 'mean'))}()")
    keepdim = w.one_of((False, True))
    text = w.one_of(REDUCTIONS)
    dim = w.dim(shape)
    if len(shape) > 1 and "prod" not in text and w.integer(0, 3) == 0:
        dim = (0, -1)
    return w.emit("t@ = " + text.format(a=w.tame(name), dim=dim, keepdim=keepdim))


def _matmul(w: _Writer) -> bool:
    name = w.pick(lambda s: len(s) > 0)
    if name is None:
        return False
    a, shape, width = w.tame(name), w.shape(name), w.integer(1, 3)
    kind = w.integer(0, 7)
    if kind == 0:
        return w.emit(f"t@ = {a} @ {w.capture('constant', (shape[-1], width))}")
    if kind == 1:
        weight = w.capture("constant", (width, shape[-1]))
        return w.emit(f"t@ = F.linear({a}, {weight}, {w.capture('constant', (width,))})")
    if kind == 2:
        return w.emit(
            f"t@ = torch.einsum('...i,ij->...j', {a}, {w.capture('constant', (shape[-1], width))})"
        )
    if kind == 3:
        return w.emit(f"t@ = F.layer_norm({a}, ({shape[-1]},), eps=0.5)")
    if kind == 4:
        return w.emit(f"t@ = {a} @ {w.capture('constant', (shape[-1],))}")
    if len(shape) == 1:
        other = w.tame(w.pick(lambda s: len(s) == 1))
        if kind == 5 and w.shape(name) == tuple(w.scope[other].shape if other in w.scope else ()):
            return w.emit(f"t@ = torch.dot({a}, {other})")
        return w.emit(f"t@ = torch.outer({a}, {other})")
    if kind == 5:
        return w.emit(f"t@ = {a} @ {a}.mT")
    if kind == 6:
        return w.emit(f"t@ = torch.einsum('...ij,...ik->...jk', {a}, {a}.cos())")
    return w.emit(f"t@ = {w.capture('constant', (width, shape[-2]))} @ {a}")


def _view(w: _Writer) -> bool:
    name = w.pick()
    a, shape = name, w.shape(name)
    kind = w.integer(0, 9)
    if not shape or kind == 0:
        return w.emit(f"t@ = {a}.unsqueeze({w.integer(-len(shape) - 1, len(shape))})")
    dim = w.dim(shape)
    size = shape[dim]
    if kind == 1:
        return w.emit(f"t@ = {a}.transpose({dim}, {w.dim(shape)})")
    if kind == 2:
        return w.emit(f"t@ = {a}.reshape({w.one_of(_factorings(math.prod(shape)))})")
    if kind == 3:
        return w.emit(f"t@ = {a}.select({dim}, {w.integer(-size, size - 1)})")
    if kind == 4:
        start = w.integer(0, size - 1)
        return w.emit(f"t@ = {a}.narrow({dim}, {start}, {w.integer(1, size - start)})")
    if kind == 5:
        return w.emit(f"t@ = {a}[..., {w.one_of(('::2', '-1', 'None', '1:', '-1:'))}]")
    if kind == 6:
        return w.emit(f"t@ = {a}.expand(2, {', '.join('-1' for _ in shape)})")
    if kind == 7:
        return w.emit(f"t@ = {a}.movedim({dim}, {w.dim(shape)})")
    if kind == 8 and len(shape) > 1:
        return w.emit(f"t@ = {a}.diagonal(0, 0, -1)")
    if kind == 9 and size == 1:
        return w.emit(f"t@ = {a}.squeeze({dim})")
    return w.emit(f"t@ = torch.stack({a}.unbind({dim})[::-1], {dim})")


def _join(w: _Writer) -> bool:
    a = w.pick()
    b = w.pick(lambda s: s == w.shape(a))
    if w.shape(a) and w.integer(0, 1):
        parts = w.one_of((f"{a}, {b}", f"{a}, {b}.sin()", f"{b}, {a}[:1]"))
        dim = 0 if "[:1]" in parts else w.dim(w.shape(a))
        return w.emit(f"t@ = torch.cat([{parts}], {dim})")
    dim = w.integer(-len(w.shape(a)) - 1, len(w.shape(a)))
    return w.emit(f"t@ = torch.stack([{a}, {b}.cos()], {dim})")


def _indexing(w: _Writer) -> bool:
    name = w.pick(lambda s: len(s) > 0)
    if name is None:
        return False
    shape = w.shape(name)
    dim = w.dim(shape)
    size = shape[dim]
    kind = w.integer(0, 6)
    if kind == 0:
        ids = w.capture("index", (2,), size)
        return w.emit(f"t@ = torch.index_select({name}, {dim}, {ids})")
    if kind == 1:
        return w.emit(f"t@ = {name}.gather({dim}, {w.capture('index', shape, size)})")
    if kind == 2:
        return w.emit(f"t@ = {name}[{w.capture('index', (2,), shape[0])}]")
    if kind == 3:
        return w.emit(f"t@ = {name}[..., {w.capture('index', (3,), shape[-1])}]")
    if kind == 4:
        ids = w.capture("index", shape, size)
        return w.emit(f"t@ = torch.scatter_add({name}, {dim}, {ids}, {name}.sin())")
    if kind == 5:
        return w.emit(f"t@ = {name}.masked_fill({w.capture('mask', shape)}, 0.5)")
    ids = w.capture("index", (size,), size)
    return w.emit(f"t@ = torch.index_add({name}, {dim}, {ids}, {name}.cos())")


def _inplace(w: _Writer) -> bool:
    """Writes to a tensor made on the spot: whole, through an index, through a view."""
    name = w.pick()
    a, shape = w.tame(name), w.shape(name)
    b = w.pick(lambda s: _broadcasts_to(s, shape))
    b = w.tame(b)
    kind = w.integer(0, 10 if shape else 3)
    if kind == 0:
        return w.emit(f"t@ = {a}.clone()", f"t@.mul_({b})")
    if kind == 1:
        return w.emit(f"t@ = {a} * 1", f"t@.add_({b}, alpha=0.5)", "t@ /= 1.5")
    if kind == 2:
        return w.emit(f"t@ = torch.zeros_like({a})", f"t@.copy_({b})", f"t@.sub_({a}.sin())")
    if kind == 3:
        return w.emit(f"t@ = {a}.clone()", f"t@[...] = {b} * {a}")
    dim = w.dim(shape)
    at = w.integer(0, shape[dim] - 1)
    if kind == 4:
        return w.emit(f"t@ = {a}.clone()", f"t@.select({dim}, {at}).zero_()")
    if kind == 5:
        view = f"select({dim}, {at})"
        return w.emit(f"t@ = {a}.clone()", f"t@.{view}.mul_({a}.cos().{view}).add_(0.25)")
    if kind == 6:
        return w.emit(f"t@ = {a}.clone()", "u = t@[..., :1]", "u.sin_()", f"t@.mul_({b})")
    if kind == 7:
        return w.emit(
            f"t@ = {a}.clone()", f"u = t@.transpose(0, {dim})", "t@.sin_()", "u.mul_(0.5)"
        )
    if kind == 8:
        return w.emit(f"t@ = {a}.clone()", f"t@.masked_fill_({w.capture('mask', shape)}, 0.4)")
    if kind == 9:
        return w.emit(
            f"u = {a}.clone()", f"t@ = u.transpose(0, {dim})", f"u.add_({b})", "t@[0].mul_(2.0)"
        )
    # One index only: where indices repeat, PyTorch's pullback is not that of "the last one wins".
    ids = w.capture("index", (1,), shape[0])
    return w.emit(f"t@ = {a}.clone()", f"t@[{ids}] = {a}.sin()[{ids}]")


def _fill(w: _Writer) -> bool:
    """Fills a factory's tensor with computed values, entry by entry or through views."""
    name = w.pick()
    a, shape = w.tame(name), w.shape(name)
    fresh = f"torch.zeros({shape}, dtype=torch.float64)"
    kind = w.integer(0, 4 if shape else 1)
    if kind == 0:
        return w.emit(f"t@ = {fresh}", f"t@[...] = {a}")
    if kind == 1:
        return w.emit(f"t@ = {fresh}", f"t@.add_({a}.sin()).mul_({a})")
    if kind == 2:
        return w.emit(f"t@ = {fresh}", f"for i in range({shape[0]}): t@[i] = {a}[i].sin()")
    if kind == 3:
        return w.emit(f"t@ = {fresh}", "u = t@[..., :1]", f"u.copy_({a}[..., :1])")
    return w.emit(
        f"u = {fresh}", f"t@ = u.transpose(0, {w.dim(shape)})", f"u[0] = {a}[0]", "u.mul_(1.5)"
    )


_STEPS = (
    _unary,
    _unary,
    _binary,
    _binary,
    _along,
    _reduction,
    _matmul,
    _view,
    _join,
    _indexing,
    _inplace,
)


@st.composite
def programs(draw: Callable, fills: bool = False, max_steps: int = 8) -> Program:
    """Draws a program of 3 to `max_steps` steps.

    Args:
        draw: given by hypothesis.
        fills: whether the program also writes computed values into the tensors of factories.
        max_steps: the largest number of steps.
    """
    argument_shapes = shapes(max_ndim=2, min_size=1, max_size=3)
    x_shape = draw(argument_shapes)
    y_shape = x_shape if draw(st.booleans()) else draw(argument_shapes)
    w = _Writer(draw, x_shape, y_shape, fills)
    if fills:
        _fill(w)
    w.emit("t@ = " + w.one_of(UNARY).format(a="x"))
    steps = (*_STEPS, _fill) if fills else _STEPS
    for _ in range(draw(st.integers(2, max_steps - 1))):
        step = draw(st.sampled_from(steps))
        if not step(w):
            _unary(w)
    result = w.names[-1]
    if not w.shape(result) or math.prod(w.shape(result)) > 6:
        w.emit(f"t@ = {w.tame(result)}.sum(-1)" if w.shape(result) else f"t@ = {result}.sin()")
        result = w.names[-1]
    return Program(
        x_shape,
        y_shape,
        w.shape(result),
        tuple(w.constants),
        (*w.lines, f"return {w.tame(result)}"),
    )


def _broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(
        m == n or 1 in (m, n) for m, n in zip(reversed(a), reversed(b), strict=False)
    )  # the longer shape's extra dims always fit


def _broadcasts_to(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return _broadcasts(a, b) and torch.broadcast_shapes(a, b) == torch.Size(b)


def _factorings(numel: int) -> list[tuple[int, ...]]:
    pairs = [(k, numel // k) for k in range(1, numel + 1) if numel % k == 0]
    return [(-1,), (numel,), *pairs]
