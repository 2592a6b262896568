"""Hypothesis strategies: shapes, dtypes, batch dims, random programs, stacks of transforms.

A `Program` is a straight line of PyTorch statements over two float64 arguments. It is kept as
source text, so that a failing example prints as code that can be pasted and run. A stack is a
tuple of transforms, innermost first; each takes a function ``f(x, y) -> tensor`` to another one
of the same signature, so any sequence of them is well formed.

Programs are tame (values are squashed as soon as they grow) and smooth almost everywhere, so
that derivatives of the fourth order can be compared in float64.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

# ---------------------------------------------------------------------------------------------
# Shapes, dtypes, batch dims
# ---------------------------------------------------------------------------------------------

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex128, torch.complex64)


def shapes(
    min_ndim: int = 0, max_ndim: int = 4, min_size: int = 0, max_size: int = 4
) -> st.SearchStrategy[tuple[int, ...]]:
    """Draws a shape; sizes 0 and 1 and the 0-d shape are included by default."""
    sizes = st.integers(min_size, max_size)
    return st.lists(sizes, min_size=min_ndim, max_size=max_ndim).map(tuple)


def dtypes(*kinds: tuple[torch.dtype, ...]) -> st.SearchStrategy[torch.dtype]:
    """Draws a dtype of the given kinds (all kinds by default)."""
    kinds = kinds or (FLOATS, INTEGERS, COMPLEX, (torch.bool,))
    return st.sampled_from([dtype for kind in kinds for dtype in kind])


def batch_dims(ndim: int) -> st.SearchStrategy[int]:
    """Draws where a batch dim may sit in a tensor of `ndim` logical dims; negative ones too."""
    return st.integers(-(ndim + 1), ndim)


def insert_dim(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """The shape with one more dim of `size` at `dim`, which counts in the result."""
    dim %= len(shape) + 1
    return (*shape[:dim], size, *shape[dim:])


# ---------------------------------------------------------------------------------------------
# What the text of a program may refer to
# ---------------------------------------------------------------------------------------------


def constant(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A float64 tensor that a program captures."""
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def index(seed: int, shape: tuple[int, ...], high: int) -> torch.Tensor:
    """An int64 tensor of values in [0, high) that a program captures."""
    return torch.randint(high, shape, generator=_generator(seed))


