"""The examination: every check on its own, sizes that are the real ones, and verdicts that turn."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import tiny
from huggingface_hub import constants
from mimi_checkpoints import checkpoint
from mlx.utils import tree_flatten
from test_devices import PortAudioError, entry

from moshi_ttt_mlx import doctor, ttt_kernels
from moshi_ttt_mlx.audio import read_audio, to_mono
from moshi_ttt_mlx.cli import main
from moshi_ttt_mlx.codec import open_codec
from moshi_ttt_mlx.doctor import (
    Case,
    Chosen,
    Finding,
    examine,
    kernels,
    machine,
    probe,
    sound,
    summary,
)
from moshi_ttt_mlx.doctor import case as doctor_case
from moshi_ttt_mlx.doctor import footprint as fp
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.hub import MIMI_NAME, ModelFiles
from moshi_ttt_mlx.kv_cache import HybridKVCache
from moshi_ttt_mlx.legacy import LegacyConfig
from moshi_ttt_mlx.memory import MemoryConfig
from moshi_ttt_mlx.model import load, mimi_shape
from moshi_ttt_mlx.session import Session
from moshi_ttt_mlx.surgery import add_memory, save_adapter


def chosen(folder, **kwargs):
    flags = {"hf_repo": str(folder), "quantized": kwargs.pop("quantized", None)}
    return Chosen(flags, **kwargs)


@pytest.fixture(scope="module")
def moshi(tmp_path_factory):
    return tiny.tiny_moshi(tmp_path_factory.mktemp("doctor") / "moshi", context=20)


@pytest.fixture(scope="module")
def stt(tmp_path_factory):
    return tiny.tiny_stt(tmp_path_factory.mktemp("doctor-stt") / "stt", context=75)


@pytest.fixture(scope="module")
def adapter(moshi, tmp_path_factory):
    """A memory with open gates in one of two layers, behind a window of 7."""
    made = add_memory(load(str(moshi)).lm, MemoryConfig(layers=(1,), window=7, sinks=1))
    for memory in made.memories.values():
        memory.gate = mx.full(memory.gate.shape, 0.1)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(made, folder)
    return str(folder)


# -- sizes ----------------------------------------------------------------------------------------


def nbytes(arrays):
    return sum(array.nbytes for _, array in arrays)


def held(session):
    """Bytes of windows and of memories in a talk."""
    caches = [layer.self_attn for layer in session.generator.caches]
    windows = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    memories = [cache.memory for cache in caches if isinstance(cache, HybridKVCache)]
    return windows, sum(nbytes(memory.state.items()) for memory in memories)


def talk(model, frames, **settings):
    session = Session(model, **settings)
    codes = np.zeros(model.lm.cfg.other_codebooks, np.int32)
    for _ in range(frames):
        session.step(codes)
    return session


@pytest.mark.parametrize(
    "made, quantized",
    [
        ({}, None),
        ({"dtype": mx.bfloat16}, None),
        ({"dtype": mx.bfloat16, "layout": "pytorch"}, None),
        ({"bits": 4}, None),
        ({"dtype": mx.bfloat16, "bits": 8}, None),
        ({"dim": 128, "dtype": mx.bfloat16}, 4),
    ],
)
def test_sizes_from_headers_are_those_of_a_loaded_model(made, quantized, tmp_path):
    folder = tiny.tiny_moshi(tmp_path / "m", context=20, **made)
    computed = fp.footprint(chosen(folder, quantized=quantized))
    model = load(str(folder), quantized=quantized)
    assert computed.weights == nbytes(tree_flatten(model.lm.parameters()))
    assert (computed.keys_and_values, computed.memory_state) == held(talk(model, 25))
    assert (computed.memory_state, computed.adapter) == (0, 0)


def test_a_memory_and_a_shorter_context_are_counted(moshi, adapter):
    computed = fp.footprint(chosen(moshi, adapter_path=adapter), context=12)
    model = load(str(moshi), adapter_path=adapter)
    session = talk(model, 25, context=12)
    assert (computed.keys_and_values, computed.memory_state) == held(session)
    assert computed.adapter == nbytes(tree_flatten(model.memory.parameters())) > 0
    plain = fp.footprint(chosen(moshi), context=12)
    assert plain.keys_and_values > computed.keys_and_values  # 12 + 7 frames, not 12 + 12
    assert plain.weights == computed.weights
    assert computed.total == sum(
        getattr(computed, name)
        for name in ("weights", "keys_and_values", "memory_state", "adapter", "codec")
    )


def test_a_context_beyond_the_models_is_the_models(moshi):
    assert fp.footprint(chosen(moshi), 999) == fp.footprint(chosen(moshi))


@pytest.mark.parametrize("asked", ["auto", "mlx", "rustymimi"])
@pytest.mark.parametrize("shape", ["small", "kyutai"])
def test_the_codec_counts_as_often_as_it_is_in_memory(asked, shape, moshi):
    if (shape, asked) == ("small", "rustymimi"):
        pytest.skip("rustymimi runs Kyutai's shape only")
    config = chosen(moshi).files.config if shape == "small" else None
    path = checkpoint(shape)
    files = ModelFiles("m", config, moshi, path, moshi, None)
    codec = open_codec(path, 8, asked, mimi_shape(files))
    copies = 2 if codec.name == "rustymimi" else 1  # docs/codec.md: twice while one warms up
    assert fp._codec_bytes(files, asked) == copies * path.stat().st_size


def verdict_with(usable, monkeypatch, case):
    here = machine.Machine("chip", 8, 16 * 10**9, usable, "a test's")
    monkeypatch.setattr(fp, "read_machine", lambda: here)
    return fp.check_memory(case)


def test_headroom_decides(moshi, monkeypatch):
    case = Case(chosen(moshi))
    needed = fp.footprint(case.chosen).total
    fits = verdict_with(needed, monkeypatch, case)
    assert (fits.verdict, fits.facts["headroom"]) == ("ok", 0)
    tight = verdict_with(needed - 1, monkeypatch, case)
    assert (tight.verdict, tight.facts["headroom"]) == ("problem", -1)
    assert "try -q 4 or a smaller --context" in tight.line
    assert tight.facts["needed"] == needed and "model.safetensors's header" in tight.line


def test_both_models_are_counted(moshi, stt, monkeypatch):
    one, other = (fp.footprint(chosen(folder)).total for folder in (moshi, stt))
    found = verdict_with(10**9, monkeypatch, Case(chosen(moshi), user_stt=chosen(stt)))
    assert found.facts["needed"] == one + other
    assert [m["total"] for m in found.facts["models"]] == [one, other]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache, and nobody may ask the hub."""

    def ask(*args, **kwargs):
        raise AssertionError(f"asked the hub for {args}")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "flags, name, gigabytes",
    [
        # 7.69 B parameters: 5 bits each in q4 (groups of 32, with scales), 8.5 in q8 (of 64).
        ({}, "kyutai/moshiko-mlx-q4", 4.81),
        ({"quantized": 8}, "kyutai/moshiko-mlx-q8", 8.17),
        ({"hf_repo": "kyutai/moshika-mlx-bf16"}, "kyutai/moshika-mlx-bf16", 15.38),
    ],
)
def test_moshi_itself_is_sized_without_a_download(flags, name, gigabytes, no_hub):
    one = Chosen(flags)
    computed = fp.footprint(one)
    assert one.name == name and "not downloaded yet" in computed.source
    # Keys and values of 3,000 frames in bfloat16, 32 layers of width 4096.
    assert round(computed.keys_and_values / 1e9, 2) == 1.57
    assert computed.weights / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_what_is_not_here_is_neither_downloaded_nor_a_problem(no_hub):
    case = Case(Chosen({"hf_repo": "kyutai/hibiki-1b-mlx-bf16"}), audio=False)
    found = {f.check: f for f in examine(case)}
    for check in ("memory", "codec", "frame time"):
        assert found[check].verdict == "skipped"
        assert "kyutai/hibiki-1b-mlx-bf16 is not downloaded yet" in found[check].line


