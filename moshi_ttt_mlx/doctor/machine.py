"""The machine and the software on it: chip, memory, versions, lane."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .case import Case
from .finding import Finding, size


@dataclass(frozen=True)
class Machine:
    """Chip and memory.

    Attributes:
        chip: its name.
        cores: CPU cores that this process may use.
        memory: bytes of RAM, or of the container's share of it.
        usable: bytes that a model may take: on a Mac what Metal recommends for the GPU, elsewhere
            what is free now.
        usable_is: where `usable` comes from.
    """

    chip: str
    cores: int
    memory: int
    usable: int
    usable_is: str


def read_machine() -> Machine:
    """Ask the system.

    Raises:
        OSError, ValueError: it does not answer, or otherwise than expected.
    """
    return _mac() if sys.platform == "darwin" else _linux()


def _mac() -> Machine:
    chip, cores, memory = _sysctl("machdep.cpu.brand_string"), os.cpu_count() or 1, "hw.memsize"
    total = int(_sysctl(memory))
    info = _metal_info()
    usable = info.get("max_recommended_working_set_size")
    if usable:
        return Machine(chip, cores, total, int(usable), "Metal's recommended working set")
    return Machine(chip, cores, total, total, "all of the memory: Metal names no limit")


def _sysctl(name: str) -> str:
    command = ["sysctl", "-n", name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _metal_info() -> dict:
    import mlx.core as mx

    from ..device_memory import device_info

    return device_info() if mx.metal.is_available() else {}


def _linux(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Machine:
    lines = (proc / "cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    total, free = (1024 * int(memory[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    usable_is = "free now"
    if (limit := _container_limit(cgroup)) is not None and limit < total:
        total, free = limit, min(free, limit)
        usable_is = "free now, within the container's limit"
    chip = names[0] if names else platform.machine()
    return Machine(chip, len(os.sched_getaffinity(0)), total, free, usable_is)


def _container_limit(cgroup: Path) -> int | None:
    """Bytes that a container may use; None where nothing limits it."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = cgroup / name
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None


def check_versions(case: Case) -> Finding:
    """Python, MLX and the packages, and which of the two lanes they make."""
    from .. import __version__, lanes
    from ..errors import UserError

    seen = {"moshi-ttt-mlx": __version__, **lanes.describe()}
    packages = ("mlx", "moshi_mlx", "huggingface_hub", "numpy", "rustymimi", "sounddevice")
    listed = ", ".join(f"{name} {seen[name]}" for name in packages)
    line = f"moshi-ttt-mlx {__version__}, Python {seen['python']}, {seen['lane']} lane: {listed}"
    try:
        lanes.require_moshi_mlx()
    except UserError as error:
        return Finding("versions", "problem", str(error), seen)
    if seen["rustymimi"] == "missing":
        line += " (MLX runs the codec instead)"
    if seen["compile"] != "on":
        line += f"; compiled frames {seen['compile']}"
    return Finding("versions", "ok", line, seen)


def check_machine(case: Case) -> Finding:
    """Chip, cores and memory."""
    machine = read_machine()
    line = (
        f"{machine.chip}, {machine.cores} cores, {size(machine.memory)} of memory; "
        f"{size(machine.usable)} for models ({machine.usable_is})"
    )
    return Finding("machine", "ok", line, vars(machine) | {"system": platform.system()})
