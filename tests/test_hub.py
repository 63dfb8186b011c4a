"""Names become files: the hub (real huggingface_hub, a server on this machine), folders, flags."""

import errno
import importlib
import io
import json
import logging
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import tiny
from hub_server import COMMIT, HubServer
from huggingface_hub import constants, errors, file_download
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console

from moshi_ttt_mlx import UserError, load
from moshi_ttt_mlx.cli import build_parser, main
from moshi_ttt_mlx.cli.common import load_model
from moshi_ttt_mlx.hub import DEMO, MIMI_NAME, TOKENIZER_NAME, find_files

DEMO_CLIP = DEMO.parent.parent / "assets" / "demo_clip.flac"
MOSHIKO = ("model.q4.safetensors", MIMI_NAME, TOKENIZER_NAME)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = HubServer()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # huggingface_hub 0.28 keeps a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's retries
    yield server
    server.close()


@pytest.fixture
def repo(hub, tmp_path):
    """`kyutai/tiny`: a tiny Moshi on the hub; its folder."""
    hub.repos["kyutai/tiny"] = tiny.tiny_moshi(tmp_path / "served")
    return hub.repos["kyutai/tiny"]


def stand_in(folder, *names):
    """Files that are there and hold nothing, for names only."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


# -- the hub --------------------------------------------------------------------------------------


def test_a_repository_is_downloaded_small_files_first(hub, repo):
    said = []
    files = find_files("kyutai/tiny", progress=said.append)
    assert hub.asked == ["config.json", tiny.TOKENIZER_NAME, tiny.MIMI_NAME, "model.safetensors"]
    assert said == [f"kyutai/tiny: {name}" for name in hub.asked]
    assert files.moshi.read_bytes() == (repo / "model.safetensors").read_bytes()
    assert files.name == "kyutai/tiny" and files.config == json.loads(
        (repo / "config.json").read_text()
    )


def test_what_was_downloaded_once_loads_without_a_network(hub, repo):
    first = load("kyutai/tiny")
    hub.close()
    assert load("kyutai/tiny").fingerprint == first.fingerprint


def test_a_repository_without_config_is_moshiko(hub, tmp_path):
    hub.repos["kyutai/moshika-mlx-q4"] = stand_in(tmp_path / "a", *MOSHIKO)
    files = find_files("kyutai/moshika-mlx-q4")
    assert (files.moshi.name, files.mimi.name, files.tokenizer.name) == MOSHIKO
    assert files.config is None and files.quantized is None


@pytest.mark.parametrize(
    "quantized, repo",
    [(None, "kyutai/moshiko-mlx-q4"), (4, "kyutai/moshiko-mlx-q4"), (8, "kyutai/moshiko-mlx-q8")],
)
def test_the_default_is_moshiko_in_the_bits_asked_for(quantized, repo, hub, tmp_path):
    names = (f"model.q{quantized or 4}.safetensors", *MOSHIKO[1:])
    hub.repos[repo] = stand_in(tmp_path / "default", *names)
    files = find_files(quantized=quantized)
    assert (files.name, files.moshi.name) == (repo, names[0])


def test_helium_has_its_own_names_and_no_codec(hub, tmp_path):
    names = ("helium-1-preview-2b-bf16.safetensors", "tokenizer_spm_48k_multi6_2.model")
    hub.repos["kyutai/helium-1-preview-2b-mlx"] = stand_in(tmp_path / "h", *names)
    files = find_files("kyutai/helium-1-preview-2b-mlx")
    assert (files.moshi.name, files.tokenizer.name) == names and files.mimi is None


def test_single_files_fill_in_for_the_default_repository(hub, tmp_path):
    hub.repos["kyutai/moshiko-mlx-q4"] = stand_in(tmp_path / "a", *MOSHIKO)
    mine = stand_in(tmp_path / "mine", "fine-tuned.safetensors") / "fine-tuned.safetensors"
    files = find_files(moshi_weight=mine)
    assert files.moshi == mine and files.mimi.name == MIMI_NAME
    assert files.name == str(mine)  # not the repository that only lent the rest
    assert "model.q4.safetensors" not in hub.asked


def test_three_single_files_need_no_network(hub, tmp_path):
    folder = stand_in(tmp_path / "a", *MOSHIKO)
    hub.close()
    moshi, mimi, text = (folder / name for name in MOSHIKO)
    files = find_files(moshi_weight=moshi, mimi_weight=f"file://{mimi}", tokenizer=text)
    assert (files.moshi, files.mimi, files.tokenizer) == (moshi, mimi, text)


def test_a_flag_may_name_a_file_of_a_repository(hub, repo):
    files = find_files("kyutai/tiny", tokenizer=f"hf://kyutai/tiny/{tiny.MIMI_NAME}")
    assert files.tokenizer.read_bytes() == (repo / tiny.MIMI_NAME).read_bytes()
    for wrong in ("hf://kyutai/tiny", "hf://kyutai//x", "hf://"):
        with pytest.raises(UserError, match="expected hf://OWNER/NAME/FILE"):
            find_files("kyutai/tiny", tokenizer=wrong)


def test_a_folder_of_the_hubs_cache_is_a_folder_of_links(hub, repo):
    find_files("kyutai/tiny")
    snapshot = Path(constants.HF_HUB_CACHE) / "models--kyutai--tiny" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").is_symlink()
    hub.close()
    assert load(str(snapshot)).lm.cfg.audio_codebooks == 16


# -- the hub says no ------------------------------------------------------------------------------


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        find_files(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_the_hub_refuses_is_explained(hub, repo):
    hub.refused["kyutai/gated"] = 403, "GatedRepo"
    hub.refused["kyutai/down"] = 503, ""
    hub.refused["kyutai/token"] = 401, ""
    assert "no repository kyutai/none on the hub (or it is private)" in refusal("kyutai/none")
    assert "kyutai/gated is gated: accept its terms" in refusal("kyutai/gated")
    assert "answered 503 for config.json of kyutai/down: try again" in refusal("kyutai/down")
    assert "is your token valid" in refusal("kyutai/token")
    assert "neither a folder nor a repository name" in refusal("a--b/c")


def test_no_network_is_explained(hub):
    hub.close()
    assert refusal("kyutai/tiny").startswith(
        "could not download config.json of kyutai/tiny, and no earlier download is there to use: "
        "is the network up? ("
    )


def test_a_broken_download_is_explained_and_can_be_repeated(hub, repo):
    hub.cut.add("model.safetensors")
    assert "could not download model.safetensors of kyutai/tiny" in refusal("kyutai/tiny")
    hub.cut.clear()
    files = find_files("kyutai/tiny")
    assert files.moshi.read_bytes() == (repo / "model.safetensors").read_bytes()


def test_a_missing_file_is_named_with_the_flag_that_helps(hub, repo):
    (repo / tiny.MIMI_NAME).unlink()
    assert refusal("kyutai/tiny") == (
        f"kyutai/tiny has no file {tiny.MIMI_NAME}; name one with --mimi-weight"
    )


def http_error(status):
    """An HTTP error as this version of huggingface_hub makes them."""
    kind = errors.Response
    library = importlib.import_module(kind.__module__.split(".")[0])
    if library.__name__ == "requests":
        response = kind()
        response.status_code = status
    else:
        response = kind(status, request=library.Request("GET", "http://hub"))
    return errors.HfHubHTTPError("first line\nsecond line", response=response)


def network_error():
    library = importlib.import_module(errors.Response.__module__.split(".")[0])
    return (getattr(library, "ReadError", None) or library.exceptions.ChunkedEncodingError)("cut")


@pytest.mark.parametrize(
    "error, message",
    [
        (lambda: OSError(errno.ENOSPC, "No space left on device"), "the disk is full: no room for"),
        (
            lambda: RuntimeError("Data processing error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (network_error, "is the network up?"),
        (lambda: ConnectionError("lost"), r"is the network up? (ConnectionError)"),
        (lambda: PermissionError(13, "denied"), "(PermissionError)"),
        (lambda: http_error(500), "the hub answered 500"),
        (lambda: http_error(403), "is your token valid"),
        (lambda: errors.LocalEntryNotFoundError("offline"), "is the network up?"),
    ],
)
def test_whatever_a_download_raises_is_one_line(error, message, monkeypatch):
    def fail(repo, name):
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert message in refusal("kyutai/tiny")


def test_offline_mode_is_named(monkeypatch):
    def offline(repo, name):
        raise errors.LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it" in refusal("kyutai/tiny")


# -- folders and flags ----------------------------------------------------------------------------


def test_demo_is_bundled():
    assert find_files("demo").moshi == DEMO / "model.safetensors"


def test_names_that_are_neither_folder_nor_repository(tmp_path):
    file = stand_in(tmp_path, "model.safetensors") / "model.safetensors"
    assert "is a file: expected OWNER/NAME" in refusal(str(file))
    for name in ("./no-such-folder", str(tmp_path / "none"), "moshiko", "a/b/c", "~/none", ""):
        assert "expected OWNER/NAME on the hub, a folder, or demo" in refusal(name)


def test_a_folder_that_lacks_files_says_what_it_has(tmp_path):
    folder = stand_in(tmp_path / "a", TOKENIZER_NAME, MIMI_NAME)
    assert refusal(str(folder)) == (
        f"{folder} has no model.safetensors, model.q4.safetensors, model.q8.safetensors "
        f"(found: {MIMI_NAME}, {TOKENIZER_NAME}); name one with --moshi-weight"
    )


@pytest.mark.parametrize("field", ["moshi_name", "mimi_name", "tokenizer_name"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ""])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_config_may_not_lead_out_of_its_folder(field, name, where, hub, tmp_path):
    stand_in(tmp_path, "secret")
    folder = tiny.tiny_helium(tmp_path / "a", **{field: name})
    config = json.loads((folder / "config.json").read_text()) | {
        field: name,
        "n_q": 1,
        "delays": [0, 0],
    }
    (folder / "config.json").write_text(json.dumps(config))
    stand_in(folder, MIMI_NAME)
    hub.repos["kyutai/tiny"] = folder
    message = refusal(str(folder) if where == "folder" else "kyutai/tiny")
    assert f"the config names a file outside its folder: {name!r}" in message


def test_a_config_names_the_quantized_file(tmp_path):
    folder = tiny.tiny_helium(tmp_path / "a", bits=4)
    assert find_files(str(folder)).moshi.name == "model.q4.safetensors"
    assert load(str(folder), quantized=4).fingerprint == load(str(folder)).fingerprint
    with pytest.raises(UserError, match="holds 4 bits already"):
        load(str(folder), quantized=8)


def test_ready_made_bits_are_preferred_to_quantizing(tmp_path):
    names = ("model.safetensors", "model.q8.safetensors", MIMI_NAME, TOKENIZER_NAME)
    folder = str(stand_in(tmp_path / "a", *names))
    assert find_files(folder, quantized=8).moshi.name == "model.q8.safetensors"
    assert find_files(folder, quantized=4).moshi.name == "model.safetensors"
    assert find_files(folder).moshi.name == "model.safetensors"


def test_flags_that_name_no_file(tmp_path):
    folder = tiny.tiny_helium(tmp_path / "a")
    assert "it is a folder" in refusal(str(folder), moshi_weight=folder)
    assert refusal(str(folder), tokenizer=tmp_path / "none") == f"no file {tmp_path / 'none'}"


def test_a_text_model_takes_no_codec(tmp_path):
    folder = tiny.tiny_helium(tmp_path / "a")
    assert find_files(str(folder)).mimi is None


# -- what a person sees ---------------------------------------------------------------------------


def test_nothing_else_draws_while_huggingface_hub_downloads(repo, monkeypatch):
    """Its bars and our spinner would share lines of the terminal."""
    screen, drawn = io.StringIO(), []
    console = Console(file=screen, force_terminal=True, width=80)
    really = huggingface_hub.hf_hub_download

    def watched(repo_name, name):
        before = screen.getvalue()
        threading.Event().wait(0.3)  # a spinner draws 12 times a second
        drawn.append(screen.getvalue() != before)
        return really(repo_name, name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", watched)
    args = command_line("--hf-repo", "kyutai/tiny")
    assert load_model(args, console).name == "kyutai/tiny"
    assert drawn == [False] * 4
    assert "kyutai/tiny: model.safetensors" in screen.getvalue()


def command_line(*flags):
    return build_parser().parse_args(["transcribe", "in.wav", *flags])


def test_without_a_terminal_there_are_plain_lines(repo, capsys):
    load_model(command_line("--hf-repo", "kyutai/tiny"), Console(stderr=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"kyutai/tiny: {name}"
        for name in ("config.json", tiny.TOKENIZER_NAME, tiny.MIMI_NAME, "model.safetensors")
    ]


def test_quiet_is_quiet(repo, capsys):
    load_model(
        command_line("--hf-repo", "kyutai/tiny", "--quiet"), Console(stderr=True, quiet=True)
    )
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["no network", "wrong name", "gated"])
def test_the_command_line_ends_with_one_line_and_status_2(how, hub, tmp_path, capfd):
    name = "kyutai/tiny"
    if how == "no network":
        hub.close()
    elif how == "gated":
        hub.refused[name] = 403, "GatedRepo"
    (tmp_path / "in.wav").write_bytes(DEMO_CLIP.read_bytes())
    before = sorted(tmp_path.rglob("*.wav"))
    argv = ["transcribe", str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), "--hf-repo", name]
    assert main(argv) == 2
    out, err = capfd.readouterr()
    step, error = err.splitlines()
    assert out == "" and step == "kyutai/tiny: config.json"
    assert error.startswith("moshi-ttt-mlx: ")
    assert sorted(tmp_path.rglob("*.wav")) == before


@pytest.mark.parametrize("flags, level", [([], "ERROR"), (["--verbose"], "WARNING")])
def test_the_hubs_notes_about_retries_are_for_the_verbose(flags, level, repo):
    hub_logging.set_verbosity_warning()
    load_model(command_line("--hf-repo", "kyutai/tiny", *flags), Console(stderr=True))
    assert hub_logging.get_verbosity() == getattr(logging, level)
