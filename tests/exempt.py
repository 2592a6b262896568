"""The one list of places where derivatives at kinks are not PyTorch's: see `tests.kinks`.

It is for where PyTorch contradicts itself, or where its formula is not finite and ours is. It names
no version: what versions differ in is asked of the one that runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exempt:
    """Where a law is not asked for, for PyTorch contradicts itself or has the less useful value.

    Attributes:
        operators: Their names.
        laws: What is left out, without the `kink_` in front.
        pools: Where; everywhere if there is none.
        reason: Why.
        only: What the text of a sample must contain.
    """

    operators: str
    laws: str
    pools: tuple[str, ...]
    reason: str
    only: str = ""

    def covers(self, name: str, law: str, pool: str, text: str) -> bool:
        """Whether the law is left out at a point of the operator."""
        return (
            name in self.operators.split()
            and law.removeprefix("kink_") in self.laws.split()
            and (not self.pools or pool in self.pools)
            and self.only in text
        )


_INFINITE = ("infinities", "minus infinity")
_CTS = ("infinite cotangents",)
_NAN = ("nan",)

# On every version of torch. What is not here is PyTorch's.
EXEMPT = (
    # PyTorch contradicts itself.
    Exempt(
        """
        logit nn.functional.celu nn.functional.hardswish nn.functional.hardtanh
        nn.functional.relu6 nn.functional.selu nn.functional.softshrink
        """,
        "vjp vmap_vjp",
        _NAN,
        "the vectorised kernel and its scalar tail treat NaN differently",
    ),
    Exempt(
        "nn.functional.multi_margin_loss nn.functional.multilabel_margin_loss",
        "vjp vmap vmap_vjp",
        ("empty",),
        "the result is memory that nothing was written to",
    ),
    Exempt(
        "nn.functional.scaled_dot_product_attention",
        "vjp vmap vmap_vjp",
        (*_INFINITE, *_NAN),
        "one kernel multiplies what is masked by 0, another passes it over",
    ),
    Exempt(
        "nn.functional.pdist",
        "jvp vmap_vjp",
        (*_INFINITE, *_NAN, *_CTS),
        "of a difference that is NaN the sign is 0 in one kernel and NaN in another",
    ),
    Exempt(
        "cholesky_inverse",
        "jvp",
        ("ties", "unit interval", "nan"),
        "the tangent reads both triangles of a factor, the cotangent one",
    ),
    Exempt(
        "polar",
        "vjp vmap_vjp",
        ("ties", *_INFINITE, *_NAN, *_CTS),
        "of a negative length the cotangent has the wrong sign, the tangent has not",
    ),
    Exempt(
        "scatter_reduce.amax scatter_reduce.amin",
        "vjp vmap_vjp",
        (),
        "the cotangent is shared with an element that is not included, the tangent is not",
        only="', False)",
    ),
    Exempt(
        "quantile nanquantile",
        "vjp jvp vmap_vjp",
        (),
        "since 2.15 a sort that is not stable says which of equal elements it is",
    ),
    # PyTorch's formula overflows or subtracts infinities, and ours has the limit.
    Exempt(
        """
        logaddexp logaddexp2 masked.logaddexp nn.functional.soft_margin_loss special.erfcx
        special.log_ndtr
        """,
        "vjp jvp vmap_vjp",
        _INFINITE,
        "quotients and products of exponentials",
    ),
    Exempt(
        "logcumsumexp",
        "vjp jvp vmap_vjp",
        (*_INFINITE, *_NAN, *_CTS),
        "exponentials relative to the largest of all",
    ),
    Exempt(
        """
        cumprod index_reduce.prod linalg.vander masked.cumprod masked.prod prod scatter_reduce.prod
        """,
        "vjp jvp vmap_vjp",
        (*_INFINITE, *_NAN, *_CTS),
        "products over factors; ours are those of the other factors",
    ),
    Exempt(
        "linalg.lu_solve linalg.solve_triangular lu_solve",
        "jvp",
        (*_INFINITE, *_NAN),
        "a product with the solution that cancels",
    ),
    Exempt(
        "linalg.solve_ex",
        "vjp vmap_vjp",
        ("zeros", "unit interval", *_CTS),
        "solves with a singular matrix, by its factors or those of its transpose",
    ),
    Exempt(
        """
        _batch_norm_with_update native_batch_norm native_group_norm nn.functional.group_norm
        """,
        "jvp vmap",
        ("ties", *_INFINITE, *_CTS),
        "mean, deviation and weight are made one factor; with a variance of 0 - eps it is infinite",
    ),
    Exempt("nn.functional.glu", "jvp", _CTS, "a difference of tangents"),
    Exempt("logsumexp masked.logsumexp", "jvp", ("empty",), "divides by a count of 0"),
    # Following PyTorch would cost accuracy, or a derivative of higher order.
    Exempt(
        "__rpow__ float_power pow sinc",
        "vjp jvp vmap_vjp",
        _CTS,
        "masks a slope of 0; then the next derivative, or the mixed one, would be 0 too",
    ),
    Exempt(
        "nn.functional.binary_cross_entropy_with_logits",
        "vjp jvp vmap_vjp",
        _INFINITE,
        "of infinite targets; ours are two terms, which keep the digits of probabilities near 1",
    ),
    Exempt("special.i1 special.i1e", "vjp jvp vmap_vjp", _NAN, "where x is NaN it takes x for 0"),
    Exempt(
        "linalg.cholesky_ex",
        "vjp vmap_vjp",
        ("ties", "unit interval", "nan"),
        "what is left where a factorisation has failed",
    ),
    Exempt(
        """
        linalg.lstsq linalg.lstsq.grad_oriented linalg.polar linalg.qr linalg.svdvals
        """,
        "vmap vmap_vjp",
        ("ties", "unit interval", *_CTS),
        "of singular matrices, where a factor that is rounded otherwise is another one",
    ),
)
