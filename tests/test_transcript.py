"""Words and times from pieces; subtitles that other programs can read; a state that resumes."""

import html
import json
import re
import subprocess
import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.transcript import FORMATS, LINE_CHARS, Transcript, Word

FRAME = 0.08


def spoken(*tokens, **kwargs):
    """A transcript of (frame, piece[, speaker]) tokens."""
    transcript = Transcript(**kwargs)
    for token in tokens:
        transcript.add(*token)
    return transcript


def byte_pieces(text):
    return [f"<0x{byte:02X}>" for byte in text.encode()]


@st.composite
def speech(draw, speakers=("moshi",)):
    """Tokens, and per speaker the words (text, first frame, last frame) they must give."""
    # Cs: lone surrogates are not text. Whitespace would end a word, U+2581 start one.
    letters = st.characters(
        exclude_categories=("Cs", "Zs", "Zl", "Zp", "Cc"), exclude_characters="▁"
    )
    tokens, expected = [], {speaker: [] for speaker in speakers}
    for speaker in speakers:
        frame = draw(st.integers(0, 50))
        for text in draw(st.lists(st.text(letters, min_size=1, max_size=60), max_size=12)):
            first, pieces = frame, ["▁" + text[:1]]
            for character in text[1:]:
                pieces += byte_pieces(character) if draw(st.booleans()) else [character]
            for piece in pieces:
                tokens.append((frame, piece, speaker))
                last, frame = frame, frame + draw(st.integers(0, 1))
            expected[speaker].append((text, first, last))
            frame += draw(st.integers(0, 60))
    tokens.sort(key=lambda token: token[0])  # stable: each speaker's order stays
    return tokens, expected


# ---- text and times


def test_text_comes_as_it_is_spoken():
    transcript = Transcript()
    printed = [transcript.add(*token) for token in [(3, "▁Hel"), (4, "lo"), (9, "▁you"), (10, "!")]]
    assert printed == [" Hel", "lo", " you", "!"]
    assert transcript.words == [
        Word("Hello", 0.24, 0.4, "moshi"),
        Word("you!", 0.72, 0.88, "moshi"),
    ]


def test_bytes_wait_until_they_make_a_character():
    transcript = Transcript()
    printed = [transcript.add(i, p) for i, p in enumerate(["▁", *byte_pieces("é€"), "s"])]
    assert printed == [" ", None, "é", None, None, "€", "s"]
    assert transcript.words == [Word("é€s", 0.0, 7 * FRAME, "moshi")]


def test_a_cut_character_is_replaced_and_what_follows_is_kept():
    transcript = spoken((0, "▁a"), (1, "<0xE2>"), (2, "<0x82>"))
    assert transcript.add(3, "▁b") == "\ufffd b"
    assert [word.text for word in transcript.words] == ["a\ufffd", "b"]


def test_a_newline_ends_a_word_and_starts_none():
    words = spoken((0, "▁a"), (1, "<0x0A>"), (50, "b")).words
    assert words == [Word("a", 0.0, 0.08, "moshi"), Word("b", 4.0, 4.08, "moshi")]


def test_a_word_starts_at_its_bare_mark():
    assert spoken((5, "▁"), (8, "x")).words == [Word("x", 0.4, 0.72, "moshi")]


def test_sentencepiece_symbols():
    transcript = Transcript()
    printed = [transcript.add(i, p) for i, p in enumerate(["<s>", "▁a", "<unk>", "b", "⁇", "</s>"])]
    assert printed == [None, " a", " ⁇ ", "b", "⁇", None]
    assert [word.text for word in transcript.words] == ["a", "⁇", "b⁇"]
    assert transcript.words[2].start == 3 * FRAME


def test_a_delay_moves_one_speaker_back_and_stops_at_zero():
    tokens = [(0, "▁a", "user"), (6, "▁b", "user"), (20, "▁c", "user"), (20, "▁d", "moshi")]
    words = spoken(*tokens, delays={"user": 0.5}).words
    assert words == [
        Word("a", 0.0, 0.08, "user"),
        Word("b", 0.0, 0.08, "user"),
        Word("c", 1.1, 1.18, "user"),
        Word("d", 1.6, 1.68, "moshi"),
    ]


def test_frames_that_go_back_are_a_mistake():
    transcript = spoken((5, "▁a"), (2, "▁b", "user"))
    with pytest.raises(ValueError, match="expected a frame >= 5, found 4"):
        transcript.add(4, "▁c")


