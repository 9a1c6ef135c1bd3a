"""Runs compiled steps on kernels cross-compiled for aarch64, under an emulator, and compares them with eager steps.

    bash scripts/aarch64_check.sh

Everything of a step but its kernels runs here; a call of a kernel writes all memory that it is given to a file, runs
the kernel in `qemu-aarch64`, and takes the memory back. What this cannot show: times, and what else an aarch64 host has
(torch's own wheel, the native input check of npu_fuse_pass/lowerings/cpu/input_check.cpp).
"""

from __future__ import annotations

import copy
import ctypes
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import npu_fuse_pass
import optimizers
import optimizers.paddle
from npu_fuse_pass.lowerings.cpu.kernel import _TAGS, Kernel
from npu_fuse_pass.lowerings.cpu.tables import Args

COMPILER = ["aarch64-linux-gnu-g++", "-std=c++14", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
COMPILER += ["-fno-trapping-math", "-fno-strict-aliasing", "-w", "-mcpu=tsv110"]  # Kunpeng 920, beside most Ascend NPUs
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max"]
SIZES = {tag: dtype.itemsize for dtype, tag in _TAGS.items()}
SHAPES = [(300, 101), (3, 4), (), (70001,)]  # more than a chunk, more than one thread's share

MAIN = r"""
#include <cstdio>
#include <cstdlib>
// A file of: the size of an image of memory and the number of its pointers; where they are; the image, Args first.
int main(int, char** argv) {
  FILE* f = fopen(argv[1], "r+b");
  int64_t head[2];
  if (!f || fread(head, 8, 2, f) != 2) return 2;
  int64_t* at = (int64_t*)malloc(8 * head[1]);
  char* image = (char*)aligned_alloc(64, head[0]);
  if (fread(at, 8, head[1], f) != size_t(head[1]) || fread(image, 1, head[0], f) != size_t(head[0])) return 3;
  for (int64_t i = 0; i < head[1]; ++i) *(char**)(image + at[i]) = image + *(int64_t*)(image + at[i]);
  FUNCTION((const Args*)image);
  fseek(f, 16 + 8 * head[1], SEEK_SET);
  return fwrite(image, 1, head[0], f) == size_t(head[0]) && !fclose(f) ? 0 : 4;
}
"""


class Image:
    """A copy of the memory that a kernel is given, with offsets instead of addresses."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.pointers: list[int] = []
        self._places: dict[int, tuple[int, int]] = {}  # address -> offset and size

    def add(self, address: int, size: int) -> int:
        """The offset of a piece of memory, which is copied once."""
        offset, known = self._places.get(address, (0, -1))
        if size <= known:
            return offset
        offset = len(self.data)
        self._places[address] = offset, size
        self.data += ctypes.string_at(address, size) + bytes(-size % 64)
        return offset

    def point(self, at: int, to: int) -> None:
        self.data[at : at + 8] = struct.pack("<q", to)
        self.pointers.append(at)

    def take_back(self, data: bytes) -> None:
        """Put the memory that is no list of pointers back where it came from."""
        pointers = set(self.pointers)
        for address, (offset, size) in self._places.items():
            if not any(at in pointers for at in range(offset, offset + size, 8)):
                ctypes.memmove(address, data[offset : offset + size], size)


def image_of(kernel: Kernel) -> Image:
    """Args, its arrays, and the tensors and scalars that these point to."""
    tables, image = kernel._tables, Image()
    image.add(ctypes.addressof(tables.args), ctypes.sizeof(Args))
    for name, items in tables._arrays.items():
        image.point(getattr(Args, name).offset, image.add(items.buffer_info()[0], len(items) * items.itemsize))
    for columns, table in ((kernel._columns, tables.tensors), (kernel._scalar_columns, tables.scalars)):
        offset = image.add(table.buffer_info()[0], len(table) * 8)
        for column in columns:
            for m in (m for m in range(kernel._n) if tables.active[m]):
                at = column.part.start + m
                tensor = columns is kernel._columns
                size = kernel._numels[m] * column.dtype.itemsize if tensor else SIZES[tables.tags[at]]
                image.point(offset + 8 * at, image.add(table[at], size))
    return image


class Emulator:
    """Runs kernels; `programs` are those that were compiled, `calls` counts."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.calls, self.programs = folder, 0, dict[tuple[str, str], pathlib.Path]()

    def call(self, kernel: Kernel, function: Callable[..., None], threads: int) -> None:
        """In the place of `Kernel.call`."""
        kernel._tables.share(threads)
        image, file = image_of(kernel), self.folder / "memory"
        pointers = struct.pack(f"<{2 + len(image.pointers)}q", len(image.data), len(image.pointers), *image.pointers)
        file.write_bytes(pointers + image.data)
        _run([*EMULATOR, self._program(kernel, function.__name__), file])
        image.take_back(file.read_bytes()[len(pointers) :])
        self.calls += 1

    def _program(self, kernel: Kernel, function: str) -> pathlib.Path:
        key = (kernel.source.text, function)
        if key not in self.programs:
            path = self.folder / f"program_{len(self.programs)}"
            source = path.with_suffix(".cpp")
            source.write_text(kernel.source.text + MAIN.replace("FUNCTION", function))
            _run([*COMPILER, source, "-o", path])
            self.programs[key] = path
        return self.programs[key]


def _run(command: list[Any]) -> None:
    """Run a program; end at once where it fails, because an interrupted step would be tried again."""
    if subprocess.run(command, check=False).returncode:
        print("WRONG: failed:", *command, flush=True)
        os._exit(1)


def paddle(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return optimizers.paddle.RMSProp(lr, parameters=params, momentum=0.9, centered=True)


Make = Callable[..., torch.optim.Optimizer]
RULES: dict[str, tuple[Make, dict[str, Any]]] = {
    "NpuFusedAdam": (optimizers.NpuFusedAdam, dict(weight_decay=0.1)),
    "NpuFusedAdamW, amsgrad": (optimizers.NpuFusedAdamW, dict(amsgrad=True)),
    "NpuFusedSGD, nesterov": (optimizers.NpuFusedSGD, dict(momentum=0.9, nesterov=True)),
    "NpuFusedRMSpropTF, centered": (optimizers.NpuFusedRMSpropTF, dict(momentum=0.9, centered=True, eps=1e-3)),
    "NpuFusedLamb, global norm": (optimizers.NpuFusedLamb, dict(weight_decay=0.1, use_global_grad_norm=True)),
    "lion": (optimizers.lion, {}),
    "paddle.RMSProp": (paddle, {}),
}
STOCK: dict[str, tuple[Make, dict[str, Any]]] = {
    "torch.optim.Adam, foreach": (torch.optim.Adam, dict(foreach=True)),
    "torch.optim.NAdam, loop": (torch.optim.NAdam, dict(foreach=False)),
    "torch.optim.ASGD, foreach": (torch.optim.ASGD, dict(foreach=True)),
}
# Relative to the tensor's largest element, after three steps; half precision: two units in the last place.
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def difference(make: Make, options: dict[str, Any], dtype: torch.dtype) -> float:
    """The largest relative difference of parameters and states between an eager run and one on emulated kernels."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    others = copy.deepcopy(params)
    eager, fused = make(params, lr=0.02, **options), make(others, lr=0.02, **options)
    step = torch.compile(fused.step, backend="npu_fused")
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.clone()
        eager.step()
        step()
    report = npu_fuse_pass.reports()[-1]
    assert report.fallback is None and not report.unfused, str(report)
    pairs = [(p.detach(), q.detach()) for p, q in zip(params, others, strict=True)]
    for p, q in zip(params, others, strict=True):
        pairs += [(eager.state[p][name], fused.state[q][name]) for name in eager.state[p] if name != "step"]
    return max(float((a.double() - b.double()).abs().max() / (a.abs().max().double() + 1e-3)) for a, b in pairs)


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(pathlib.Path(folder))
        Kernel.call = lambda self, function, threads: emulator.call(self, function, max(2, threads))  # type: ignore[method-assign]
        cases = [(name, case, dtype) for name, case in RULES.items() for dtype in (torch.float32, torch.bfloat16)]
        cases += [(name, case, torch.float32) for name, case in STOCK.items()]
        cases += [(n, RULES[n], dtype) for n in list(RULES)[::4] for dtype in (torch.float64, torch.float16)]
        for name, case, dtype in cases:
            before = emulator.calls
            found = difference(*case, dtype)
            good = found <= LIMITS[dtype] and emulator.calls > before
            failed += not good
            print(
                f"{'ok' if good else 'WRONG':5}  {name}, {dtype}: {found:.2g}, {emulator.calls - before} calls",
                flush=True,
            )
        print(
            f"{len(cases)} cases, {failed} wrong; {len(emulator.programs)} programs of aarch64, {emulator.calls} calls"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
