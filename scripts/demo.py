"""The main job: a small convolutional network learns handwritten digits with each of the six optimizers.

    bash scripts/demo.sh            # or, in an environment with the extra "demo": python scripts/demo.py

Every optimizer trains three times on scikit-learn's 1,797 digits, with the same first weights and the same
batches: eagerly, compiled with `torch.compile(opt.step, backend="npu_fused")`, and eagerly from first weights
that were nudged by a millionth. Two questions are asked about the compiled run:

- Does every step compute what eager computes? During the compiled run an eager twin gets copies of the same
  gradients and is never corrected; its parameters must stay within TOLERANCE. This decides the exit status.
- How far do two whole trainings drift apart? Training is chaotic: a rounding error that flips one ReLU grows
  from there on. So the drift is printed next to the one that the nudge causes in eager training.

The exit status is 1 as well where the report shows a fallback, something unfused or no fusion, where the
changing learning rate recompiled, and where a run does not learn. The picture goes to demo-output/demo.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import logging
import math
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import npu_fuse_pass
from optimizers import NpuFusedAdam, NpuFusedAdamW, NpuFusedLamb, NpuFusedRMSpropTF, NpuFusedSGD, paddle

EPOCHS = 6
BATCH = 64
TRAINING_IMAGES = 1437  # of 1,797; accuracy and loss are taken on the other 360
STEPS = EPOCHS * -(-TRAINING_IMAGES // BATCH)
# Per step taken: |a - b| / (1e-3 + |b|) of every parameter element, from the same gradients. A step is right to about
# one rounding of the update; where parameter and update cancel, that is 1e-6 on this scale.
TOLERANCE = 4e-6
LEARNED = 0.95  # every run reaches this accuracy
ALIKE = 0.02  # and compiled and eager accuracy differ by no more than this
NUDGE = 1e-6  # relative change of the first weights in the third run
SECONDS_TO_TIME = 0.06  # per optimizer and form, a round

Params = Sequence[nn.Parameter]
Step = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One optimizer: makes it and its schedule; torch.optim's class with the same update, if there is one."""

    name: str
    make: Callable[[Params], tuple[Any, Any]]
    torch_class: Callable[..., torch.optim.Optimizer] | None = None
    torch_options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    """One training: loss per step, all parameters after every step, and the result on the held-out images."""

    losses: list[float]
    weights: list[Tensor]
    accuracy: float
    loss: float
    network: nn.Sequential
    optimizer: Any
    step: Step


@dataclasses.dataclass
class Row:
    """What the demo found out about one optimizer."""

    name: str
    eager: Run
    compiled: Run
    same_gradients: float
    same_gradients_per_step: float
    drift: float
    drift_of_nudge: float
    updates: int
    kernels: int
    launches: int
    compile_seconds: float
    eager_us: float
    compiled_us: float
    torch_us: float | None
    torch_form: str
    problems: list[str]


SGD_OPTIONS: dict[str, Any] = dict(lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
ADAM_OPTIONS: dict[str, Any] = dict(lr=2e-3, betas=(0.9, 0.99))
LAMB_OPTIONS: dict[str, Any] = dict(lr=0.01, weight_decay=0.01, use_global_grad_norm=True)
RMSPROP_OPTIONS: dict[str, Any] = dict(lr=1e-3, momentum=0.9)


def with_cosine(make: Callable[..., Any], **options: Any) -> Callable[[Params], tuple[Any, Any]]:
    """An optimizer whose learning rate torch's scheduler changes after every step."""

    def both(params: Params) -> tuple[Any, Any]:
        opt = make(params, **options)
        return opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)

    return both