@given(speech(("moshi", "user")))
def test_words_are_the_pieces_and_times_never_go_back(data):
    tokens, expected = data
    transcript, printed = Transcript(), {"moshi": "", "user": ""}
    for frame, piece, speaker in tokens:
        printed[speaker] += transcript.add(frame, piece, speaker) or ""
    words = transcript.words
    assert [w.start for w in words] == sorted(w.start for w in words)
    for speaker, stretches in expected.items():
        mine = [w for w in words if w.speaker == speaker]
        assert printed[speaker] == "".join(" " + text for text, _, _ in stretches)
        # Milliseconds: what a word's times are rounded to.
        assert [(w.text, w.start, w.end) for w in mine] == [
            (text, round(first * FRAME, 3), round((last + 1) * FRAME, 3))
            for text, first, last in stretches
        ]


# ---- subtitles


def seconds(clock):
    hours, minutes, rest = clock.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def parse_srt(text):
    """[(start, end, lines)]; strict: numbers in order, blank lines between cues only."""
    cues = []
    for number, block in enumerate(text.removesuffix("\n").split("\n\n") if text else [], 1):
        index, times, *lines = block.split("\n")
        assert index == str(number) and lines and all(lines)
        start, end = re.fullmatch(
            r"(\d{2,}:\d\d:\d\d,\d{3}) --> (\d{2,}:\d\d:\d\d,\d{3})", times
        ).groups()
        cues.append((seconds(start), seconds(end), lines))
    return cues


def parse_vtt(text):
    """[(start, end, voice or None, lines)]; strict as the WebVTT grammar where we use it."""
    header, *blocks = text.removesuffix("\n").split("\n\n")
    assert header == "WEBVTT"
    cues = []
    for block in blocks:
        times, *lines = block.split("\n")
        start, end = re.fullmatch(
            r"(\d{2,}:\d\d:\d\d\.\d{3}) --> (\d{2,}:\d\d:\d\d\.\d{3})", times
        ).groups()
        voice, body = re.fullmatch(r"(?:<v ([^<>\n]+)>)?([^<>]+)", "\n".join(lines)).groups()
        assert not re.search(r"&(?!(amp|lt|gt);)", body)
        cues.append((seconds(start), seconds(end), voice, html.unescape(body).split("\n")))
    return cues


def check_cues(cues, words):
    """Rules of the house: order, length on screen, lines; then the words of all cues."""
    assert [c[0] for c in cues] == sorted(c[0] for c in cues)
    texts = []
    for start, end, lines in cues:
        cue_words = " ".join(lines).split()
        single = len(cue_words) == 1
        assert end > start
        assert end - start <= 6.0005 or single  # half a millisecond of rounding
        assert len(lines) <= 2
        assert all(len(line) <= LINE_CHARS or " " not in line for line in lines)
        texts += cue_words
    assert texts == [w.text for w in words]


# Escapes, tags, an arrow, digits alone, a word longer than a line.
NASTY = ["&", "&amp;", "<v", "bob>", "-->", "<i>", "7", "x" * 60, "a-" * 30, "WEBVTT", "NOTE"]


@given(speech())
@example(([(9 * i, "▁" + word, "moshi") for i, word in enumerate(NASTY)], None))
def test_subtitles_parse_back_to_the_same_words(data):
    transcript = spoken(*data[0])
    words = transcript.words
    check_cues(parse_srt(transcript.to_srt()), words)
    vtt = parse_vtt(transcript.to_vtt())
    check_cues([(start, end, lines) for start, end, _, lines in vtt], words)
    assert all(voice is None for _, _, voice, _ in vtt)
    assert transcript.to_txt().split() == [w.text for w in words]
    starts = {w.start for w in words}
    assert all(min(abs(start - s) for s in starts) < 0.0006 for start, _, _, _ in vtt)


@given(speech(("moshi", "user")))
def test_two_speakers_are_named_in_every_format(data):
    transcript = spoken(*data[0])
    words = transcript.words
    names = {"moshi": "Moshi", "user": "You"}
    by_name = {names[s]: [w.text for w in words if w.speaker == s] for s in names}
    assume(all(by_name.values()))
    found = {format: {"Moshi": [], "You": []} for format in ("txt", "srt", "vtt")}
    for _, _, voice, lines in parse_vtt(transcript.to_vtt()):
        found["vtt"][voice] += " ".join(lines).split()
    said = [" ".join(lines) for _, _, lines in parse_srt(transcript.to_srt())]
    for format, lines in (("srt", said), ("txt", transcript.to_txt().split("\n")[:-1])):
        for line in lines:
            name, text = line.split(": ", 1)
            found[format][name] += text.split()
    assert found == dict.fromkeys(found, by_name)


def test_a_pause_begins_a_new_cue_and_a_new_line():
    transcript = spoken((0, "▁a"), (5, "▁b"), (20, "▁c"))
    assert [lines for _, _, lines in parse_srt(transcript.to_srt())] == [["a b"], ["c"]]
    assert transcript.to_txt() == "a b\nc\n"


