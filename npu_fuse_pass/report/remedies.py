"""What to do about a fallback or something unfused: fragments of reasons, and the remedy for each."""

from __future__ import annotations

_CASTS = "cast with .to(...) where dtypes meet, or keep the state in the parameter's dtype"
_OWN_MEMORY = "give every parameter, gradient and state memory of its own (clone what is tied or a view)"
_RULE = "write the update with npu_fuse_pass.rule"

# a fragment of the reason -> what to do; the first that is found counts
_FALLBACKS: list[tuple[str, str]] = [
    ("share memory", _OWN_MEMORY),
    ("step hooks run", "remove the hooks, or call the step outside of the compiled function"),
    ("than when the step was compiled", "keep sizes, dtypes and devices, or compile the step again after a change"),
    ("the kernel was compiled for", "keep sizes, dtypes and devices, or compile the step again after a change"),
    ("the graph was compiled for", "keep sizes, dtypes and devices, or compile the step again after a change"),
    ("0-dim state is computed from a tensor", "set opt.found_inf outside of the compiled function"),
    ("through a view", "write to the whole tensor, not to a view of it"),
    ("what was written in place", "read before writing, or write to the whole tensor"),
    ("without a cast", _CASTS),
    ("in half precision", "keep the state in float32 (state_dtype=torch.float32 with an optimizer of ours)"),
    ("moves a tensor to", "create all states on the parameter's device"),
    ("keeps reduced dimensions", "reduce without keepdim"),
    ("can fuse", "use the form that the reason names"),
    ("a tensor constant that is not 0-dim", "use Python numbers in the rule, or a state"),
    ("reads the size of a tensor", "take the size as a Python number before the step"),
    ("has no place in a fused kernel", "rewrite this operation with pointwise ones, sums and norms of whole tensors"),
    ("which no kernel reads", "rewrite this operation with pointwise ones, sums and norms of whole tensors"),
    ("Tensor.item()", f"decide with torch.where instead of reading a tensor's value in Python, or {_RULE}"),
    ("Data-dependent", f"decide with torch.where instead of reading a tensor's value in Python, or {_RULE}"),
    ("has no GE operation", "rewrite this operation with one that has (arithmetic, roots, comparisons, where)"),
    ("original operations between fused updates", f'run this part with options={{"platform": "cpu"}}, or {_RULE}'),
    ("C++ compiler", "install g++ or clang++, or set CXX to one that works"),
    ("fused=True", "leave fused=True out, or use npu_fuse_pass.compile_step"),
    ("no update reached the backend", f"call opt.step without closures that break the graph, or {_RULE}"),
]
# reasons that end with what to do
_SAYS_ITSELF = (
    "Please report it",
    "write it with npu_fuse_pass.rule",
    "use dense gradients",
    "install ",
    "compile_step",
)


def fallback_remedy(reason: str) -> str | None:
    """What to do so that a step is fused; None where the reason says it, or nothing is known."""
    if any(words in reason for words in _SAYS_ITSELF):
        return None
    return next((remedy for fragment, remedy in _FALLBACKS if fragment in reason), None)
