"""Process-wide settings, and the one short form in which Lamina prints a tensor.

`LAMINA_DEBUG` in the environment sets `config.debug`:

| value | what it adds |
|---|---|
| 0 | nothing (default) |
| 1 | every answer is checked: see below |
| 2 | as 1, and pushing and popping a level is printed on the standard error |
| 3 | as 2, and so is every op, as `trace_log` prints it |

With 1 an op must have, at every level, the shapes and dtypes that it has alone, which is tried once
for each signature of its arguments; a batch dim must be there and whole; a tangent or cotangent
must have the shape, dtype and device of its primal. It takes about a third more time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Config", "config", "dtype_name", "tensor_summary"]


@dataclass
class Config:
    """Settings that hold for the whole process.

    Attributes:
        debug: The debug level, 0 to 3 (see the module).
        schemas: What happens when an op of the running torch is not the one that its rule was
            written for (`lamina_core.schema_record`): the rule is left out, and one warning lists
            them all ("warn"), or an error ("error"). `LAMINA_SCHEMAS` in the environment sets it.
        fallback: What happens when an op under `vmap` can only run example by example: a warning
            per op ("warn"), an error ("error"), or nothing said ("silent").
    """

    debug: int = 0
    fallback: Literal["warn", "error", "silent"] = "warn"
    schemas: str = "warn"


config = Config(
    debug=int(os.environ.get("LAMINA_DEBUG", "0") or 0),
    schemas=os.environ.get("LAMINA_SCHEMAS", "warn") or "warn",
)

_SHORT = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "complex64": "c64",
    "complex128": "c128",
    "complex32": "c32",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "bool": "b8",
}


def dtype_name(dtype: Any) -> str:
    """The short name of a dtype: `f32` for `torch.float32`."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT.get(name, name)


def tensor_summary(tensor: Any) -> str:
    """The dtype and shape of a tensor, such as `f32[2, 3]`."""
    return f"{dtype_name(tensor.dtype)}[{', '.join(str(size) for size in tensor.shape)}]"