def mask(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A bool tensor that a program captures."""
    return torch.rand(shape, generator=_generator(seed)) > 0.4


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


class _PlainF:
    """`torch.nn.functional`, with compositions in place of wrong formulas.

    PyTorch's derivatives of layer_norm are wrong from the third order on: its double backward
    takes the mean and the variance for constants.
    """

    def __getattr__(self, name: str) -> Callable:
        return getattr(F, name)

    @staticmethod
    def layer_norm(x: torch.Tensor, shape: tuple[int, ...], eps: float) -> torch.Tensor:
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(dims, keepdim=True) + eps)


_GLOBALS = {"torch": torch, "F": F, "constant": constant, "index": index, "mask": mask}


@dataclass(frozen=True)
class Program:
    """A function of two float64 tensors, as text.

    Attributes:
        x_shape: shape of the first argument.
        y_shape: shape of the second argument.
        out_shape: shape of the result.
        constants: one assignment a line, run once: the tensors that the function captures.
        lines: the statements of the body; the last one assigns or returns the result.
    """

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    constants: tuple[str, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.constants, "def f(x, y):", *("    " + s for s in self.lines)])

    def __repr__(self) -> str:
        header = f"# x: {self.x_shape}, y: {self.y_shape} -> {self.out_shape}"
        return "\n" + textwrap.indent(f"{header}\n{self}", "    ") + "\n"

    def compile(self, plain: bool = False) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The function that the text stands for.

        Args:
            plain: whether to avoid the operators whose higher derivatives are wrong in PyTorch.
        """
        scope = dict(_GLOBALS)
        if plain:
            scope["F"] = _PlainF()
        exec(str(self), scope)
        return scope["f"]


# ---------------------------------------------------------------------------------------------
# Writing a program
# ---------------------------------------------------------------------------------------------

LARGEST = 36  # elements of any value in a program
TAME = 2.5  # an operand larger than this is squashed first

UNARY = (
    "torch.sin({a})",
    "torch.cos({a})",
    "torch.tanh({a})",
    "torch.sigmoid({a})",
    "torch.atan({a})",
    "torch.erf({a})",
    "torch.asinh({a})",
    "torch.exp(-{a} * {a})",
    "torch.exp({a} * 0.5)",
    "torch.log1p({a} * {a})",
    "torch.log({a}.square() + 0.5)",
    "torch.sqrt({a} * {a} + 1.0)",
    "torch.rsqrt({a}.square() + 1)",
    "torch.reciprocal({a} * {a} + 1.5)",
    "torch.expm1({a}.tanh())",
    "F.softplus({a})",
    "F.gelu({a})",
    "F.gelu({a}, approximate='tanh')",
    "F.silu({a})",
    "F.logsigmoid({a})",
    "F.mish({a})",
    "torch.clamp({a}, -0.713, 0.831)",
    "torch.clamp_min({a}, 0.217)",
    "F.leaky_relu({a} + 0.1037, 0.3)",
    "-{a}",
    "{a}.square()",
    "{a} ** 3",
    "{a} * 0.7",
    "{a} + 1",
    "1.3 - {a}",
    "2 / ({a} * {a} + 1.5)",
    "0.6 ** {a}",
)

BINARY = (
    "{a} + {b}",
    "{a} - {b}",
    "{a} * {b}",
    "torch.add({a}, {b}, alpha=0.3)",
    "{a} / ({b} * {b} + 1.5)",
    "torch.atan2({a}, {b} * {b} + 1.0)",
    "torch.logaddexp({a}, {b})",
    "torch.lerp({a}, {b}, 0.3)",
    "torch.addcmul({a}, {a}, {b}, value=0.4)",
    "torch.pow({a} * {a} + 0.5, {b}.tanh())",
    "torch.where({a} > 0.1371, {a}, {b})",
    "torch.where({b} < 0.0713, {a} * {b}, {a}.sin())",
    "torch.hypot({a}, {b} * {b} + 1.0)",
)

ALONG = (  # shape-keeping functions along a dim
    "torch.softmax({a}, {dim})",
    "torch.log_softmax({a}, {dim})",
    "torch.cumsum({a}, {dim})",
    "torch.flip({a}, ({dim},))",
    "torch.roll({a}, 1, {dim})",
)

REDUCTIONS = (
    "{a}.sum({dim}, keepdim={keepdim})",
    "{a}.mean({dim}, keepdim={keepdim})",
    "torch.logsumexp({a}, {dim}, keepdim={keepdim})",
    "torch.var({a}, {dim}, correction=0, keepdim={keepdim})",
    "torch.prod({a}.cos() + 1.5, {dim}, keepdim={keepdim})",
    "torch.linalg.vector_norm({a} * {a} + 0.5, dim={dim}, keepdim={keepdim})",
)


@dataclass
class _Writer:
    """A program being written; every statement is run once, so that shapes are known."""

    draw: Callable
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    fills: bool
    scope: dict = field(default_factory=lambda: dict(_GLOBALS))
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


# ---------------------------------------------------------------------------------------------
# Stacks of transforms
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vmap:
    """Maps over a fresh batch dim of `size`; an argument with in_dim None is not batched."""

    size: int
    in_dims: tuple[int | None, int | None]
    out_dims: int
    captures: bool  # the arguments with in_dim None come through the closure
    chunk_size: int | None = None


@dataclass(frozen=True)
class Grad:
    """The gradient of ``f(x, y).sin().sum()`` in one argument."""

    argnums: int
    captures: bool  # the other argument comes through the closure


@dataclass(frozen=True)
class Vjp:
    """The pullback of f applied to ``f(x, y).cos()``, in one argument."""

    argnums: int
    captures: bool


@dataclass(frozen=True)
class Jvp:
    """The pushforward of f applied to ``x.sin()`` or ``y.sin()`` or both, plus ``f(x, y)``."""

    argnums: tuple[int, ...]


@dataclass(frozen=True)
class Jacobian:
    """``jacrev`` or ``jacfwd`` in one argument."""

    mode: str
    argnums: int
    captures: bool
    chunk_size: int | None = None


@dataclass(frozen=True)
class Hessian:
    """``hessian`` in one argument."""

    argnums: int
    captures: bool


Transform = Vmap | Grad | Vjp | Jvp | Jacobian | Hessian


@dataclass(frozen=True)
class Stack:
    """Transforms, innermost first, and the shapes of what they make of a program."""

    transforms: tuple[Transform, ...]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def __repr__(self) -> str:
        lines = [f"# x: {self.x_shape}, y: {self.y_shape} -> {self.out_shape}"]
        lines += [f"f = {t}  # applied to f" for t in self.transforms]
        return "\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


MOST_EVALUATIONS = 500  # of the program, by the reference
LARGEST_OUTPUT = 250


@st.composite
def stacks(draw: Callable, program: Program, max_depth: int = 4) -> Stack:
    """Draws a stack for the program, at most `max_depth` levels deep; a hessian counts as two."""
    x_shape, y_shape, out_shape = program.x_shape, program.y_shape, program.out_shape
    left = draw(st.sampled_from(range(max_depth, 0, -1)))
    cost = 1
    transforms: list[Transform] = []
    while left > 0:
        argnums = draw(st.integers(0, 1))
        wrt = (x_shape, y_shape)[argnums]
        out, wide = math.prod(out_shape), math.prod(wrt)
        kinds = {
            "vmap": (3 * cost, 3 * out, 1),
            "grad": (3 * cost, wide, 1),
            "vjp": (3 * cost, wide, 1),
            "jvp": (5 * cost, out, 1),
            "jacrev": (3 * out * cost, out * wide, 1),
            "jacfwd": (3 * out * cost, out * wide, 1),
            "hessian": (9 * out * wide * cost, out * wide * wide, 2),
        }
        kinds = {
            kind: facts
            for kind, facts in kinds.items()
            if facts[0] <= MOST_EVALUATIONS and facts[1] <= LARGEST_OUTPUT and facts[2] <= left
        }
        if not kinds:
            break
        kind = draw(st.sampled_from(sorted(kinds)))
        cost, _, depth = kinds[kind]
        left -= depth
        captures = draw(st.booleans())
        if kind == "vmap":
            transform = draw(_vmaps(x_shape, y_shape, out_shape))
            x_dim, y_dim = transform.in_dims
            x_shape = x_shape if x_dim is None else insert_dim(x_shape, x_dim, transform.size)
            y_shape = y_shape if y_dim is None else insert_dim(y_shape, y_dim, transform.size)
            out_shape = insert_dim(out_shape, transform.out_dims, transform.size)
        elif kind == "grad":
            transform, out_shape = Grad(argnums, captures), wrt
        elif kind == "vjp":
            transform, out_shape = Vjp(argnums, captures), wrt
        elif kind == "jvp":
            transform = Jvp(draw(st.sampled_from([(0,), (1,), (0, 1)])))
        elif kind == "hessian":
            transform, out_shape = Hessian(argnums, captures), (*out_shape, *wrt, *wrt)
        else:
            chunk_size = draw(st.sampled_from([None, None, 1, 2]))
            transform = Jacobian(kind, argnums, captures, chunk_size)
            out_shape = (*out_shape, *wrt)
        transforms.append(transform)
    return Stack(tuple(transforms), x_shape, y_shape, out_shape)


@st.composite
def _vmaps(draw: Callable, x_shape: tuple, y_shape: tuple, out_shape: tuple) -> Vmap:
    which = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    in_dims = tuple(
        draw(batch_dims(len(shape))) if batched else None
        for batched, shape in zip(which, (x_shape, y_shape), strict=True)
    )
    size = draw(st.integers(1, 3))
    out_dims = draw(batch_dims(len(out_shape)))
    chunk_size = draw(st.sampled_from([None, None, None, 1, 2]))
    return Vmap(size, in_dims, out_dims, draw(st.booleans()), chunk_size)


@st.composite
def cases(draw: Callable, fills: bool = False) -> tuple[Program, Stack]:
    """Draws a program and a stack for it."""
    program = draw(programs(fills=fills))
    return program, draw(stacks(program))
