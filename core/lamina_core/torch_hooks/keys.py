"""Dispatch keys: which of torch's layers look at an op before Python does.

Autograd, autocast and the like are *keys*, each of them included or excluded for a thread. While a
transform is active some are excluded; around an op on plain tensors the caller's are brought back.
"""

from __future__ import annotations

from typing import Any

from lamina_core.torch_hooks.doors import door

__all__ = [
    "CONJUGATE",
    "NEGATIVE",
    "BelowADInplaceOrView",
    "DispatchKey",
    "DispatchKeySet",
    "ExcludeKeys",
    "ForceKeys",
    "OutsideHandler",
    "SetExcluded",
    "excluded_keys",
    "included_keys",
    "is_excluded",
    "parse_key",
    "set_excluded",
]

DispatchKey: Any = door("torch._C.DispatchKey", "naming the keys")
DispatchKeySet: Any = door("torch._C.DispatchKeySet", "sets of keys")
parse_key = door("torch._C._parse_dispatch_key", "keys that have no attribute")

included_keys = door("torch._C._dispatch_tls_local_include_set", "the caller's keys")
excluded_keys = door("torch._C._dispatch_tls_local_exclude_set", "the caller's keys")
is_excluded = door("torch._C._dispatch_tls_is_dispatch_key_excluded", "whether autograd is on")

ForceKeys: Any = door("torch._C._ForceDispatchKeyGuard", "bringing the caller's keys back")
ExcludeKeys: Any = door("torch._C._ExcludeDispatchKeyGuard", "switching C++ autograd off")
SetExcluded: Any = door("torch._C._SetExcludeDispatchKeyGuard", "switching one key on or off")
BelowADInplaceOrView: Any = door(
    "torch._C._AutoDispatchBelowADInplaceOrView", "the keys of autograd and of its views"
)
OutsideHandler: Any = door(
    "torch._C._RestorePythonTLSSnapshot", "the keys of user code, from inside a handler"
)

# torch calls a handler with these two keys off, and an op then ignores that a plain tensor is a
# lazy conjugate: `x.conj() * 1j` would be `x * 1j`. Each way in switches them on (0.3 us).
set_excluded = door(
    "torch._C._dispatch_tls_set_dispatch_key_excluded", "seeing lazy conjugates in handlers"
)
CONJUGATE = DispatchKey.Conjugate
NEGATIVE = DispatchKey.Negative