def cache(folder, *names, config=None):
    """A repository in the hub's cache."""
    snapshot = folder / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True, exist_ok=True)
    (folder / "models--a--b" / "refs").mkdir(exist_ok=True)
    (folder / "models--a--b" / "refs" / "main").write_text("1")
    if config:
        (snapshot / "config.json").write_text(json.dumps(config))
    for name in names:
        (snapshot / name).write_bytes(b"")


@pytest.mark.parametrize(
    "config, weights, mimi",
    [
        (None, "model.q4.safetensors", MIMI_NAME),
        ({"moshi_name": "own.safetensors"}, "own.safetensors", MIMI_NAME),
        ({"moshi_name": "own.safetensors", "mimi_name": "m"}, "own.safetensors", "m"),
    ],
)
def test_what_is_in_the_cache_is_used(config, weights, mimi, no_hub):
    assert not doctor_case._is_cached("a/b", True)
    cache(no_hub, weights, config=config)
    assert not doctor_case._is_cached("a/b", True)  # its codec is 385 MB, too
    assert doctor_case._is_cached("a/b", False)
    cache(no_hub, mimi)
    assert doctor_case._is_cached("a/b", True)


def test_a_text_model_needs_no_codec(no_hub):
    cache(no_hub, "model.safetensors", config={"n_q": 0})
    assert doctor_case._is_cached("a/b", True)


