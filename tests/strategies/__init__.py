"""Hypothesis strategies: shapes, batch dims, random programs, stacks of transforms.

A `Program` is a straight line of PyTorch statements over two float64 arguments. It is kept as
source text, so that a failing example prints as code that can be pasted and run. A stack is a
tuple of transforms, innermost first; each takes a function ``f(x, y) -> tensor`` to another one
of the same signature, so any sequence of them is well formed.

Programs are tame (values are squashed as soon as they grow) and smooth almost everywhere, so
that derivatives of the fourth order can be compared in float64.
"""