def test_slow_speech_is_cut_before_six_seconds():
    transcript = spoken(*[(10 * i, "▁x") for i in range(20)])  # 0.8 s apart: no pause among them
    cues = parse_srt(transcript.to_srt())
    assert [len(lines[0].split()) for _, _, lines in cues] == [8, 8, 4]
    check_cues(cues, transcript.words)


def test_a_cue_stays_long_enough_to_read_but_gives_way_to_the_next():
    transcript = spoken(*[(i, "▁" + "x" * 40) for i in range(3)], (100, "▁end"))
    times = [(start, end) for start, end, _ in parse_srt(transcript.to_srt())]
    assert times == [(0.0, 0.16), (0.16, 1.16), (8.0, 9.0)]


def test_hours_past_99_and_milliseconds_that_carry():
    frame = round((100 * 3600 + 58) / FRAME)
    assert "100:00:58.000 --> 100:00:59.000" in spoken((frame, "▁late")).to_vtt()
    later = spoken((frame, "▁late"), delays={"moshi": -1.9996})
    assert "100:01:00,000 --> 100:01:01,000" in later.to_srt()


def test_nothing_said():
    transcript = Transcript()
    assert transcript.to_txt() == transcript.to_srt() == ""
    assert transcript.to_vtt() == "WEBVTT\n"
    assert json.loads(transcript.to_json())["words"] == []


def test_json_has_what_a_program_needs():
    value = json.loads(spoken((0, "▁hé"), (9, "▁you", "user")).to_json())
    assert value == {
        "version": 1,
        "sample_rate": 24000,
        "speakers": ["moshi", "user"],
        "words": [
            {"text": "hé", "start": 0.0, "end": 0.08, "speaker": "moshi"},
            {"text": "you", "start": 0.72, "end": 0.8, "speaker": "user"},
        ],
    }


# ---- state


@given(speech(("moshi", "user")), st.data())
def test_resumed_equals_uninterrupted_at_any_point(data, draw):
    tokens, _ = data
    cut = draw.draw(st.integers(0, len(tokens)))
    whole, first = Transcript({"user": 0.5}), Transcript({"user": 0.5})
    printed = [whole.add(*token) for token in tokens]
    before = [first.add(*token) for token in tokens[:cut]]
    second = Transcript.from_state(json.loads(json.dumps(first.state())))
    assert second.words == first.words
    assert before + [second.add(*token) for token in tokens[cut:]] == printed
    assert second.state() == whole.state()
    assert second.to_json() == whole.to_json()


def test_resumed_in_the_middle_of_a_character():
    first = spoken((0, "▁x"), (1, "<0xE2>"), (2, "<0x82>"))
    second = Transcript.from_state(first.state())
    assert second.add(3, "<0xAC>") == "€"
    assert second.words == [Word("x€", 0.0, 0.32, "moshi")]
    assert first.words == [Word("x", 0.0, 0.08, "moshi")]  # not shared with the one resumed


def test_a_state_of_another_version_is_refused():
    with pytest.raises(UserError, match="version 1, found 9"):
        Transcript.from_state({**Transcript().state(), "version": 9})


# ---- files


@pytest.mark.parametrize("format", FORMATS)
def test_write_replaces_the_file_and_leaves_nothing_beside(tmp_path, format):
    transcript = spoken((0, "▁Zoë"))
    path = tmp_path / "talk.out"
    path.write_text("old")
    transcript.write(path, format)
    assert path.read_text(encoding="utf-8") == getattr(transcript, f"to_{format}")()
    assert list(tmp_path.iterdir()) == [path]


def test_write_follows_a_link_and_writes_into_a_pipe(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    spoken((0, "▁new")).write(link, "txt")
    assert link.is_symlink() and real.read_text() == "new\n"
    code = (
        "from moshi_ttt_mlx.transcript import Transcript\n"
        "t = Transcript(); t.add(0, '▁hi'); t.write('/dev/stdout', 'txt')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "hi\n"


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("missing/talk.srt", "srt", "No such file or directory"),
        ("", "txt", "Is a directory"),
        ("file/talk.txt", "txt", "Not a directory"),
        ("talk.doc", "doc", "expected a format from txt, json, srt, vtt, found 'doc'"),
    ],
)
def test_write_says_why_it_cannot(tmp_path, name, format, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        Transcript().write(tmp_path / name, format)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_text("old")
    code = (
        "import resource, sys\n"
        "from moshi_ttt_mlx.transcript import Transcript\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "t = Transcript()\n"
        "for i in range(1000): t.add(i, '▁word')\n"
        "t.write(sys.argv[1], 'txt')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert (
        "UserError" in done.stderr and "cannot write the transcript: File too large" in done.stderr
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