@pytest.mark.parametrize(
    "name, is_one", [("a/b", True), ("demo", False), ("./a/b", False), ("a/b/c", False)]
)
def test_a_folder_is_no_repository(name, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor_case._is_repository(name) == is_one
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not doctor_case._is_repository("a/b")


# -- the machine ----------------------------------------------------------------------------------


def linux(tmp_path, limit=None, version=2):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    (proc / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some Chip 9\n\nflags\t: a b\n")
    (proc / "meminfo").write_text("MemTotal:       8000 kB\nMemFree: 1 kB\nMemAvailable: 6000 kB\n")
    path = cgroup / ("memory.max" if version == 2 else "memory/memory.limit_in_bytes")
    path.parent.mkdir(parents=True)
    if limit:
        path.write_text(limit)
    return machine._linux(proc, cgroup)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "limit, memory, usable",
    [
        (None, 8000, 6000),
        ("max\n", 8000, 6000),
        ("9223372036854771712\n", 8000, 6000),
        (f"{7000 * 1024}\n", 7000, 6000),
        (f"{5000 * 1024}\n", 5000, 5000),
    ],
)
def test_linux_and_its_containers(version, limit, memory, usable, tmp_path):
    found = linux(tmp_path, limit, version)
    assert found.chip == "Some Chip 9"
    assert (found.memory, found.usable) == (memory * 1024, usable * 1024)
    assert ("container" in found.usable_is) == (memory < 8000)


@pytest.mark.parametrize("limit, usable", [(21 * 10**9, 21 * 10**9), (None, 32 * 10**9)])
def test_a_mac(monkeypatch, limit, usable):
    answers = {"machdep.cpu.brand_string": "Apple M9 Max", "hw.memsize": str(32 * 10**9)}
    monkeypatch.setattr(machine, "_sysctl", answers.__getitem__)
    info = {"max_recommended_working_set_size": limit} if limit else {}
    monkeypatch.setattr(machine, "_metal_info", lambda: info)
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    found = machine.read_machine()
    assert (found.chip, found.memory, found.usable) == ("Apple M9 Max", 32 * 10**9, usable)


def test_this_machine_has_memory_and_cores():
    found = machine.check_machine(None)
    assert found.verdict == "ok"
    assert 0 < found.facts["usable"] <= found.facts["memory"] and found.facts["cores"] >= 1


def test_versions_name_lane_and_packages():
    found = machine.check_versions(None)
    assert found.verdict == "ok"
    for word in (mx.__version__, found.facts["lane"], "moshi_mlx 0.3.0", found.facts["numpy"]):
        assert word in found.line


def test_without_moshi_mlx_there_is_a_line_for_everything(tmp_path):
    """The state right after an install on Python 3.13: nothing may end in a traceback."""
    program = (
        "import sys; sys.modules['moshi_mlx'] = None; from moshi_ttt_mlx.cli import main; "
        "sys.exit(main(['doctor', '--no-audio', '--hf-repo', sys.argv[1]]))"
    )
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program, tiny.SMALL], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(doctor.CHECKS) + 1
    assert "moshi_mlx is not installed; run: " in lines[0] and lines[0].startswith("problem")
    assert sum("needs moshi_mlx, which is not installed" in line for line in lines) == 4


