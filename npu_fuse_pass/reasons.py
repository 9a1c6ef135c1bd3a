"""Reasons as values: why something is not fused, made where it is found and printed alike wherever it is shown.

`docs/reasons.md` is made of the codes.
"""

from __future__ import annotations

import dataclasses
import enum

_KEEP = "keep sizes, dtypes, devices and layouts, or compile the step again after a change"
_REPORT = "report it, with the error that NPU_FUSE_VERIFY=1 raises and the folder that NPU_FUSE_DUMP=folder leaves"
_REWRITE = "rewrite this operation with pointwise ones, sums and norms of whole tensors"
_RULE = "write the update with npu_fuse_pass.rule"


class Code(enum.Enum):
    """Kinds of reasons; names are stable.

    Attributes:
        meaning: what is the case, in a sentence.
        remedy: what to do, unless a reason knows better; None where nothing can be done, or every reason says it.
    """

    # what an update computes
    OPERATION = ("An operation of the step has no place in a fused kernel.", _REWRITE)
    FORM = ("An operation is called with arguments that only the original understands.", _REWRITE)
    DTYPE = (
        "Something of the update has a dtype that no kernel computes with.",
        "rewrite this operation with floating-point ones (torch.trunc instead of .to(torch.int64)), pointwise or of "
        "whole tensors",
    )
    MIXED_DTYPES = (
        "Tensors of different dtypes meet without a cast.",
        "cast with .to(...) where dtypes meet, or keep the state in the parameter's dtype",
    )
    HALF_PRECISION = (
        "An operation rounds its intermediate results in half precision, in a way that no kernel repeats.",
        "compute this operation in float32: cast its arguments with .float()",
    )
    DEVICE = (
        "An update asks for a tensor on a device.",
        "create all states on the parameter's device, and leave .to(device) out",
    )
    SHAPES = ("Tensors of different shapes meet in an update.", "use tensors of one shape in an update, and 0-dim ones")
    REDUCTION = ("A reduction is not one over a whole tensor of the step.", "reduce whole tensors, without keepdim")
    ACROSS_PARAMETERS = (
        "Numbers of several parameters are combined in another way than by a sum.",
        "add up one number of each parameter",
    )
    VIEW_WRITTEN = ("The step writes to a part of a tensor.", "write to the whole tensor, not to a view of it")
    VIEW_STALE = (
        "The step reads through a view what it has written before.",
        "read before writing, or write to the whole tensor",
    )
    VIEW_RETURNED = (
        "What the graph returns, or leaves in Python's objects, is a view.",
        "return the whole tensor, or a copy: .clone()",
    )
    CONSTANT = ("A rule uses a tensor constant.", "use Python numbers in the rule, or a state")
    SIZE = ("The step computes with the size of a tensor.", "take the size as a Python number before the step")
    VALUE = (
        "Python reads the value of a tensor.",
        f"decide with torch.where instead of reading a tensor's value in Python, or {_RULE}",
    )
    SAME_SCALAR = ("Several parameters write the same 0-dim tensor.", "keep one such tensor for each parameter")
    RULE = ("A rule raises an error where it is traced.", "use functions of tensors only, and none of their values")
    GRAPH = ("The graph holds something else than a step's operations on tensors and numbers.", None)
    FORWARD_PASS = (
        "One graph holds a forward pass and an update.",
        "compile the step by itself, under torch.no_grad()",
    )
    MATCH = ("A formula is not compared with the known kernels.", None)

    # where it runs
    COMPILER = ("No C++ compiler works here.", "install g++ or clang++, or set CXX to one that works")
    DISABLED = ("NPU_FUSE_DISABLE=1 switches everything off.", "take NPU_FUSE_DISABLE out of the environment")
    PLATFORM = ("The platform cannot be used here.", None)
    TORCH = (
        "This torch has no longer, or not yet, a private name of its that the package needs.",
        "use a torch that docs/compatibility.md lists, and report which one lacks it",
    )
    OTHER_DEVICE = (
        "A platform is given tensors of another device.",
        "put all tensors of the step on the platform's device, or choose another platform",
    )
    GE_OPERATION = (
        "GE has no operation for something in the update.",
        "rewrite this operation with one that has (arithmetic, roots, comparisons, where)",
    )
    GE_BETWEEN = (
        "Original operations between fused updates cannot be in one GE graph with them.",
        f'run this part with options={{"platform": "cpu"}}, or {_RULE}',
    )
    GE_STATE = (
        "A 0-dim state follows from tensors. GE operations leave 0-dim states to the host; generated kernels write "
        "those that lie on the parameters' device, in float32, bfloat16 or float16.",
        'keep the state there in one of these, and use options={"kernels": "generated"}; where it is a step counter '
        "that found_inf holds back, leave out fullgraph=True: the step then has a graph of its own",
    )
    GE_REFUSED = (
        "GE or torchair refused the step's graph, and nothing was changed.",
        "report it, with this message and what print(npu_fuse_pass.reports()[-1]) says",
    )

    # what a step is called with
    SHARED_MEMORY = (
        "Two tensors of the step share memory, and one of them is written.",
        "give every parameter, gradient and state memory of its own (clone what is tied or a view)",
    )
    NO_MEMORY = (
        "A tensor holds no memory of its own: a subclass that wraps other tensors, or one whose storage was freed.",
        "give the optimizer plain tensors (those that the subclass wraps), or step this one eagerly",
    )
    STEPS_TWICE = (
        "One optimizer steps more than once in a compiled function.",
        "let the compiled function step once, and call it as often",
    )
    STATES = (
        "Two states of a rule optimizer share memory: a step is wrong in whatever form it runs.",
        "put copies in opt.state (state.clone()); report it if you put nothing there",
    )
    CHANGED = ("A tensor is not what the step was compiled for.", _KEEP)
    GRADIENTS = (
        "Other parameters have gradients than when the graph was captured.",
        "set and drop gradients outside of the compiled function",
    )
    SHARDED = (
        "A step of tensors of which this process holds parts (DTensors) cannot run fused here, or not everywhere.",
        "step in optimizers by compile_step, which fuses norms of DTensors; look at the reports of the other processes",
    )
    NUMBER = (
        "Python numbers of the step are ones that no kernel computes with.",
        "keep integers below 2**53, and numbers real",
    )
    REPEATED = ("A parameter is listed more than once in a group.", "list every parameter once")
    KEPT = (
        "A compiled function uses a state or a tensor hyperparameter of an optimizer whose step is in its graph.",
        "reach it through opt.state or opt.param_groups, or use it outside of the compiled function",
    )
    HOOKS = (
        "Step hooks run between the operations of a larger compiled function.",
        "register hooks before the function is first called, and compile it without fullgraph=True: the step then has "
        "a graph of its own",
    )

    # what torch shows
    FUSED_OPTION = (
        "torch's own fused kernels (fused=True) are hidden from Dynamo.",
        "construct the optimizer without it, or use npu_fuse_pass.compile_step, which switches it off",
    )
    NO_RULE = ("Dynamo captures a step of torch.optim: it is not one that an update rule is known to compute.", None)
    HIDDEN = ("Dynamo does not look into this optimizer's step.", None)
    NOT_CAPTURED = ("No update reached the backend.", _RULE)
    RECOMPILES = ("Every step is compiled anew, until torch stops, and then runs as the original.", None)

    INTERNAL = ("An error inside npu_fuse_pass.", _REPORT)

    def __init__(self, meaning: str, remedy: str | None) -> None:
        self.meaning = meaning
        self.remedy = remedy

    def __call__(self, text: str, op: str = "", remedy: str | None = None) -> Reason:
        """Make a reason of this kind; its remedy is the code's unless one is given."""
        return Reason(self, text, op, remedy or self.remedy)


def advised(text: str, remedy: str | None) -> str:
    """What is the case, with what to do, as warnings say it."""
    return f"{text}. What to do: {remedy}" if remedy else text


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why something is not fused.

    Attributes:
        code: what kind of reason it is.
        text: what is the case.
        op: the operation, rule or group that it is about; may be empty.
        remedy: what to do; None where nothing is known, or the text says it.
        node: the name of the node in the captured graph, where it is about one.
        source: that node's place in the source, as "train.py:12, in step".
    """

    code: Code
    text: str
    op: str = ""
    remedy: str | None = None
    node: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        about = f"{self.op}: " if self.op else ""
        place = f" ({self.source})" if self.source else ""
        return f"{about}{self.text}{place}"

    @property
    def advised(self) -> str:
        """The reason with what to do."""
        return advised(str(self), self.remedy)

    def led_by(self, words: str) -> Reason:
        """The same reason after words that say when or how it counts."""
        return dataclasses.replace(
            self, text=f"{words}: {self.op}: {self.text}" if self.op else f"{words}: {self.text}", op=""
        )

    def to_json(self) -> dict[str, str | None]:
        """Plain strings."""
        return {**dataclasses.asdict(self), "code": self.code.name}
