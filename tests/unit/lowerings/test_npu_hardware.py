"""Everything that needs CANN, behind one interface: with stand-ins for its compiler, its runtime and its callbacks.

Nobody has launched a generated kernel on an NPU; what is shown here is what this package asks of CANN.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import struct
import sys
import types
from typing import Any

import pytest
import torch

import npu_fuse_pass
from npu_fuse_pass import lower
from npu_fuse_pass.__main__ import main
from npu_fuse_pass.ir.text import parse
from npu_fuse_pass.ir.types import Grouped
from npu_fuse_pass.lowerings.kernels import cache
from npu_fuse_pass.lowerings.npu.emit.split import split_whole
from npu_fuse_pass.lowerings.npu.graph import generated
from npu_fuse_pass.lowerings.npu.kernels import ascend, choice, compiler, proof
from npu_fuse_pass.lowerings.npu.kernels.compiler import Refused
from npu_fuse_pass.lowerings.npu.kernels.generate import Kernel, generate
from npu_fuse_pass.options import Options, Target

TARGET = "Ascend910B2"
IR = """// -----// IR Dump Before ConvertHIVMToStandard (convert-hivm-to-std) //----- //
module { // "VECTOR_CORE_COUNT", 48 : i32 ffts_base_address
}
"""


def kernel() -> Kernel:
    lines = ("slot 0: f32", "slot 1: f32", "slot 2: scalar", "%0: f32 = cast($2, f32)", "%1: f32[] = mul(%0, $1)",
             "%2: f32[] = sub($0, %1)", "write $0 = %2")  # fmt: skip
    (made,) = generate("update_ab", split_whole(parse("\n".join(lines)), ()), 1024).launches
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("NPU_FUSE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "BISHENG_INSTALL_PATH"):
        monkeypatch.delenv(name, raising=False)
    compiler._version.cache_clear()
    return tmp_path


def install(folder: pathlib.Path, status: int = 0, version: str = "1.2", says: str = IR) -> pathlib.Path:
    """Programs of the compiler's names: they note how they are called, print IR, and write a binary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "says").write_text(says)
    script = f"""#!/bin/sh
[ "$1" = --version ] && echo "bishengir {version}" && exit 0
echo "$@" >> {folder}/calls
command -v hivmc >> {folder}/calls
cat {folder}/says >&2
while [ "$1" != -o ]; do shift; done
[ {status} = 0 ] && printf 'ELF of %s' "{version}" > "$2"
exit {status}
"""
    for name in ("bishengir-compile", "hivmc"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def calls(folder: pathlib.Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("variable", ["BISHENG_INSTALL_PATH", "PATH", "ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_cann_s_compiler_is_found(variable: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = "tools/bishengir/bin" if variable.startswith("ASCEND") else ""
    folder = install(tmp_path / "cann" / below)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}" if variable == "PATH" else str(tmp_path / "cann")
    monkeypatch.setenv(variable, path)
    found = compiler.find(TARGET)
    assert (found.program, found.last) == (str(folder / "bishengir-compile"), str(folder / "hivmc"))


def test_a_binary_is_compiled_once_and_its_key_holds_the_versions(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path / "cann")
    monkeypatch.setenv("BISHENG_INSTALL_PATH", str(folder))
    for _ in range(2):
        found = compiler.find(TARGET, "CANN 9.0")
        assert found.binary("module {}") == b"ELF of 1.2"
        assert "VECTOR_CORE_COUNT" in found.last_ir("module {}")
    command, last = calls(folder)
    assert f"--target={TARGET}" in command and "--enable-auto-multi-buffer=true" in command
    assert last == str(folder / "hivmc")
    kinds = {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert kinds == {".o", ".ir", ".sha256"}
    assert compiler.find(TARGET, "CANN 9.1").binary("module {}") and len(calls(folder)) == 4
    assert compiler.find("Ascend910B3", "CANN 9.0").binary("module {}") and len(calls(folder)) == 6
    install(folder, version="1.3")
    compiler._version.cache_clear()
    assert compiler.find(TARGET, "CANN 9.0").binary("module {}") == b"ELF of 1.3"
    cache.clear_cache()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


CRASHES = """case " $* " in *" --enable-vf-fusion=false "*) ;; *) kill -ABRT $$ ;; esac
"""


def test_another_way_for_950_where_its_compiler_crashes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path / "cann")
    for name in ("bishengir-compile", "hivmc"):
        text = (folder / name).read_text().replace("cat ", CRASHES + "cat ")
        for kind in ("", "-a5"):
            (folder / f"{name}{kind}").write_text(text)
            (folder / f"{name}{kind}").chmod(0o755)
    monkeypatch.setenv("BISHENG_INSTALL_PATH", str(folder))
    assert compiler.find("Ascend950PR_9599").binary("module {}") == b"ELF of 1.2"
    commands = [line for line in calls(folder) if line.startswith("kernel.mlir")]
    assert ["--enable-vf-fusion=false" in line for line in commands] == [False, True]
    with pytest.raises(Refused):
        compiler.find(TARGET).binary("module {}")


def test_a_binary_that_somebody_changed_is_compiled_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install(tmp_path / "cann")
    monkeypatch.setenv("BISHENG_INSTALL_PATH", str(folder))
    compiler.find(TARGET).binary("module {}")
    (binary,) = (tmp_path / "cache").rglob("*.o")
    binary.write_bytes(b"something else")
    assert compiler.find(TARGET).binary("module {}") == b"ELF of 1.2" and len(calls(folder)) == 4


def test_refusals_say_what_is_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_wheel", lambda: "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(Refused, match=r"bishengir-compile was not found: source CANN's set_env\.sh"):
        compiler.find(TARGET)
    with pytest.raises(Refused, match="no target of the name Ascend310"):
        compiler.find("Ascend310")
    folder = install(tmp_path / "cann", status=1, says=IR + "[ERROR] loc(1): error: UB overflow\n")
    monkeypatch.setenv("BISHENG_INSTALL_PATH", str(folder))
    with pytest.raises(Refused, match=r"does not take this kernel.*UB overflow"):
        compiler.find(TARGET).binary("module {}")
    (folder / "bishengir-compile").write_text("no program")
    with pytest.raises(Refused, match=r"bishengir-compile cannot be run|does not take this kernel"):
        compiler.find(TARGET).last_ir("module {}")
    (folder / "hivmc").unlink()
    with pytest.raises(Refused, match="no hivmc beside"):
        compiler.find(TARGET).binary("module {}")
    with pytest.raises(Refused, match="cannot load or launch kernels"):
        ascend.AclRuntime(types.SimpleNamespace())


class FakeRuntime:
    def __init__(self) -> None:
        self.loaded: list[tuple[bytes, str]] = []
        self.launched: list[tuple[int, int, bytes]] = []

    def load(self, binary: bytes, name: str) -> int:
        self.loaded.append((binary, name))
        return 77

    def sync_address(self) -> int:
        return 0xFF75

    def launch(self, function: int, blocks: int, arguments: bytes) -> None:
        self.launched.append((function, blocks, arguments))


def test_a_launch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One load, however often it runs; no more blocks than rows or cores; arguments as the last IR takes them."""
    monkeypatch.setenv("BISHENG_INSTALL_PATH", str(install(tmp_path / "cann")))
    runtime, made = FakeRuntime(), kernel()
    machine = ascend.Ascend(compiler.find(TARGET), runtime, False)
    for _ in range(2):
        machine.load(made)
    assert runtime.loaded == [(b"ELF of 1.2", "update_ab")]
    pointers = list(range(100, 100 + len(made.pointers)))
    for rows in (3, 1000):
        machine(made, [*pointers, *(9 for _ in made.integers)], rows)
    for (function, blocks, arguments), expected in zip(runtime.launched, (3, 48), strict=True):
        count = 3 + len(pointers)
        found = struct.unpack(f"<{count}Q{len(made.integers) + 3}i", arguments)
        assert (function, blocks) == (77, expected)
        assert list(found[:count]) == [0xFF75, 0, 0, *pointers]
        assert list(found[count:]) == [*(9 for _ in made.integers), expected, 1, 1]


class FakeAcl:
    """libascendcl.so: every function notes its arguments, and answers with a status."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls = status, dict[str, tuple[Any, ...]]()

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.calls[name] = arguments
            return self.status

        return function


def test_what_is_asked_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = types.SimpleNamespace(npu_stream=4242)
    npu = types.SimpleNamespace(current_stream=lambda: stream)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: npu)
    acl = FakeAcl()
    runtime = ascend.AclRuntime(acl)
    runtime.load(b"ELF\0binary", "update_ab")
    data, size, options, _ = acl.calls["aclrtBinaryLoadFromData"]
    assert (data.value, size.value) == (b"ELF", 10)  # a pointer to all ten bytes, which is shown up to the zero
    option = options._obj.options[0]
    assert (options._obj.count, option.type, option.value[0]) == (1, 2, 0x41415246)
    assert acl.calls["aclrtBinaryGetFunction"][1].value == b"update_ab"
    runtime.launch(77, 40, b"x" * 24)
    given = acl.calls["aclrtLaunchKernelWithHostArgs"]
    assert [getattr(a, "value", a) for a in given] == [77, 40, 4242, None, b"x" * 24, 24, None, 0]
    with ascend.on_stream(11):
        runtime.launch(77, 40, b"x")
    assert acl.calls["aclrtLaunchKernelWithHostArgs"][2].value == 11
    assert isinstance(given[0], ctypes.c_void_p) and isinstance(given[1], ctypes.c_uint32)
    failing = ascend.AclRuntime(FakeAcl(507015))
    for what in (lambda: failing.load(b"x", "f"), failing.sync_address, lambda: failing.launch(1, 1, b"")):
        with pytest.raises(Refused, match="answers 507015"):
            what()


def test_what_ge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """GE's interface for custom operations in Python, as its documents have it."""
    told: dict[str, Any] = {}
    refs: list[tuple[int, int]] = []
    context = types.SimpleNamespace(get_stream=lambda: 5, make_output_ref_input=lambda i, k: refs.append((i, k)))

    def register_op(op_type: str, mutates_args: tuple[str, ...]) -> Any:
        return lambda infer: told.update(op=(op_type, mutates_args), infer=infer) or infer

    def register_op_impl(op_type: str) -> Any:
        return lambda made: told.update(impl=(op_type, made)) or made

    custom_op = types.SimpleNamespace(
        register_op=register_op, register_op_impl=register_op_impl, get_execute_ctx=lambda: context
    )
    generated._serve.__wrapped__(custom_op, types.SimpleNamespace(TensorDesc=object))  # as for the first time
    assert told["op"] == (generated.TYPE, ("written",)) == (told["impl"][0], ("written",))
    assert told["infer"](["w"], ["r"], "n", kernel="k") == ["w"]
    called: list[Any] = []
    monkeypatch.setattr(generated, "call", lambda *given: called.append((*given, ascend.current_stream())))
    tensors = [types.SimpleNamespace(addr=k) for k in range(4)]
    told["impl"][1]().execute(tensors[:2], tensors[2:3], tensors[3], kernel="update_ab.0")
    assert refs == [(0, 0), (1, 1)]
    assert called == [("update_ab.0", [0, 1], [2], 3, 5)]


MACHINE = {"chip": TARGET, "CANN": "9.0", "torch_npu": "2.13.0", "npu_fuse_pass": "0.1.0 abc"}


def test_a_record_is_trusted_as_a_kernel_is(own_cache: pathlib.Path) -> None:
    assert not proof.proven(MACHINE)
    assert proof.record(MACHINE, 17) == ""
    assert proof.proven(MACHINE)
    assert not proof.proven({**MACHINE, "CANN": "9.1"})
    (record,) = own_cache.rglob("*.proof")
    record.write_text(record.read_text().replace("17", "18"))
    assert not proof.proven(MACHINE)
    assert proof.record(MACHINE, 17) == "" and proof.proven(MACHINE)
    proof.withdraw(MACHINE)
    assert not proof.proven(MACHINE) and not list(own_cache.rglob("*.proof"))


def test_kernels_to_look_at_without_torch_npu(
    own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an NPU nor CANN nor torch_npu is needed to see what they are and what they move; the original runs."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr(compiler, "_wheel", lambda: "")
    given = ["NpuFusedLamb", "--params", "3", "--shape", "8", "--platform", "npu", "--out", str(own_cache / "dump")]
    assert main(["dump", *given]) == 0
    said = capsys.readouterr().out
    assert "generated NPU kernel" in said and "kernels are only shown" in said
    (row,) = npu_fuse_pass.reports()[-1].groups
    assert (row.bytes_per_element, row.launches) == (40, 2)
    assert "a guess; not compiled" in row.note
    assert "torch_npu" in str(npu_fuse_pass.reports()[-1].fallback)
    (file,) = (own_cache / "dump").rglob("06_npu_kernel.mlir")
    text = file.read_text()
    assert text.count("func.func @update_") == 2 and text.count("no last IR: there is no compiler") == 2
    with pytest.raises(npu_fuse_pass.PlatformError, match='platform "npu" needs torch_npu'):
        lower.lower(Grouped(), Target("npu"), Options(kernels="generated"))  # nothing to look at: it cannot run


@pytest.mark.parametrize(
    ("error", "told"), [(Refused("no hivmc"), "no hivmc"), (OSError("no driver"), "OSError: no driver")], ids=str
)
def test_the_forms_of_every_option(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascend, "machine", lambda: MACHINE)
    assert choice.choose("operations").forms == ("operations", "elementwise")
    assert choice.choose("dedicated").forms == ("dedicated", "elementwise")
    assert choice.choose("elementwise").forms == ("elementwise",)

    def refuse() -> Any:
        raise error

    monkeypatch.setattr(ascend, "current", refuse)
    for option in ("auto", "generated"):
        proof.record(MACHINE, 17)
        found = choice.choose(option)
        assert (found.forms, found.hardware, found.why) == (
            ("operations", "elementwise"), None, f"no generated kernels: {told}",
        )  # fmt: skip
    monkeypatch.setattr(ascend, "current", lambda: "here")
    assert choice.choose("auto").forms == ("generated", "operations", "elementwise")
    proof.withdraw(MACHINE)
    assert choice.choose("auto").forms == ("operations", "elementwise")
    assert choice.choose("generated").forms[0] == "generated"
