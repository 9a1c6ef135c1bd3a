"""Types and operations of expressions in C++."""

from __future__ import annotations

from npu_fuse_pass.ir.expr import C_FUNCTIONS, DTYPE_NAMES, Expr

CPP_TYPES = {"f64": "double", "f32": "float", "bool": "bool"}
STORED = {"f64": "double", "f32": "float", "f16": "half", "bf16": "bfloat", "bool": "bool"}

# IR operation -> C++; {0}, {1}, ... are the arguments, all of one type
CPP = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "fma": "math::fma({0}, {1}, {2})",
    "rsqrt": "1 / math::sqrt({0})",
    "reciprocal": "1 / {0}",
    "sign": "sign({0})",
    "round": "math::nearbyint({0})",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "where": "{0} ? {1} : {2}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "!{0}",
    "isnan": "{0} != {0}",
    "isinf": "math::isinf({0})",
    "isfinite": "math::isfinite({0})",
    "zero": "0",
    "numel": "double(a.numel[m])",
    **{n: f"math::{n}({{0}})" for n in C_FUNCTIONS},
    **{n: f"math::{n}({{0}}, {{1}})" for n in ["pow", "fmax", "fmin", "atan2", "copysign", "hypot", "fmod"]},
    "abs": "math::fabs({0})",
}


def cpp_type(e: Expr) -> str:
    """The type of the variable that holds a value; half-precision ones are held widened."""
    return CPP_TYPES.get(DTYPE_NAMES[e.dtype], "float")


def cast(e: Expr, value: str) -> str:
    """A cast; half precision is held as the float that it rounds to."""
    name = DTYPE_NAMES[e.dtype]
    return rounded(name, value) if name in ("f16", "bf16") else f"({CPP_TYPES[name]}){value}"


def rounded(name: str, value: str) -> str:
    """A value as half precision holds it, as a float."""
    return f"round_{STORED[name]}((float){value})"
