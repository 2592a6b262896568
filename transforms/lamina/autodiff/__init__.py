"""Differentiation: `vjp` and `grad` (reverse mode), `jvp` (forward mode)."""
