"""A function with a rule: its derivative is not its own, which tells whether the rule is used."""

from __future__ import annotations

from lamina import custom_vjp


def with_rule(fwd, bwd, **options):
    """A decorator: `custom_vjp` with a rule."""

    def decorate(fun):
        f = custom_vjp(fun, **options)
        f.defvjp(fwd, bwd)
        return f

    return decorate


@with_rule(lambda x: (x.sin(), x.cos()), lambda cos, ct: (3 * ct * cos,))
def sine(x):
    return x.sin()
