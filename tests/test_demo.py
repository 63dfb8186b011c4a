"""The demo's talk: its recording, what left the window when, right and wrong, print and picture."""

import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from demo_talk import FRAMES, TURNS, user_sound, write_talk
from rich.console import Console

from moshi_ttt_mlx.audio import FRAME_SIZE
from moshi_ttt_mlx.cli.demo_screen import Page
from moshi_ttt_mlx.demo.record import Record, make_folder
from moshi_ttt_mlx.demo.story import Story, Window, place_of, plain
from moshi_ttt_mlx.demo.turns import Turn, read_recording, read_turns
from moshi_ttt_mlx.errors import UserError
from moshi_ttt_mlx.train.plots import can_plot
from moshi_ttt_mlx.transcript import Transcript, Word

ON, OFF = "with memory", "without memory"
CAT = {"key": "cat", "value": "Bella"}


# -- the recording ---------------------------------------------------------------------------------


def test_a_recording_is_its_frames_and_turns(tmp_path):
    recording = read_recording(write_talk(tmp_path))
    assert recording.turns == [Turn(**turn) for turn in TURNS]
    assert recording.seconds == pytest.approx(FRAMES * 0.08)
    np.testing.assert_allclose(np.concatenate(recording.frames), user_sound(), atol=1 / 32768)


def test_fields_of_others_and_empty_ones_do_no_harm(tmp_path):
    more = {"reply": "Hello.", "said": 2.7, "key": "", "value": None}
    path = write_talk(tmp_path, [TURNS[0], TURNS[1] | more])
    assert read_recording(path).turns[1] == Turn(2.0, 2.5, "talk", "Hello there.")


def changed(number, **fields):
    return [turn | (fields if i == number else {}) for i, turn in enumerate(TURNS)]


@pytest.mark.parametrize(
    "turns, message",
    [
        ([], "an empty list"),
        (changed(0, kind="sing"), "kind is tell or ask or talk, not 'sing'"),
        (changed(0, value=""), "a fact without key or value"),
        (changed(1, text=" "), "a turn without words"),
        (changed(1, start=2.6), "from 2.6 to 2.5 s"),
        (changed(1, start=-1.0), "from -1.0"),
        (changed(1, end=float("nan")), "to nan s"),
        (changed(1, start="soon"), "could not convert"),
        (changed(1, start=1.0), "begins before the turn ahead of it has ended"),
        (changed(2, value="Oscar"), "expects 'Oscar', told was 'Bella'"),
        (changed(2, key="dog"), "expects 'Bella', told was 'nothing'"),
        ([{"start": 1}], "'end'"),
        (["Hello"], "found something else"),
        (changed(2, end=5.5), "do they belong together?"),
    ],
)
def test_a_json_that_does_not_fit_is_one_line(turns, message, tmp_path):
    path = tmp_path / "talk.flac"
    write_talk(tmp_path)
    path.with_suffix(".json").write_text(json.dumps({"turns": turns}))
    with pytest.raises(UserError, match=r"talk\.json") as caught:
        read_recording(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"turns": 3}', "\xff"])
