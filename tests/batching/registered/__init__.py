"""Ops defined with `torch.library` under the transforms.

The oracle is the op itself, called in a loop over the examples, and `torch.autograd`.
"""
