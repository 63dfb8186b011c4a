"""List, look into and remove the talks that `--session NAME` keeps.

They are in `$MOSHI_TTT_SESSIONS`, else in ~/Library/Application Support/moshi-ttt-mlx/sessions on
macOS and in ~/.local/share/moshi-ttt-mlx/sessions elsewhere.
"""

import argparse
import json
import time
from dataclasses import asdict

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ..session_store import SessionInfo, SessionStore, last_words, memory_norms
from ..transcript import NAMES, clock

LAST_WORDS = 60
_WIDE = 200  # columns where no terminal sets a limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="list|show|rm", required=True)
    listing = actions.add_parser("list", help="all talks, the latest first")
    showing = actions.add_parser("show", help="one talk: settings, last words, memory")
    showing.add_argument("name", metavar="NAME")
    for action, do in ((listing, _list), (showing, _show)):
        action.add_argument("--json", action="store_true", help="for programs")
        action.set_defaults(do=do)
    removing = actions.add_parser("rm", help="remove talks for good")
    removing.add_argument("names", metavar="NAME", nargs="+")
    removing.set_defaults(do=_remove)


def run(args: argparse.Namespace) -> int | None:
    return args.do(args, SessionStore())


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDE)


def _list(args: argparse.Namespace, store: SessionStore) -> None:
    found = store.list()
    if args.json:
        print(json.dumps([_plain(info) for info in found], indent=1, ensure_ascii=False))
        return
    console = _console()
    if found:
        console.print(_table(found))
    else:
        console.print(f"no sessions in {store.folder}", style="dim", markup=False, soft_wrap=True)


def _table(found: list[SessionInfo]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    table.add_column("model")
    for title in ("talked", "words", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("memory")
    table.add_column("saved", no_wrap=True)
    for info in found:
        size, saved = decimal(info.bytes), _date(info.saved)
        if info.fault:
            fault = Text(f"unreadable: {info.fault}", "yellow")
            table.add_row(Text(info.name), fault, "", "", size, "", saved)
        else:
            age, words = clock(info.seconds), str(info.words)
            memory = info.memory or "-"
            table.add_row(Text(info.name), Text(info.model), age, words, size, memory, saved)
    return table


def _show(args: argparse.Namespace, store: SessionStore) -> None:
    info = store.whole(args.name)
    words, layers = last_words(info.path, LAST_WORDS), memory_norms(info.path)
    if args.json:
        shown = _plain(info) | {"last_words": [asdict(word) for word in words], "layers": layers}
        print(json.dumps(shown, indent=1, ensure_ascii=False))
        return
    console = _console()
    console.print(_facts(info))
    if words:
        console.print(Text.assemble(("\nlast words\n", "dim"), _turns(words)))
    if layers:
        console.print(Text("\nmemory", "dim"))
        console.print(_layers(layers))


def _facts(info: SessionInfo) -> Table:
    given = {name: value for name, value in info.settings.items() if value is not None}
    facts = {
        "name": info.name,
        "file": f"{info.path} ({decimal(info.bytes)})",
        "saved": _date(info.saved),
        "model": info.model,
        "talked": f"{clock(info.seconds)}, {info.words} words",
        "settings": ", ".join(f"{name} {value}" for name, value in given.items()),
    }
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(Text(name, "dim"), Text(fact))
    return table


def _turns(words) -> Text:
    """A line for each speaker's turn."""
    text, speaker = Text(), None
    for word in words:
        if word.speaker != speaker:
            end = "\n" if speaker else ""
            text.append(f"{end}{clock(word.start)} {NAMES.get(word.speaker, word.speaker)}:", "dim")
        text.append(f" {word.text}")
        speaker = word.speaker
    return text


def _layers(layers: dict[int, dict[str, float | int]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("layer", "updates", "tokens", "last step", "weights"):
        table.add_column(title, justify="right")
    for layer, norms in layers.items():
        counts = str(norms["updates"]), str(norms["tokens"])
        table.add_row(str(layer), *counts, f"{norms['step']:.2e}", f"{norms['weights']:.3g}")
    return table


def _remove(args: argparse.Namespace, store: SessionStore) -> None:
    for name in args.names:
        store.remove(name)
        print(f"removed {name}")


def _plain(info: SessionInfo) -> dict:
    return asdict(info) | {"path": str(info.path)}


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