def test_a_broken_json_is_one_line(text, tmp_path):
    (tmp_path / "talk.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="found something else"):
        read_turns(tmp_path / "talk.json")


# -- right, wrong, and the window ------------------------------------------------------------------


def said(text, start, speaker=ON, step=0.24):
    """Words one after another."""
    return [
        Word(word, round(start + step * i, 3), round(start + step * i + 0.08, 3), speaker)
        for i, word in enumerate(text.split())
    ]


def told_story(replies, turns, seconds=100.0, window=None, runs=(ON,)):
    """All passages of a finished talk; `replies` are words."""
    story = Story(turns, runs, window or Window(frames=10, lag=2))
    return story.stop(seconds, SimpleNamespace(words=sorted(replies, key=lambda w: w.start)))


def ask_at(start, key="cat", value="Bella"):
    return Turn(start, start + 1.0, "ask", f"What is my {key}?", key, value)


def tell_at(start, key="cat", value="Bella"):
    return Turn(start, start + 1.0, "tell", f"Remember, my {key} is {value}.", key, value)


@pytest.mark.parametrize(
    "answer, right",
    [
        ("Your cat is Bella.", True),
        ("your cat is BELLA", True),
        ("Bella!", True),
        ("Your cat is, Bella?", True),
        ("Your cat is Oscar.", False),
        ("Your cat is Bellamy.", False),
        ("Your cat is Oscar. Bella.", False),  # guessing twice
        ("Your cat is", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_it_names_the_value_and_no_other(answer, right):
    turns = [tell_at(1), tell_at(3, "sister", "Oscar"), ask_at(10)]
    passages = told_story(said(answer, 11.2), turns)
    assert passages[-1].question.right == {ON: right}


def test_a_value_may_be_two_words():
    words = said("It is New York, yes.", 0)
    assert place_of("new york", words) == 3
    assert place_of("York New", words) is None
    assert plain(["It's", "--", "New-York."]) == ["it's", "newyork"]


def test_each_run_is_judged_by_its_own_words_in_its_own_passage():
    turns = [tell_at(1), ask_at(10), ask_at(20)]
    words = said("Your cat is Bella.", 11.2) + said("Your cat is Bella.", 21.2, OFF)
    first, second = told_story(words, turns, runs=(ON, OFF))[-2:]
    assert first.question.right == {ON: True, OFF: False}
    assert second.question.right == {ON: False, OFF: True}
    # The early end of a question's sound may be talked into, the question itself not.
    early, too_early = said("Bella", 10.8), said("Bella", 10.7)
    assert told_story(early, turns)[-2].question.right == {ON: True}
    assert told_story(too_early, turns)[-2].question.right == {ON: False}


def test_a_fact_leaves_the_window_when_its_last_frame_does():
    window = Window(frames=10, lag=2)
    # Frame 12 ends at 1.04 s, is read until step 12 + 2 - 1 + 10.
    assert window.left(1.04) == pytest.approx((12 + 2 + 10) * 0.08)
    assert window.left(1.041) == pytest.approx((13 + 2 + 10) * 0.08)
    [passage] = told_story([], [tell_at(1)], window=window)
    [left] = passage.left
    assert (left.key, left.told, left.said) == ("cat", 1, 2.0)
    assert left.at == pytest.approx((24 + 2 + 10) * 0.08)


def test_moshi_who_repeats_a_fact_keeps_it_in_the_window():
    """In whichever run: what either can look up in its window counts as inside."""
    turns, window = [tell_at(1), ask_at(4.0)], Window(frames=25, lag=2)
    assert told_story([], turns, window=window)[-1].question.beyond is False  # left at 4.08
    assert told_story([], [turns[0], ask_at(4.1)], window=window)[-1].question.beyond is True
    again = said("Your cat is Bella.", 2.2, OFF)
    question = told_story(again, [turns[0], ask_at(4.1)], window=window, runs=(ON, OFF))[
        -1
    ].question
    assert question.beyond is False
    assert question.said == pytest.approx(again[-1].end)
    assert question.windows_ago == pytest.approx((4.1 - again[-1].end) / 2.0)
    # Without its key, or with another value, it is not the fact.
    for other in ("Bella is here.", "Your cat is Oscar."):
        words = said(other, 2.2)
        assert told_story(words, [turns[0], ask_at(4.1)], window=window)[-1].question.beyond


def test_a_fact_that_comes_back_leaves_again():
    turns = [tell_at(1), ask_at(20), Turn(40, 41, "talk", "Hello there.")]
    passages = told_story(said("Your cat is Bella.", 21.2), turns)
    first, second = (p.left for p in passages[:2])
    assert [(one.since, one.said) for one in first] == [(1, 2.0)]
    assert [(one.since, one.said) for one in second] == [pytest.approx((22.0, 22.0))]
    assert passages[2].left == []
    # Nor has anything left at a time after the talk's end.
    assert told_story([], turns[:1], seconds=2.5)[0].left == []


def test_passages_come_once_they_are_over_and_only_once():
    turns = [tell_at(1), ask_at(10)]
    story, words = Story(turns, (ON,), Window(10, 2)), said("Your cat is Bella.", 2.3)
    words = SimpleNamespace(words=words)
    assert story.advance(11.7, words) == []  # an answer may begin at 10.76, and words settle
    [passage] = story.advance(11.8, words)
    assert passage.turn is turns[0] and passage.replies[ON] == words.words
    assert story.advance(50.0, words) == []
    assert [p.turn for p in story.stop(50.0, words)] == [turns[1]]


def test_an_interrupted_talk_has_no_questions_that_were_not_heard():
    story = Story([tell_at(1), ask_at(10)], (ON,), Window(10, 2))
    assert [p.turn.kind for p in story.stop(10.5, Transcript())] == ["tell"]


def test_the_window_is_that_of_attention():
    """One layer, forced tokens: a code is felt until the step before `Window.left`, not after."""
    import tiny
    from moshi_mlx.utils import Sampler

    from moshi_ttt_mlx.generate import FrameGenerator

    lm = tiny.build_lm(tiny.moshi_config(num_layers=1, context=8))
    window = Window(8, max(lm.cfg.audio_delays) + 1)
    greedy, changed = Sampler(temp=0.0), 5

    def outputs(code):
        generator = FrameGenerator(lm, greedy, greedy, window=8, seed=0, compile=False)
        out = []
        for frame in range(25):
            user = np.full((1, 8), code if frame == changed else 7)
            done = generator.step(user, text=np.full((1, 1), 3), audio=np.full((1, 8), 9))
            done.read()
            out.append(np.array(done.transformer_out))
        return out

    pairs = zip(outputs(7), outputs(100), strict=True)
    felt = [frame for frame, (a, b) in enumerate(pairs) if not np.array_equal(a, b)]
    gone = round(window.left((changed + 1) * 0.08) / 0.08)
    assert felt == list(range(changed + 1, gone))


# -- what is kept ----------------------------------------------------------------------------------


def step(run, index, piece=None, level=0.0, report=None, delay=1):
    pcm = None if index < delay else np.full(FRAME_SIZE, level, np.float32)
    spoken = SimpleNamespace(index=index, piece=piece, pcm=pcm, memory_ok=True)
    return SimpleNamespace(run=run, spoken=spoken, report=report)


ANSWERS = {ON: "Your cat is Bella.", OFF: "Your cat is Oscar."}


def hold(folder, path, window=None, frames=FRAMES, runs=(ON, OFF)):
    """A record of a talk in which both runs confirm, and one knows the answer."""
    record = Record(read_recording(path), runs, window or Window(10, 2), make_folder(folder))
    pieces = {run: {} for run in runs}
    for start, text in ((17, dict.fromkeys(runs, "Your cat is Bella.")), (48, ANSWERS)):
        for run in runs:
            for number, word in enumerate(text[run].split()):
                pieces[run][start + 2 * number] = "\u2581" + word
    with record:
        for index in range(frames):
            for number, run in enumerate(runs):
                norms = {"step": 0.01 * index, "drift": 0.02 * index, "gate": 1.0}
                report = {2: norms, 3: norms} if run == ON and index % 16 == 15 else None
                record.take(step(run, index, pieces[run].get(index), 0.25 + number / 4, report))
        record.finish()
    return record


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    return hold(folder / "out", write_talk(folder))


def test_stereo_has_moshi_left_and_the_user_right_in_step(record):
    for name, level in (("with_memory", 0.25), ("without_memory", 0.5)):
        sound, rate = soundfile.read(record.folder / f"{name}.wav", always_2d=True)
        assert rate == 24000 and sound.shape == (FRAMES * FRAME_SIZE, 2)
        np.testing.assert_allclose(sound[:, 1], user_sound(), atol=1.5 / 32768)
        # The reply of the last frame has not come.
        assert (sound[:-FRAME_SIZE, 0] == level).all() and not sound[-FRAME_SIZE:, 0].any()


def test_the_transcript_has_all_sides_with_times(record):
    words = json.loads((record.folder / "transcript.json").read_text())["words"]
    by_speaker = {
        name: " ".join(w["text"] for w in words if w["speaker"] == name)
        for name in ("user", ON, OFF)
    }
    assert by_speaker["user"] == " ".join(turn["text"] for turn in TURNS)
    assert by_speaker[ON] == "Your cat is Bella. Your cat is Bella."
    assert by_speaker[OFF] == "Your cat is Bella. Your cat is Oscar."
    first = next(w for w in words if w["speaker"] == "user")
    assert (first["text"], first["start"]) == ("Remember,", 0.4)
    text = (record.folder / "transcript.txt").read_text()
    assert "You: Remember, my cat is Bella." in text and f"{OFF}: Your cat is Oscar." in text
    assert (record.folder / "transcript.srt").read_text().startswith("1\n00:00:00,400 --> ")


def test_the_norms_are_kept_with_their_times(record):
    assert [time for time, _ in record.talks[ON].reports] == pytest.approx([1.28, 2.56, 3.84])
    assert record.talks[OFF].reports == []


def test_a_talk_that_ends_early_is_written_as_far_as_it_went(tmp_path):
    record = hold(tmp_path / "out", write_talk(tmp_path), frames=30)
    sound, _ = soundfile.read(tmp_path / "out" / "with_memory.wav")
    assert len(sound) == 30 * FRAME_SIZE
    assert [p.turn.kind for p in record.passages] == ["tell"] and record.questions == []


def test_a_full_disk_is_one_line(tmp_path):
    record = Record(read_recording(write_talk(tmp_path)), (ON,), Window(10, 2), tmp_path)
    with open("/dev/full", "wb") as full, record:
        os.dup2(full.fileno(), record.talks[ON].sound._fd)
        with pytest.raises(UserError, match="no space left"):
            for index in range(3):
                record.take(step(ON, index))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "no" / "folder", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match="cannot make the folder"):
            make_folder(path)


# -- print -----------------------------------------------------------------------------------------


def printed(record, width=80, encoding="utf-8"):
    """What a pipe gets."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    page = Page(Console(file=file, width=width, highlight=False), list(record.runs))
    page.head()
    for passage in record.passages:
        page.passage(passage)
    page.summary(record, 2.4)
    file.flush()
    return [line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()]


def test_both_runs_stand_side_by_side_at_80_columns(record):
    lines = printed(record)
    assert max(map(len, lines)) <= 80
    head = lines[0]
    first, second = head.index(ON), head.index(OFF)
    asked = next(i for i, line in enumerate(lines) if "What is my cat?" in line)
    assert lines[asked].split()[:2] == ["0:03", "You:"]
    answers = lines[asked + 1]
    assert answers[first:second].strip() == "0:03 Your cat is Bella. ✓ right"
    assert answers[second:] == "0:03 Your cat is Oscar. ✗ wrong"


def test_what_left_the_window_is_said_with_its_times(record):
    # Said again by Moshi until 1.92 s: frame 23, read until step 34.
    assert f"{'':7}cat: told at 0:00, left the window at 0:02" in printed(record)


def test_a_pipe_that_knows_ascii_alone_gets_words(record):
    text = "\n".join(printed(record, encoding="ascii"))
    assert "+ right" in text and "x wrong" in text


def test_narrow_terminals_wrap(record):
    lines = printed(record, width=50)
    assert max(map(len, lines)) <= 50
    assert "wrong" in " ".join(lines)


def test_the_summary_counts_what_was_asked(record):
    lines = printed(record)
    table = {line[:17].strip(): line[17:].split() for line in lines[-5:]}
    assert table["inside the window"] == ["0", "12.5%"]
    # From 1.92 s (Moshi's own) to 3.0 s, in windows of 0.8 s.
    beyond = ["1", "1.4", "to", "1.4", "1", "(100%)", "0", "(0%)", "12.5%"]
    assert table["beyond the window"] == beyond
    assert lines[-1].startswith("0:04 of talk, both runs in 2 s, 2.0x real time, a window is 10")


# -- picture ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_the_picture_has_the_talk_the_facts_and_the_norms(record, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from moshi_ttt_mlx.demo.picture import draw

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))
    )
    draw(record, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    [figure] = kept
    talk, facts, memory, drift = figure.axes
    assert "1 with memory, 0 without memory" in figure.get_suptitle()
    texts = {text.get_text().replace("\n", " ") for text in talk.texts}
    assert {"Remember, my cat is Bella.", "✓ Your cat is Bella."} <= texts
    assert "✗ Your cat is Oscar." in texts
    names = [label.get_text() for label in talk.get_yticklabels()]
    assert names == ["You", "with\nmemory", "without\nmemory"]
    assert [label.get_text() for label in facts.get_yticklabels()] == ["cat"]
    marks = {text.get_text(): text.get_position() for text in facts.texts}
    assert marks["✓"][0] == marks["✗"][0] == 3.0 and marks["✓"][1] > marks["✗"][1]
    assert {"Bella", "1.4"} <= set(marks)
    bar = facts.patches[0]
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((0.4, 2.8))
    [line, _] = memory.lines
    np.testing.assert_allclose(line.get_xdata(), [1.28, 2.56, 3.84])
    np.testing.assert_allclose(line.get_ydata(), [0.15, 0.31, 0.47])
    np.testing.assert_allclose(drift.lines[0].get_ydata(), [0.3, 0.62, 0.94])


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_a_talk_of_one_run_without_memory_has_its_picture(tmp_path):
    from moshi_ttt_mlx.demo.picture import draw

    record = Record(read_recording(write_talk(tmp_path)), ("Moshi",), Window(10, 2), tmp_path)
    with record:
        record.take(step("Moshi", 0))
        record.finish()
    draw(record, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
