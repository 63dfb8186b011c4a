"""Run `mx.fast.metal_kernel` kernels on any Linux machine: MLX writes the Metal, g++ runs it.

What lives here: `metal_kernel`, a stand-in with the signature of `mx.fast.metal_kernel`, and the
steps it is made of: `metal_source` (the text MLX generates), `to_cpp` (MSL as C++) and `run` (build,
run, read back). What does not: the machine itself (`metal_emulator.h`) and the check of address
spaces by clang (`opencl_check.py`).

Example:
    def test_double(monkeypatch):
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_emulator.metal_kernel)
        assert mx.array_equal(my_package.double(x), 2 * x)      # x may be a CPU array

See README.md for what is checked and what is not.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
BUILD = Path(tempfile.gettempdir()) / f"metal_emulator_{os.getuid()}"
# MSL has no double, and reading a variable that has no value is a bug there too.
FLAGS = [
    *("-std=c++17", "-O1", "-fno-strict-aliasing", "-fsingle-precision-constant", "-Werror"),
    *("-Wdouble-promotion", "-Wuninitialized", "-Wmaybe-uninitialized", "-Wno-attributes"),
]

# Taken before a test puts the stand-in in its place.
_MLX_KERNEL = mx.fast.metal_kernel


def _unavailable() -> str | None:
    if tuple(map(int, version("mlx").split(".")[:2])) < (0, 32):
        return "the Metal emulator takes its text from mlx >= 0.32"
    if sys.platform != "linux" or not shutil.which("g++"):
        return "the Metal emulator needs Linux and g++"
    return None


# Why the tool cannot work here, for tests to skip with; None where it can.
UNAVAILABLE = _unavailable()


class MetalError(AssertionError):
    """A fault in a kernel: it does not compile, or it did something Metal leaves undefined."""


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    **options,
) -> Callable:
    """Stand in for `mx.fast.metal_kernel`: same arguments, same call, runs at once on the CPU.

    The call returns evaluated arrays, so it works neither inside `mx.compile` nor with gradients.
    `verbose` is ignored, `stream` is not accepted.

    Raises (in the call):
        MetalError: see the class; the message quotes the line of the generated Metal.
    """
    kernel = _MLX_KERNEL(name, input_names, output_names, source, header, **options)

    def call(
        *,
        inputs: Sequence,
        output_shapes: Sequence,
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
    ) -> list[mx.array]:
        inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]

        def traced(*arrays):
            return kernel(
                inputs=list(arrays),
                output_shapes=output_shapes,
                output_dtypes=output_dtypes,
                grid=grid,
                threadgroup=threadgroup,
                template=template,
                init_value=init_value,
                verbose=True,
            )

        outputs = [
            mx.zeros(shape, dtype) if init_value is None else mx.full(shape, init_value, dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        return run(
            metal_source(traced, *inputs),
            dict(zip(input_names, inputs, strict=True)),
            dict(zip(output_names, outputs, strict=True)),
            grid,
            threadgroup,
            initialized=init_value is not None,
        )

    return call


def metal_source(call: Callable, *arrays: mx.array) -> str:
    """The Metal text that MLX generates for `call(*arrays)`, a function of one verbose kernel.

    A kernel cannot be called without a GPU, but `mx.export_function` traces it, and `verbose=True`
    makes MLX print the text, template instance and all, to standard output.
    """
    with tempfile.TemporaryFile() as captured, tempfile.TemporaryDirectory() as folder:
        saved = os.dup(1)
        os.dup2(captured.fileno(), 1)
        try:
            mx.export_function(f"{folder}/kernel.mlxfn", call, *arrays)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        captured.seek(0)
        return captured.read().decode().split("```")[1]


# -- Metal to C++ ---------------------------------------------------------------------------------

_POINTER = re.compile(r"(const\s+)?\b(device|constant|threadgroup)\s+(const\s+)?([\w:]+)\s*\*")
_SCALAR = re.compile(r"(?:const\s+)?constant\s+([\w:]+)\s*&")
_ARRAY = re.compile(r"\bthreadgroup\s+([\w:]+)\s+(\w+)\s*((?:\[[^\];]+\])+)\s*;")
_PARAMETER = re.compile(
    r"(?P<space>device|constant)\s+(?P<type>\w+)\s*(?P<kind>[*&])\s*(?P<name>\w+)\s*\[\[buffer"
)
_ATTRIBUTE = re.compile(r"(?:uint3|uint)\s+(\w+)\s*\[\[(\w+)\]\]")
_INSTANCE = re.compile(r"template \[\[host_name.*?decltype\((.*?)\) ", re.S)


def to_cpp(source: str) -> str:
    """Metal text as C++ for `metal_emulator.h`, line by line.

    Pointers become checked ones that keep their address space, threadgroup arrays become calls that
    allocate them. The rest of MSL is C++ as it stands.
    """

    def array(match):
        array.count += 1
        sizes = ", ".join(re.findall(r"\[([^\]]+)\]", match[3]))
        return f"auto {match[2]} = emu::threadgroup_array<{match[1]}, {sizes}>({array.count});"

    def pointer(match):
        const = "const " if match[1] or match[3] or match[2] == "constant" else ""
        return f"emu::Pointer<{const}{match[4]}, emu::{match[2].capitalize()}>"

    array.count = 0
    source = re.sub(r"^\s*#\s*(pragma|include).*$", "", source, flags=re.M)
    source = re.sub(r"\[\[buffer\(\d+\)\]\]|\[\[\w+\]\]", "", source)
    return _POINTER.sub(pointer, _ARRAY.sub(array, _SCALAR.sub(r"const \1&", source)))


def _program(source: str, inputs: dict, outputs: dict, grid, threadgroup, initialized: bool) -> str:
    """The C++ program that reads all buffers from a file, runs the grid and writes the outputs."""
    instance = _INSTANCE.search(source)
    name = instance[1] if instance else re.search(r"\[\[kernel\]\] void (\w+)", source)[1]
    text = source[: instance.start()] if instance else source
    head = text[text.index(f"void {name.split('<')[0]}(") :]
    head = head[: head.index(") {")]
    args, buffers = [], inputs | outputs
    lines = [
        'FILE* infile = std::fopen(argv[1], "rb");',
        'FILE* outfile = std::fopen(argv[2], "wb");',
    ]
    for p in _PARAMETER.finditer(head):
        a, output = buffers[p["name"]], str(p["name"] in outputs).lower()
        lines.append(
            f'emu::Buffer b_{p["name"]}("{p["name"]}", {a.size}, {a.itemsize}, {output}, '
            f"{str(initialized).lower()}, infile);"
        )
        const = "" if p["name"] in outputs else "const "
        args.append(
            f"b_{p['name']}.scalar<{p['type']}>()"
            if p["kind"] == "&"
            else f"b_{p['name']}.pointer<{const}{p['type']}, emu::{p['space'].capitalize()}>()"
        )
    args += [f"emu::attribute::{a}()" for _, a in _ATTRIBUTE.findall(head)]
    dims = ", ".join(f"{{{x}, {y}, {z}}}" for x, y, z in (grid, threadgroup))
    lines.append(f"emu::launch({dims}, [&] {{ {name}({', '.join(args)}); }});")
    lines += [f"b_{o}.finish(outfile);" for o in outputs] + ["std::fclose(outfile);"]
    body = "\n  ".join(lines)
    return (
        f'#include "metal_emulator.h"\n#pragma GCC poison double\n#line 1 "metal"\n{to_cpp(text)}\n'
        f"#undef device\n#undef constant\n#undef thread\n#undef kernel\n"
        f"int main(int, char** argv) {{\n  {body}\n}}\n"
    )


# -- building and running -------------------------------------------------------------------------


def _compile(args: list, target: Path) -> None:
    """Run g++ so that several processes may build the same thing at once."""
    with tempfile.NamedTemporaryFile(dir=BUILD, delete=False) as part:
        done = subprocess.run(["g++", *FLAGS, *args, "-o", part.name], capture_output=True)
    if done.returncode:
        Path(part.name).unlink(missing_ok=True)
        raise MetalError("does not compile:\n" + done.stderr.decode()[:4000])
    os.replace(part.name, target)


def _header_folder() -> Path:
    """A folder with the header precompiled: a kernel then builds in a third of the time."""
    text = (HERE / "metal_emulator.h").read_bytes()
    folder = BUILD / hashlib.sha256(text + repr(FLAGS).encode()).hexdigest()[:16]
    if not (folder / "metal_emulator.h.gch").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metal_emulator.h").write_bytes(text)
        _compile(["-x", "c++-header", HERE / "metal_emulator.h"], folder / "metal_emulator.h.gch")
    return folder


def build(program: str) -> Path:
    """The executable of a C++ program; built once per text.

    Raises:
        MetalError: with g++'s messages; they count lines of the Metal text.
    """
    folder = _header_folder()
    target = folder / hashlib.sha256(program.encode()).hexdigest()[:16]
    if not target.exists():
        text = target.with_suffix(f".{os.getpid()}.cpp")
        text.write_text(program)
        _compile(["-I", folder, text], target)
        text.unlink()
    return target


def run(
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, mx.array],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    initialized: bool = False,
) -> list[mx.array]:
    """Run Metal text from `metal_source`.

    Args:
        source: the text of one kernel.
        inputs, outputs: arrays by parameter name; of outputs, what they hold before the run.
        grid, threadgroup: sizes in threads, as `mx.fast.metal_kernel` takes them.
        initialized: whether what outputs hold counts as written.

    Returns:
        The outputs after the run, in order.

    Raises:
        MetalError: see the class.
    """
    inputs = inputs | _shapes(inputs)
    needed = [name for name in inputs if re.search(rf"\b{name} \[\[buffer", source)]
    inputs = {name: inputs[name] for name in needed}
    exe = build(_program(source, inputs, outputs, grid, threadgroup, initialized))
    order = {p["name"]: None for p in _PARAMETER.finditer(source)}
    buffers = inputs | outputs
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").write_bytes(b"".join(_bytes(buffers[name]) for name in order))
        done = subprocess.run([exe, f"{folder}/in", f"{folder}/out"], capture_output=True)
        if done.returncode:
            raise MetalError(_quoting(source, done.stderr.decode() or f"exit {done.returncode}"))
        raw = Path(folder, "out").read_bytes()
    return _parse(raw, outputs)


def _shapes(inputs: dict[str, mx.array]) -> dict[str, mx.array]:
    """The parameters that MLX adds where a source mentions an input's shape."""
    extra = {}
    for name, a in inputs.items():
        strides = np.cumprod([1, *a.shape[:0:-1]])[::-1]
        extra[f"{name}_shape"] = mx.array(a.shape, dtype=mx.int32)
        extra[f"{name}_strides"] = mx.array(strides.tolist(), dtype=mx.int64)
        extra[f"{name}_ndim"] = mx.array(a.ndim, dtype=mx.int32)
    return extra


def _bytes(a: mx.array) -> bytes:
    # numpy has no bfloat16, so every array goes as plain bytes.
    return np.array(mx.contiguous(a).reshape(-1).view(mx.uint8)).tobytes() if a.size else b""


def _parse(raw: bytes, outputs: dict[str, mx.array]) -> list[mx.array]:
    arrays, at = [], 0
    for like in outputs.values():
        part = np.frombuffer(raw, np.uint8, like.nbytes, at)
        arrays.append(mx.array(part).view(like.dtype).reshape(like.shape))
        at += like.nbytes
    return arrays


def _quoting(source: str, message: str) -> str:
    lines, found = source.splitlines(), re.search(r"line (\d+)", message)
    if found and int(found[1]) <= len(lines):
        message += f"    {lines[int(found[1]) - 1].strip()}"
    return message.strip()
