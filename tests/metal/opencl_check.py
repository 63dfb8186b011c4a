"""Check generated Metal with clang's C++ for OpenCL front end: address spaces, and what MSL forbids.

The emulator is C++, where a lambda, `std::` or a `double` compile; Metal's ancestor is OpenCL, whose
front end knows `__global` from `__local` and refuses most of what Metal refuses. Syntax only: no
code is made. Lines in messages are those of the Metal text.
"""

import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CLANG = next(
    filter(None, map(shutil.which, ["clang", *(f"clang-{v}" for v in range(22, 13, -1))])), None
)
FLAGS = [
    *("-x", "cl", "-cl-std=clc++1.0", "-target", "spir64", "-fsyntax-only"),
    *("-Xclang", "-finclude-default-header", "-cl-single-precision-constant"),
    *("-Werror=double-promotion", "-Werror=uninitialized", f"-I{HERE}"),
]


def to_opencl(source: str) -> str:
    """The Metal text of one kernel (`metal_emulator.metal_source`) as C++ for OpenCL."""
    instance = re.search(r"template \[\[host_name.*?decltype\(\w+<(.*?)>\)", source, re.S)
    values = [a.strip() for a in instance[1].split(",")] if instance else []
    source = source[: instance.start()] if instance else source
    at = source.index("[[kernel]] void")
    start = source.rfind("template <", 0, at) if instance else at
    names = [n.split()[-1] for n in source[start:at].strip()[10:-1].split(",")] if instance else []
    # A kernel is no template in OpenCL. The blank lines keep the count of lines.
    blank = "\n" * source[start:at].count("\n")
    defines = "".join(f"#define {n} {v}\n" for n, v in zip(names, values, strict=True))
    kernel = source[at:].replace("[[kernel]] void", "__kernel void")
    kernel = re.sub(r"\s*\[\[(buffer\(\d+\)|\w+)\]\]", "", kernel)
    kernel = re.sub(r"constant (\w+)& (\w+)", r"constant \1* \2", kernel)
    undefines = "".join(f"#undef {n}\n" for n in names)
    head = re.sub(r"^\s*#\s*(pragma|include).*$", "", source[:start], flags=re.M)
    line = head.count("\n") + 1
    return (
        f'#include "opencl_metal.h"\n#line 1 "metal"\n{head}\n{defines}'
        f'#line {line} "metal"\n{blank}{kernel}\n{undefines}'
    )


def complaints(source: str) -> list[str]:
    """What clang has against the Metal text of one kernel; nothing if it is right."""
    done = subprocess.run(
        [CLANG, *FLAGS, "-"], input=to_opencl(source), capture_output=True, text=True
    )
    if not done.returncode:
        return []
    return [line for line in done.stderr.splitlines() if "error:" in line] or [done.stderr]
