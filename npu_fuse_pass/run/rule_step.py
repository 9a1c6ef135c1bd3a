"""Steps of rule optimizers: the callable that the backend returns to Dynamo for their core."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

from torch import Tensor

from npu_fuse_pass import pipeline
from npu_fuse_pass.errors import Declined, GraphRefused, Mismatch, NumericsError
from npu_fuse_pass.options import Options
from npu_fuse_pass.reasons import Code
from npu_fuse_pass.report.causes import FIRST, Cause
from npu_fuse_pass.report.logs import warn_unfused
from npu_fuse_pass.report.net import net
from npu_fuse_pass.report.report import CompileReport, record
from npu_fuse_pass.rules import core_op
from npu_fuse_pass.rules.batch import inputs_of
from npu_fuse_pass.rules.core_op import Stepping
from npu_fuse_pass.rules.optimizer import RuleOptimizer
from npu_fuse_pass.run import torch_class
from npu_fuse_pass.run.fallbacks import falls_back, given_up, refusal, refused
from npu_fuse_pass.run.plan_facts import Facts, changed, plan_facts
from npu_fuse_pass.run.variants import Variant, Variants

_MOST = 64  # plans of one optimizer that are kept


class RuleSteps:
    """The compiled core: runs the step that was planned for the optimizer on the ticket at its first call.

    Args:
        original: the core as it was captured.
        cause: why Dynamo compiles, for the reports of optimizers that had been compiled before.
        ticket: of the optimizer for which it does.
    """

    # Dynamo keeps what a backend returns for good, and a copy of its __dict__: with slots there is none.
    __slots__ = ("__weakref__", "_cause", "_options", "_original", "_steps")

    def __init__(self, original: Callable[..., object], options: Options, cause: Cause, ticket: Tensor) -> None:
        self._original, self._options, self._cause = original, options, cause
        self._steps: dict[str, RuleStep | CompileReport] = {}
        handle = core_op.handle_on(ticket)
        self._steps[handle] = self._begun(handle)

    def __call__(self, ticket: Tensor, ran: list[CompileReport] | None = None) -> tuple[()]:
        """Run a step of the optimizer on the ticket; append its report to `ran`."""
        handle = core_op.handle_on(ticket)
        step = self._steps.get(handle)
        if step is None:
            step = self._steps[handle] = self._begun(handle)
        if ran is not None:
            ran.append(step if isinstance(step, CompileReport) else step.newest.report)
        if isinstance(step, CompileReport):
            self._original(ticket)
            return ()
        try:
            done = step()
            step.newest.end()
        except Exception as e:
            if not given_up(step.newest, e, self._options.strict):
                raise
            self._steps[handle], done = step.newest.report, False
        if not done:
            core_op.optimizer_of(handle)._run_original()
        return ()

    def _begun(self, handle: str) -> RuleStep | CompileReport:
        """Plan the step of an optimizer; where that fails, return the report that says so."""
        optimizer = core_op.optimizer_of(handle)
        cause = self._cause if optimizer._prelude.compiled else FIRST
        report = CompileReport(self._options.platform, cause=cause.text, cause_remedy=cause.remedy)
        with net(report, self._options):
            return RuleStep(optimizer, self._options, cause, functools.partial(self._steps.pop, handle, None))
        record(report)
        warn_unfused(report.fallbacks)
        return report


class RuleStep:
    """The step of one rule optimizer: plans kernels for its batches, and again for others; batches may come back."""

    def __init__(self, optimizer: Stepping, options: Options, cause: Cause, gone: Callable[[], object]) -> None:
        self._optimizer = weakref.ref(optimizer, self._drop)
        self._options = options
        self._gone = gone
        self._facts: Facts | None = None
        self._apart: str | None = None
        self._kept: dict[tuple[int, ...], Variants[Variant]] = {}
        self._plan(cause)

    @property
    def newest(self) -> Variant:
        """The variant that ran last."""
        return self._variants.newest

    def _plan(self, cause: Cause = FIRST) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        prelude = optimizer._prelude
        version, facts = prelude.version, plan_facts(prelude.batches)
        if self._facts is not None:
            cause = changed(self._facts, facts)
        prelude.compiled = True
        serials = tuple(batch.serial for batch in prelude.batches)
        kept = self._kept.pop(serials, None)
        if kept is None or kept.newest.program is None:
            values = inputs_of(prelude.batches)
            kept = Variants(self._variant(cause, lambda leaf: values[leaf.index]))
        self._variants = self._kept[serials] = kept
        if len(self._kept) > _MOST:
            del self._kept[next(iter(self._kept))]
        self._version, self._facts = version, facts  # last: what ends a plan early has the next step make it

    def _drop(self, optimizer: weakref.ref[Stepping]) -> None:
        """Release the plan of an optimizer that is gone."""
        self._gone()

    def _variant(self, cause: Cause, number: pipeline.Number | None) -> Variant:
        optimizer = self._optimizer()
        assert optimizer is not None
        self._apart = optimizer._surface.apart
        made = pipeline.fuse_batches(
            optimizer._prelude.batches, self._options, cause, number, self._apart, optimizer._replaces
        )
        return Variant(made, self._options)

    def __call__(self) -> bool:
        """Run one step of the optimizer; False where its original has to run."""
        optimizer = self._optimizer()
        assert optimizer is not None
        prelude = optimizer._prelude
        if prelude.version != self._version:
            self._plan()
        newest = self._variants.newest
        if optimizer._surface.apart is not self._apart:  # a function has begun to call a step compiled before
            self._apart = newest.report.apart = optimizer._surface.apart
        if any(batch.needs_whole for batch in prelude.batches):
            return self._together(optimizer)
        if prelude.unchanged and newest.input_check is not None and newest.input_check is prelude.input_check:
            return self._try(optimizer, newest, newest.input_check.again)
        return self._run(optimizer, inputs_of(prelude.batches))

    def _together(self, optimizer: Stepping) -> bool:
        """Agree with other processes on a step with norms of sharded tensors: all run it fused, or none."""
        batches, meeting = optimizer._prelude.batches, optimizer._prelude.meeting
        newest = self._variants.newest
        while meeting.agree(batches, getattr(getattr(newest.program, "spread", None), "opening", None)):
            try:
                if not self._run(optimizer, inputs_of(batches)):
                    meeting.agree(batches, None)
                    return False
                return True
            except Declined:
                meeting.dissolve()
        if newest.program is not None:
            reason = Code.SHARDED("another process, which holds parts of the same parameters, cannot run it fused")
            refused(newest.report, reason, self._options.strict)
        return False

    def _run(self, optimizer: Stepping, values: list[Tensor | None]) -> bool:
        """Run a step on all tensors as Python objects; True if it is done, else the original has to run."""
        variant = self._variants.of(lambda leaf: values[leaf.index], self._variant)
        if variant.program is None:
            return False
        prelude = optimizer._prelude
        step = functools.partial(variant.program, values, kinds=prelude.kinds)
        if variant.check is not None:
            check = functools.partial(variant.check, values, step, optimizer._run_beside, [optimizer])
            return self._try(optimizer, variant, functools.partial(self._beside_torch, optimizer, variant, check))
        done = self._try(optimizer, variant, step)
        if done and variant.input_check is not None and not variant.captured.decided:  # numbers choose a variant
            prelude.input_check = variant.input_check if variant.input_check.checks(prelude.objects) else None
        return done

    def _beside_torch(self, optimizer: Stepping, variant: Variant, check: Callable[[], None]) -> None:
        """Run the check of a step, then the check beside torch's own class, of what both forms of it share."""
        torch_step = torch_class.of_rule(optimizer) if isinstance(optimizer, RuleOptimizer) else None
        check()
        if torch_step is not None:
            optimizer._prelude.expose_states()
            torch_step.compare(variant.report)

    def _try(self, optimizer: Stepping, variant: Variant, step: Callable[[], None]) -> bool:
        """Run a step that may be refused before it has changed anything; True if it ran."""
        try:
            step()
        except NumericsError:
            optimizer._after()  # the step is done, as the original does it
            raise
        except Declined:
            raise
        except Mismatch as e:
            ours = [optimizer] if isinstance(optimizer, RuleOptimizer) else []
            refused(variant.report, refusal(e, ours), self._options.strict)
            return False
        except GraphRefused as e:
            falls_back(variant, e, self._options.strict)
            return False
        except Exception as e:
            if not given_up(variant, e, self._options.strict):
                raise
            optimizer._prelude.input_check = None
            return False
        return True