# -- kernels --------------------------------------------------------------------------------------


def off_by(amount, what):
    """A kernel that goes wrong, after the first mini-batch if it is the fold."""
    whole = getattr(ttt_kernels, what)

    def wrong(*args):
        out, rest = whole(*args)
        if what == "step":
            return out + amount, rest
        return {name: array * (1 + amount) for name, array in out.items()}, rest

    return wrong


@pytest.fixture
def metal(monkeypatch):
    """As if on a Mac, with plain operations for kernels."""
    monkeypatch.setattr(kernels, "on_metal", lambda: True)
    monkeypatch.setattr(ttt_kernels, "step", lambda twin, rules, *args: twin(rules, *args))
    monkeypatch.setattr(ttt_kernels, "fold", lambda twin, rules, *args: twin(rules, *args))


def test_no_metal_is_no_problem(moshi, monkeypatch):
    monkeypatch.setattr(kernels, "on_metal", lambda: False)
    found = kernels.check_metal(Case(chosen(moshi)))
    assert (found.verdict, found.line) == ("ok", "no Metal here: ops")


def test_kernels_that_agree(metal, moshi):
    found = kernels.check_metal(Case(chosen(moshi)))
    assert found.verdict == "ok" and found.facts["largest_difference"] < 1e-5  # float32


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
@pytest.mark.parametrize("what", ["step", "fold"])
def test_kernels_that_do_not_agree(what, wrong, metal, moshi, monkeypatch):
    monkeypatch.setattr(ttt_kernels, what, off_by(wrong, what))
    found = kernels.check_metal(Case(chosen(moshi)))
    assert found.verdict == "problem" and "set MOSHI_TTT_KERNEL=ops" in found.line
    json.dumps(found.facts, allow_nan=False)


@pytest.mark.parametrize("wish", [None, "ops"])
def test_the_kernels_are_wished_for_and_the_wish_is_taken_back(wish, metal, moshi, monkeypatch):
    monkeypatch.delenv(kernels.WISH, raising=False)
    if wish:
        monkeypatch.setenv(kernels.WISH, wish)
    seen = set()
    step = ttt_kernels.step
    monkeypatch.setattr(
        ttt_kernels,
        "step",
        lambda *args: (seen.add(kernels.os.environ[kernels.WISH]), step(*args))[1],
    )
    kernels.check_metal(Case(chosen(moshi)))
    assert seen == {"metal"} and kernels.os.environ.get(kernels.WISH) == wish


def test_a_memory_of_another_shape_stays_with_operations(metal, moshi, tmp_path):
    made = add_memory(load(str(moshi)).lm, MemoryConfig(layers=(1,), forget="init"))
    save_adapter(made, tmp_path)
    found = kernels.check_metal(Case(chosen(moshi, adapter_path=str(tmp_path))))
    assert (found.verdict, found.facts["kernels"]) == ("ok", "ops")


LEGACY = LegacyConfig(layers=(0,), heads=2, head_dim=8, sizes=(8, 16, 8), base_lr=1.0, mini_batch=4)


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(layers="top:1", forget="init"),
        MemoryConfig(layers="top:1", inner="linear"),
        MemoryConfig(layers="top:1", mini_batch=5),
        LEGACY,
    ],
)
def test_the_comparison_holds_for_every_shape(config):
    assert kernels.largest_difference(kernels._learner(config)) < 1e-5  # float32


# -- sound devices --------------------------------------------------------------------------------


class Stream:
    """Calls back at once with what a test gives, on a thread of its own."""

    sound = None  # a function of the number of samples; None never calls back

    def __init__(self, **settings):
        self.callback, self.block = settings["callback"], settings["blocksize"]
        self.channels, self.active, self.latency = settings["channels"], False, 0.0

    def start(self):
        self.active = True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while self.active and Stream.sound is not None:
            block = np.repeat(Stream.sound(self.block)[:, None], self.channels, 1)
            self.callback(block, self.block, None, 0)

    def stop(self):
        self.active = False

    close = stop


