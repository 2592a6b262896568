"""Lamina: composable function transforms for PyTorch."""

import lamina.autodiff.function
import lamina.debug
import lamina.vmap.function  # noqa: F401 - and under vmap
from lamina.autodiff.api import grad, grad_and_value, jvp, value_and_grad, vjp
from lamina.functional import functional_call, stack_module_state
from lamina.jacobians import hessian, jacfwd, jacrev
from lamina.vmap.api import vmap
from lamina_core.config import config

__all__ = [
    "config",
    "functional_call",
    "grad",
    "grad_and_value",
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "stack_module_state",
    "value_and_grad",
    "vjp",
    "vmap",
]
