"""Jacobians, hessians and their products with vectors, on public calls of the other transforms."""