@pytest.fixture
def devices(monkeypatch):
    table = [entry("Mic", 1, 0), entry("Speaker", 0, 2)]
    fake = SimpleNamespace(
        query_devices=lambda: table,
        query_hostapis=lambda: [{"name": "ALSA"}],
        default=SimpleNamespace(device=[0, 1]),
        check_input_settings=lambda **_: None,
        check_output_settings=lambda **_: None,
        InputStream=Stream,
        OutputStream=Stream,
        PortAudioError=PortAudioError,
    )
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.setattr(sound, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(sound, "LISTEN_SECONDS", 0.2)
    monkeypatch.setattr(Stream, "sound", lambda n: np.full(n, 0.1, np.float32))
    return table


def test_a_microphone_is_heard_for_a_while(devices):
    found = sound.check_microphone(Case(Chosen({})))
    assert found.verdict == "ok" and "'Mic'" in found.line and "-20 dBFS" in found.line
    assert found.facts["rms_dbfs"] == found.facts["peak_dbfs"] == -20.0
    assert found.facts["seconds"] >= 0.2


@pytest.mark.parametrize(
    "played, words", [(np.zeros, "exact zeros for "), (None, "no sound at all")]
)
def test_a_mute_microphone_is_a_problem_of_permission(played, words, devices, monkeypatch):
    monkeypatch.setattr(Stream, "sound", played)
    found = sound.check_microphone(Case(Chosen({})))
    assert found.verdict == "problem" and words in found.line
    assert "Privacy & Security > Microphone" in found.line


def test_the_faintest_noise_is_no_missing_permission(devices, monkeypatch):
    monkeypatch.setattr(Stream, "sound", lambda n: np.full(n, 1e-7, np.float32))
    assert sound.check_microphone(Case(Chosen({}))).verdict == "ok"


def test_a_loudspeaker_takes_sound_or_not(devices, monkeypatch):
    found = sound.check_loudspeaker(Case(Chosen({})))
    assert found.verdict == "ok" and "'Speaker'" in found.line
    monkeypatch.setattr(Stream, "sound", None)
    found = sound.check_loudspeaker(Case(Chosen({})))
    assert found.verdict == "problem" and "takes no sound" in found.line


def test_no_device_and_no_library_are_said(devices, monkeypatch):
    devices.clear()
    found = {f.check: f for f in examine(Case(chosen("./none")))}
    for check in ("microphone", "loudspeaker"):
        assert found[check].verdict == "problem" and f"found no {check}" in found[check].line
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    found = {f.check: f for f in examine(Case(chosen("./none")))}
    assert "pip install sounddevice" in found["microphone"].line


def test_devices_are_left_alone_when_asked(monkeypatch):
    monkeypatch.setattr(sound, "find_device", lambda *_: pytest.fail("looked for devices"))
    for check in (sound.check_microphone, sound.check_loudspeaker):
        assert check(Case(Chosen({}), audio=False)).verdict == "skipped"


# -- codec ----------------------------------------------------------------------------------------


def noise(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def other_phases(sound, size=512):
    """The same spectrum with phases of chance: to an ear nearly the same, no sample alike."""
    window, out, rng = np.hanning(size), np.zeros(len(sound)), np.random.default_rng(0)
    for start in range(0, len(sound) - size, size // 2):
        spectrum = np.abs(np.fft.rfft(sound[start : start + size] * window))
        turned = spectrum * np.exp(2j * np.pi * rng.random(len(spectrum)))
        out[start : start + size] += np.fft.irfft(turned) * window
    return out


def test_resemblance_is_an_ears():
    speech = probe.speech(probe.SECOND).reshape(-1)
    assert probe.resemblance(speech, 0.1 * speech) > 0.99
    assert probe.resemblance(speech, other_phases(speech)) > 0.9
    noisy = speech + np.sqrt(np.mean(speech**2)) * noise(len(speech))
    assert probe.resemblance(speech, noisy) > probe.RESEMBLES
    whole = to_mono(read_audio(probe._CLIP).samples)
    others = [whole[i : i + len(speech)] for i in range(0, len(whole) - len(speech), 6000)]
    for unlike in (noise(len(speech)), speech[::-1], *others):
        assert probe.resemblance(speech, unlike) < probe.RESEMBLES
    assert probe.resemblance(speech, np.zeros_like(speech)) == 0


def test_the_codecs_verdict():
    codec = SimpleNamespace(name="mlx", num_codebooks=8)
    speech = probe.speech(probe.SECOND).reshape(-1)
    broken = speech.copy()
    broken[5] = np.nan
    for came_back, trained, verdict, words in [
        (speech, True, "ok", "resemblance 1.00"),
        (noise(len(speech)), True, "problem", "not what was sent"),
        (noise(len(speech)), False, "ok", "not judged"),
        (1e-5 * speech, False, "problem", "silence"),
        (broken, False, "problem", "NaN"),
    ]:
        found = probe._judge_codec(codec, speech, came_back, trained)
        assert (found.verdict, words in found.line) == (verdict, True)
        json.dumps(found.facts, allow_nan=False)


def test_a_second_goes_through_the_models_own_codec(moshi):
    found = probe.check_codec(Case(chosen(moshi)))
    assert found.verdict == "ok" and found.line.startswith("mlx, 8 codebooks: ")


def test_the_codec_is_examined_even_where_the_model_is_broken(moshi, tmp_path):
    folder = tiny.tiny_moshi(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"no weights")
    found = {f.check: f for f in examine(Case(chosen(folder), audio=False))}
    assert found["codec"].verdict == "ok"
    assert "not a whole safetensors file" in found["frame time"].line


# -- frame time -----------------------------------------------------------------------------------


def test_the_probe_reads_full_windows(moshi, adapter):
    session = talk(load(str(moshi), adapter_path=adapter), 3, context=12)
    probe.fill_window(session.generator)
    caches = [layer.self_attn for layer in session.generator.caches]
    assert [cache.window for cache in caches] == [12, 7]
    for cache in caches:
        assert cache.keys.shape[2] == cache.step_numbers[3] == cache.window
    assert caches[1].keys[0, 0, 1, 0].item() != 0  # what was there stays
    codes = np.zeros(8, np.int32)
    before = session.frame
    assert np.isfinite(session.step(codes).pcm).all() and session.frame == before + 1


def test_filling_a_full_window_changes_nothing(moshi):
    model = load(str(moshi))
    plain, filled = talk(model, 30), talk(model, 30)
    probe.fill_window(filled.generator)
    codes = np.zeros(8, np.int32)
    for _ in range(5):
        np.testing.assert_array_equal(plain.step(codes).codes, filled.step(codes).codes)


class Clock:
    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_a_second_is_timed_and_no_more_than_a_slow_machine_bears(moshi):
    model = load(str(moshi))
    times = probe.frame_times(Session(model), Clock(0.01))
    assert len(times) == probe.SECOND and times == pytest.approx([10.0] * probe.SECOND)
    # Two ticks a frame and one to look: the third frame ends after 27 s.
    assert len(probe.frame_times(Session(model), Clock(3.0))) == 3


def test_with_user_stt_both_models_are_timed_with_full_windows(moshi, stt):
    case = Case(chosen(moshi), user_stt=chosen(stt))
    talk = probe._open_session(case)
    probe.frame_times(talk)
    for session, window in ((talk, 20), (talk.user, 75)):
        lengths = {layer.self_attn.length for layer in session.generator.caches}
        assert lengths == {window + probe.WARM_UP + probe.SECOND}


def test_what_is_timed_is_a_full_window(tmp_path):
    session = Session(load(str(tiny.tiny_moshi(tmp_path / "m", context=90))))
    probe.frame_times(session)
    lengths = {layer.self_attn.length for layer in session.generator.caches}
    assert lengths == {90 + probe.WARM_UP + probe.SECOND}


@pytest.mark.parametrize(
    "times, verdict, line",
    [
        ([61.0] * 12 + [74.0], "ok", "real time: yes, 61 of 80 ms (p95 66)"),
        ([80.0] * 13, "ok", "real time: yes, 80 of 80 ms (p95 80)"),
        ([70.0] * 10 + [95.0] * 3, "ok", "real time: just, 70 of 80 ms (p95 95)"),
        ([81.0] * 13, "problem", "real time: no, 81 of 80 ms (p95 81)"),
    ],
)
def test_the_plain_verdict(times, verdict, line):
    found = probe.judge_times(times, 3000)
    assert found.verdict == verdict and found.line.startswith(f"{line} with 3000 frames in sight")
    assert found.facts["real_time"] == (verdict == "ok")
    assert ("--context 1500" in found.line) == (verdict == "problem")


# -- all of it ------------------------------------------------------------------------------------


def test_one_check_that_fails_is_a_line_and_the_others_go_on(moshi, in_time, monkeypatch):
    for error, verdict, line in [
        (RuntimeError("boom\nmore"), "problem", "unexpected RuntimeError: boom"),
        (UserError("say it"), "problem", "say it"),
        (ModuleNotFoundError("no", name="soxr"), "skipped", "needs soxr, which is not installed"),
    ]:

        def fail(case, error=error):
            raise error

        monkeypatch.setattr(machine, "check_machine", fail)
        found = list(examine(Case(chosen(moshi), audio=False)))
        assert [f.check for f in found] == list(doctor.CHECKS)
        assert (found[1].verdict, found[1].line) == (verdict, line)
        assert all(f.verdict != "problem" for f in found if f.check != "machine")


def test_the_sum_says_what_is_wrong_and_what_was_left_out():
    found = [Finding(name, verdict, "") for name, verdict in [("a", "ok"), ("b", "skipped")]]
    assert summary(found).verdict == "ok"
    assert summary(found).line == "1 of 2 checks good; left out: b"
    whole = summary([*found, Finding("c", "problem", "")])
    assert (whole.verdict, whole.line) == (
        "problem",
        "1 of 3 checks good; problems: c; left out: b",
    )


@pytest.fixture
def in_time(monkeypatch):
    """A frame time that does not depend on what else this machine does."""
    monkeypatch.setattr(probe, "frame_times", lambda session: [61.0] * probe.SECOND)


def run(capsys, *flags, status=0):
    assert main(["doctor", "--no-audio", *map(str, flags)]) == status
    return capsys.readouterr().out


def test_lines_and_json_say_the_same(moshi, in_time, capsys):
    lines = run(capsys, "--hf-repo", moshi).splitlines()
    report = json.loads(run(capsys, "--hf-repo", moshi, "--json"))
    assert report["verdict"] == "ok"
    assert [c["check"] for c in report["checks"]] == list(doctor.CHECKS)
    for line, check in zip(lines, report["checks"], strict=False):
        assert line.startswith(f"{check['verdict']:8} {check['check']}: ")
    facts = report["checks"][-1]["facts"]
    assert facts["budget_ms"] == 80 and facts["frames"] == probe.SECOND and facts["context"] == 20
    assert lines[-1].startswith("ok       sum: 6 of 8 checks good")


def test_a_terminal_gets_a_table(moshi, in_time, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = run(capsys, "--hf-repo", moshi)
    assert "┃" in out and "real time: yes, 61 of 80 ms" in out and "6 of 8 checks good" in out


def test_exit_statuses(moshi, stt, in_time, capsys):
    run(capsys, "--hf-repo", moshi, "--user-stt", stt)
    both = run(capsys, "--hf-repo", moshi, "--user-stt", moshi, status=1)
    assert "expected a speech-to-text model" in both
    short = json.loads(run(capsys, "--hf-repo", moshi, "--context", 10, "--json"))["checks"]
    assert short[-1]["facts"]["context"] == 10
    assert short[2]["facts"]["models"][0]["keys_and_values"] == 2 * 2 * 10 * 64 * 4
    assert "no folder ./none" in run(capsys, "--hf-repo", "./none", status=1)
    run(capsys, "--hf-repo", moshi, "--context", 0, status=2)
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--no-such"])
    assert caught.value.code == 2
