"""The debug kit, as users import it: `from lamina.debug import trace_log`.

See `lamina_core.debug`.
"""

from lamina_core.debug import explain, print_stack, stack_text, trace_log

__all__ = ["explain", "print_stack", "stack_text", "trace_log"]
