"""The two lanes: what the package says about them, and what the set-up scripts choose."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from moshi_ttt_mlx import lanes
from moshi_ttt_mlx.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CPU_ONLY_LINUX = sys.platform == "linux" and mx.default_device().type == mx.cpu
FUSED = """
import mlx.core as mx
x = mx.compile(lambda x: mx.exp(x) * x + 1.0)(mx.array([1.0, 2.0]))
print(x.tolist())
"""


@pytest.mark.parametrize(
    ("version", "lane"),
    [("0.26.5", "floor"), ("0.27.0", "modern"), ("0.32.4.dev1", "modern"), ("1.0", "modern")],
)
def test_lane_goes_by_the_mlx_version(monkeypatch, version, lane):
    monkeypatch.setattr(mx, "__version__", version)
    assert lanes.lane() == lane


def test_describe_names_what_runs():
    seen = lanes.describe()
    assert seen["lane"] in ("floor", "modern")
    assert seen["mlx"].startswith(mx.__version__)
    assert seen["moshi_mlx"] == lanes.MOSHI_MLX.partition("==")[2]
    assert seen["device"] in ("cpu", "gpu")
    assert all(isinstance(value, str) for value in json.loads(json.dumps(seen)).values())


def test_describe_says_which_package_is_missing(monkeypatch):
    monkeypatch.setattr(lanes, "_PACKAGES", ("no-such-package",))
    assert lanes.describe()["no-such-package"] == "missing"


def test_moshi_mlx_is_required_once_and_the_same_everywhere():
    lines = (ROOT / "requirements" / "floor.txt").read_text().splitlines()
    pins = [line.partition(";")[0] for line in lines if not line.startswith("#")]
    assert pins == [lanes.MOSHI_MLX]


def test_moshi_mlx_there_is_no_error():
    lanes.require_moshi_mlx()


@pytest.mark.parametrize(
    ("python", "mlx", "has_pip", "command"),
    [
        ((3, 14), "0.32.4", True, f"{sys.executable} -m pip install --no-deps moshi_mlx==0.3.0"),
        ((3, 12), "0.32.4", True, f"{sys.executable} -m pip install --no-deps moshi_mlx==0.3.0"),
        ((3, 12), "0.26.5", True, f"{sys.executable} -m pip install moshi_mlx==0.3.0"),
        ((3, 13), "0.26.5", False, "uv pip install --no-deps moshi_mlx==0.3.0"),
    ],
)
def test_moshi_mlx_missing_names_the_one_command(monkeypatch, python, mlx, has_pip, command):
    monkeypatch.setitem(sys.modules, "moshi_mlx", None)
    found = lanes.importlib.util.find_spec
    spec = found("json") if has_pip else None
    monkeypatch.setattr(
        lanes.importlib.util, "find_spec", lambda name: spec if name == "pip" else found(name)
    )
    monkeypatch.setattr(sys, "version_info", python)
    monkeypatch.setattr(mx, "__version__", mlx)
    with pytest.raises(UserError, match=re.escape(command) + "$") as caught:
        lanes.require_moshi_mlx()
    assert "\n" not in str(caught.value)


def run_python(code: str, tmp_path: Path, path: str) -> subprocess.CompletedProcess:
    # mlx keeps compiled kernels under TMPDIR; an older one there would hide the fault.
    env = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not CPU_ONLY_LINUX, reason="only a Linux CPU compiles with g++")
def test_compiled_functions_work_without_a_compiler(tmp_path):
    guard = "from moshi_ttt_mlx.lanes import ensure_compile_works as e\nprint(e())\n"
    done = run_python(guard + FUSED, tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    works, values = done.stdout.splitlines()
    assert works == "False"
    assert json.loads(values) == pytest.approx([3.7182817, 15.7781124], rel=1e-6)


@pytest.mark.skipif(not CPU_ONLY_LINUX, reason="only a Linux CPU compiles with g++")
def test_what_mlx_itself_does_without_a_compiler(tmp_path):
    """mlx 0.26 fails, newer ones manage: when the floor moves up, the guard can go."""
    done = run_python(FUSED, tmp_path, path=str(tmp_path))
    if lanes.lane() == "floor":
        assert "g++: not found" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="shows that g++ leaves compile on")
def test_compile_stays_on_with_a_compiler(tmp_path):
    code = "from moshi_ttt_mlx import lanes\nprint(lanes.ensure_compile_works())\n"
    code += "print(lanes.describe()['compile'])"
    assert run_python(code, tmp_path, os.environ["PATH"]).stdout.split() == ["True", "on"]


def test_a_person_can_switch_compile_off(monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert lanes.describe()["compile"] == "off: MLX_DISABLE_COMPILE is set"


@pytest.fixture
def machine(tmp_path):
    """A machine with nothing but the shell tools and the Pythons that a test puts there.

    Returns a function (pythons: name -> 3.x minor, environment) -> finished `choose_python`.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "dirname", "tail"):
        (folder / tool).symlink_to(shutil.which(tool))

    def choose(pythons: dict[str, int], **env: str) -> subprocess.CompletedProcess:
        for name, minor in pythons.items():
            # Answers the version as `-c` code would print it, and `--version`.
            says = f'[ "$1" = --version ] && echo Python 3.{minor}.1 || echo {minor}'
            (folder / name).write_text(f"#!{folder}/bash\n{says}\n")
            (folder / name).chmod(0o755)
        code = f'set -euo pipefail; . "{ROOT}/scripts/setup_env"; choose_python; '
        code += 'echo "${PYTHON##*/} $LANE"'
        return subprocess.run(
            ["bash", "-c", code],
            env={"PATH": str(folder), **env},
            capture_output=True,
            text=True,
            check=False,
        )

    return choose


@pytest.mark.parametrize(
    ("pythons", "env", "chosen"),
    [
        ({"python3": 10}, {}, "python3 floor"),
        ({"python3": 12}, {}, "python3 floor"),
        ({"python3": 13}, {}, "python3 modern"),
        ({"python3": 14}, {}, "python3 modern"),
        ({"python3": 12}, {"MOSHI_TTT_LANE": "modern"}, "python3 modern"),
        ({"python3": 9, "python3.11": 11}, {}, "python3.11 floor"),
        ({"python3": 14, "python3.12": 12}, {"MOSHI_TTT_LANE": "floor"}, "python3.12 floor"),
        ({"python3": 12, "mine": 13}, {"MOSHI_TTT_PYTHON": "mine"}, "mine modern"),
    ],
)
def test_scripts_choose_python_and_lane(machine, pythons, env, chosen):
    done = machine(pythons, **env)
    assert (done.stdout.strip(), done.returncode) == (chosen, 0), done.stderr


@pytest.mark.parametrize(
    ("pythons", "env", "message"),
    [
        ({"python3": 9}, {}, "need Python 3.10-3.14, found python3: Python 3.9.1"),
        ({"python3": 15}, {}, "need Python 3.10-3.14, found python3: Python 3.15.1"),
        ({}, {}, "need Python 3.10-3.14, found python3: "),
        ({"python3": 13}, {"MOSHI_TTT_LANE": "floor"}, "need Python 3.10-3.12, found python3"),
        ({"python3": 12}, {"MOSHI_TTT_LANE": "new"}, "is floor or modern, not 'new'"),
    ],
)
def test_scripts_say_in_one_line_what_is_missing(machine, pythons, env, message):
    done = machine(pythons, **env)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