def paddle_rmsprop(params: Params) -> tuple[Any, Any]:
    """Paddle's RMSProp with its own schedule, clip and regularizer."""
    schedule = paddle.PiecewiseDecay([STEPS // 3, 2 * STEPS // 3], [2e-3, 1e-3, 3e-4])
    clip = paddle.ClipGradByGlobalNorm(5.0)
    decay = paddle.L2Decay(1e-4)
    opt = paddle.RMSProp(schedule, momentum=0.5, parameters=params, weight_decay=decay, grad_clip=clip)
    return opt, schedule


JOBS = [
    Job("NpuFusedSGD", with_cosine(NpuFusedSGD, **SGD_OPTIONS), torch.optim.SGD, SGD_OPTIONS),
    Job("NpuFusedAdam", with_cosine(NpuFusedAdam, **ADAM_OPTIONS), torch.optim.Adam, ADAM_OPTIONS),
    Job("NpuFusedAdamW", with_cosine(NpuFusedAdamW, **ADAM_OPTIONS), torch.optim.AdamW, ADAM_OPTIONS),
    Job("NpuFusedLamb", with_cosine(NpuFusedLamb, **LAMB_OPTIONS)),
    Job("NpuFusedRMSpropTF", with_cosine(NpuFusedRMSpropTF, **RMSPROP_OPTIONS)),
    Job("paddle RMSProp", paddle_rmsprop),
]


# Training -------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images in [0, 1] and their labels, in an order that never changes."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return pixels[order], torch.tensor(labels)[order]


def new_network() -> nn.Sequential:
    """Three convolutions and two linear layers: 13 parameters, always with the same first weights."""

    def convolution(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    torch.manual_seed(0)
    pool = nn.MaxPool2d(2)
    head = [nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*convolution(1, 16), *convolution(16, 32), pool, *convolution(32, 64), pool, *head)


def batches() -> Iterator[Tensor]:
    """Indices of the training images, in the same order for every run."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(EPOCHS):
        yield from torch.randperm(TRAINING_IMAGES, generator=generator).split(BATCH)


def train(
    job: Job,
    data: tuple[Tensor, Tensor],
    bar: Any,
    *,
    nudge: float = 0.0,
    compiled: bool = False,
    after_backward: Callable[[nn.Module], None] | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
) -> Run:
    """Train a new network from first weights times (1 + nudge)."""
    images, labels = data
    network = new_network()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1 + nudge)
    opt, schedule = job.make(list(network.parameters()))
    step: Step = torch.compile(opt.step, backend="npu_fused") if compiled else opt.step
    losses, weights = [], []
    for batch in batches():
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        opt.zero_grad()
        loss.backward()
        if after_backward:
            after_backward(network)
        step()
        schedule.step()
        if after_step:
            after_step(network)
        losses.append(loss.item())
        weights.append(flat(network))
        bar.update()
    network.eval()
    with torch.no_grad():
        out, held_out = network(images[TRAINING_IMAGES:]), labels[TRAINING_IMAGES:]
        accuracy = (out.argmax(1) == held_out).float().mean().item()
        final = F.cross_entropy(out, held_out).item()
    return Run(losses, weights, accuracy, final, network, opt, step)


class Twin:
    """An eager optimizer beside a compiled run of the same kind: it gets copies of the same gradients."""

    def __init__(self, job: Job) -> None:
        self.network = new_network()
        self.opt, self.schedule = job.make(list(self.network.parameters()))
        self.steps = 0
        self.largest = self.largest_per_step = 0.0

    def copy_gradients(self, network: nn.Module) -> None:
        """Before the compiled step, which may change gradients (clips do)."""
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.clone()

    def follow(self, network: nn.Module) -> None:
        """After the compiled step: the same step eagerly, then compare."""
        self.opt.step()
        self.schedule.step()
        mine, theirs = flat(self.network), flat(network)
        difference = ((mine - theirs).abs() / (1e-3 + mine.abs())).max().item()
        if math.isnan(difference):
            difference = math.inf
        self.steps += 1
        self.largest = max(self.largest, difference)
        self.largest_per_step = max(self.largest_per_step, difference / self.steps)


def flat(network: nn.Module) -> Tensor:
    """All parameters in one new vector."""
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def drift(a: Run, b: Run) -> float:
    """The largest difference of any parameter element between two trainings, over all steps."""
    return max((x - y).abs().max().item() for x, y in zip(a.weights, b.weights, strict=True))


# Times ----------------------------------------------------------------------------------------------------


def fastest_us(steps: dict[str, Step], rounds: int = 5) -> dict[str, float]:
    """Microseconds per call of each function: the best of rounds that alternate between the functions."""
    calls = {}
    for name, step in steps.items():
        start = time.perf_counter()
        for _ in range(3):
            step()
        calls[name] = max(3, int(SECONDS_TO_TIME * 3 / (time.perf_counter() - start)))
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                step()
            best[name] = min(best[name], (time.perf_counter() - start) / calls[name] * 1e6)
    return best


def torch_steps(job: Job, run: Run) -> dict[str, Step]:
    """The step of torch.optim's class in each of its forms, on copies of a run's parameters and gradients."""
    steps: dict[str, Step] = {}
    forms: dict[str, dict[str, bool]] = {"loop": dict(foreach=False), "foreach": dict(foreach=True)}
    if job.torch_class:
        for form, flags in (forms | {"fused": dict(fused=True)}).items():
            copies = [nn.Parameter(p.detach().clone()) for p in run.network.parameters()]
            for copy, p in zip(copies, run.network.parameters(), strict=True):
                copy.grad = None if p.grad is None else p.grad.clone()
            steps[form] = job.torch_class(copies, **job.torch_options, **flags).step
    return steps


# One optimizer --------------------------------------------------------------------------------------------


def examine(job: Job, data: tuple[Tensor, Tensor], bar: Any) -> Row:
    """Train three times with one optimizer, compare, and time its step."""
    bar.set_description(f"{job.name} eager", refresh=False)
    eager = train(job, data, bar)
    bar.set_description(f"{job.name} nudged", refresh=False)
    nudged = train(job, data, bar, nudge=NUDGE)

    bar.set_description(f"{job.name} compiled", refresh=False)
    twin = Twin(job)
    npu_fuse_pass.clear_reports()
    marks: list[float] = []

    def before(network: nn.Module) -> None:
        twin.copy_gradients(network)
        marks.append(time.perf_counter())

    def after(network: nn.Module) -> None:
        marks.append(time.perf_counter())
        twin.follow(network)

    compiled = train(job, data, bar, compiled=True, after_backward=before, after_step=after)
    reports = npu_fuse_pass.reports()
    bar.set_description(f"{job.name} timing", refresh=False)
    times = fastest_us({"eager": eager.step, "compiled": compiled.step, **torch_steps(job, compiled)})
    torch_times = {form: us for form, us in times.items() if form not in ("eager", "compiled")}
    best = min(torch_times, key=lambda form: torch_times[form], default="")
    groups = [g for r in reports for g in r.groups]
    row = Row(
        name=job.name,
        eager=eager,
        compiled=compiled,
        same_gradients=twin.largest,
        same_gradients_per_step=twin.largest_per_step,
        drift=drift(eager, compiled),
        drift_of_nudge=drift(eager, nudged),
        updates=sum(g.updates for g in groups),
        kernels=len(groups),
        launches=sum(g.launches for g in groups),
        compile_seconds=marks[1] - marks[0],
        eager_us=times["eager"],
        compiled_us=times["compiled"],
        torch_us=torch_times.get(best),
        torch_form=best,
        problems=[],
    )
    row.problems = problems(row, reports)
    return row


def problems(row: Row, reports: Sequence[Any]) -> list[str]:
    """Everything about one optimizer that must not be so."""
    found = []
    parameters = len(list(row.compiled.network.parameters()))
    if len(reports) != 1:
        found.append(f"{len(reports)} compilations instead of 1 in {STEPS} steps with a changing learning rate")
    for report in reports:
        if report.fallback is not None:
            found.append(f"the compiled step fell back: {report.fallback}")
        found.extend(f"not fused: {reason}" for reason in report.unfused)
        found.extend(f"group {g.name} runs on {g.lowering!r}" for g in report.groups if g.lowering == "eager")
    if row.updates != parameters or row.kernels >= parameters:
        found.append(f"{parameters} parameters: the report has {row.updates} updates in {row.kernels} kernels")
    if not row.same_gradients_per_step <= TOLERANCE:
        apart = f"{row.same_gradients_per_step:.1e} per step, allowed is {TOLERANCE:.0e}"
        found.append(f"the compiled step leaves its eager twin: {apart}")
    for kind, run in (("eager", row.eager), ("compiled", row.compiled)):
        if not run.accuracy >= LEARNED:
            found.append(f"the {kind} run learned too little: accuracy {run.accuracy:.1%} < {LEARNED:.0%}")
    if not abs(row.eager.accuracy - row.compiled.accuracy) <= ALIKE:
        found.append(f"accuracy eager {row.eager.accuracy:.1%}, compiled {row.compiled.accuracy:.1%}")
    return found


# Output ---------------------------------------------------------------------------------------------------


def print_table(rows: Sequence[Row]) -> None:
    """Two tables: what was learned and how alike, and what it cost."""
    print("\nWhat was learned, and the largest differences between compiled and eager parameters over all steps")
    print(f"{'':18} {'accuracy':>15} {'loss':>15} {'same gradients':>18} {'whole':>9} {'nudged':>9}")
    titles = ["eager", "compiled"] * 2
    print(f"{'optimizer':18}", *(f"{t:>{w}}" for t, w in zip(titles, (6, 8, 6, 8), strict=True)), end=" ")
    print(f"{'largest':>9} {'per step':>8} {'training':>9} {'training':>9}")
    for r in rows:
        learned = f"{r.eager.accuracy:6.1%} {r.compiled.accuracy:8.1%} {r.eager.loss:6.3f} {r.compiled.loss:8.3f}"
        apart = f"{r.same_gradients:9.1e} {r.same_gradients_per_step:8.1e} {r.drift:9.1e} {r.drift_of_nudge:9.1e}"
        print(f"{r.name:18} {learned} {apart}")
    print(f"  same gradients: |a-b| / (1e-3+|b|) against the eager twin; at most {TOLERANCE:.0e} per step is allowed")
    print("  whole training: |a-b| of two trainings, each with the gradients of its own parameters")
    print(f"  nudged:         the same for two eager trainings, first weights of one times 1+{NUDGE:.0e}")
    print("\nWhat it cost: kernels, first compiled step (empty kernel cache), microseconds per step")
    titles = ["parameters", "kernels", "launches", "compile", "eager", "compiled"]
    print(f"{'optimizer':18}", *(f"{t:>{max(8, len(t))}}" for t in titles), " torch.optim")
    for r in rows:
        rival = "-" if r.torch_us is None else f"{r.torch_us:.0f} ({r.torch_form})"
        fused = f"{r.updates:10} {r.kernels:8} {r.launches:8} {r.compile_seconds:6.1f} s"
        print(f"{r.name:18} {fused} {r.eager_us:8.0f} {r.compiled_us:8.0f}  {rival}")
    print("  torch.optim: the fastest of its forms loop, foreach and fused, run eagerly")


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Loss curves of every optimizer and a bar chart of step times."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    curves, bars = figure.subfigures(1, 2, width_ratios=[3, 2])
    axes = curves.subplots(2, 3, sharex=True, sharey=True)
    for ax, r in zip(axes.flat, rows, strict=True):
        ax.semilogy(r.eager.losses, color="tab:blue", linewidth=3.5, alpha=0.4, label="eager")
        ax.semilogy(r.compiled.losses, color="tab:red", linewidth=0.8, label="compiled")
        ax.set_title(f"{r.name}\n{r.updates} parameters → {r.kernels} kernel{'s' * (r.kernels != 1)}", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0, 0].legend()
    curves.supxlabel("step", fontsize=10)
    curves.supylabel("training loss", fontsize=10)
    ax = bars.subplots()
    series = {
        "eager": [r.eager_us for r in rows],
        "compiled, npu_fused": [r.compiled_us for r in rows],
        "torch.optim, best form": [r.torch_us or 0 for r in rows],
    }
    for i, ((label, values), color) in enumerate(zip(series.items(), ("tab:blue", "tab:red", "tab:gray"), strict=True)):
        places = [n + 0.27 * (i - 1) for n in range(len(rows))]
        drawn = ax.barh(places, values, 0.25, label=label, color=color, alpha=0.8)
        ax.bar_label(drawn, [f"{v:.0f}" if v else "" for v in values], padding=2, fontsize=8)
    ax.set_yticks(range(len(rows)), [r.name for r in rows])
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("µs per optimizer step, the fastest of 5 rounds")
    ax.set_title(f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}", fontsize=10)
    ax.legend(loc="upper right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default="demo-output", metavar="FOLDER", help="for demo.png")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the network is too small for more")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("npu_fuse_pass.rules.core_op").setLevel(logging.ERROR)  # eager twins are never compiled
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NPU_FUSE_CACHE_DIR"] = cache  # compile seconds are those of a first use
        print(datetime.date.today(), f"torch {torch.__version__}", platform.machine(), end=", ")
        print(torch.get_num_threads(), "thread(s)")
        data = digits()
        rows = []
        quiet = not sys.stderr.isatty()
        with tqdm(total=3 * STEPS * len(JOBS), unit="step", mininterval=5 if quiet else 0.1, ascii=quiet) as bar:
            for job in JOBS:
                rows.append(examine(job, data, bar))
            bar.set_description("trained")
    print_table(rows)
    picture = args.output / "demo.png"
    draw(rows, picture)
    print(f"\npicture: {picture}; {time.perf_counter() - started:.0f} s in all")
    wrong = [f"{r.name}: {problem}" for r in rows for problem in r.problems]
    if wrong:
        print("WRONG:", *wrong, sep="\n  ")
    else:
        print("every compiled run stayed with its eager twin, was fused, and compiled once")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
