"""Lamina: composable function transforms for PyTorch."""

import importlib

import lamina.autodiff.engine
import lamina.autodiff.forward_ad
import lamina.autodiff.function_jvp
import lamina.batching.function
import lamina.checkpoint_policies
import lamina.debug
import lamina.proofs  # noqa: F401 - all of these for what they register
from lamina.autodiff.api import grad, grad_and_value, jvp, value_and_grad, vjp
from lamina.autodiff.linear_transpose import linear_transpose
from lamina.autodiff.linearize import linearize
from lamina.batching.api import vmap
from lamina.checkpointing.rematerialise import checkpoint, checkpoint_name
from lamina.checkpointing.residuals import print_saved_residuals, saved_residuals
from lamina.custom.batching import custom_vmap
from lamina.custom.jvp import custom_jvp
from lamina.custom.vjp import custom_vjp
from lamina.custom.zeros import SymbolicZero
from lamina.functional import functional_call, stack_module_state
from lamina.jacobians.api import hessian, jacfwd, jacobian, jacrev
from lamina.jacobians.products import hvp, vhp
from lamina.jacobians.rows import Wirtinger
from lamina_core.config import config
from lamina_core.schema_record import warn_of_changes
from lamina_core.torch_hooks.doors import doctor_runs, require_proofs
from lamina_core.versions import is_tested, warn_if_untested

__all__ = [
    "SymbolicZero",
    "Wirtinger",
    "checkpoint",
    "checkpoint_name",
    "checkpoint_policies",
    "config",
    "custom_jvp",
    "custom_vjp",
    "custom_vmap",
    "functional_call",
    "grad",
    "grad_and_value",
    "hessian",
    "hvp",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jvp",
    "linear_transpose",
    "linearize",
    "print_saved_residuals",
    "saved_residuals",
    "stack_module_state",
    "value_and_grad",
    "vhp",
    "vjp",
    "vmap",
]

# A hook into torch that is not reached must not show as a wrong gradient.
require_proofs("import")
warn_if_untested()
warn_of_changes()
if not (is_tested() or doctor_runs()):
    importlib.import_module("lamina.doctor.verdict").decide()
