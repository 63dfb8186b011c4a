"""Talk in a browser, or from any program: a web page and two WebSocket protocols around one model.

Only this machine can connect unless --host says otherwise; then a token is needed, and --ssl, since
browsers give a microphone to encrypted pages only. Ctrl-C ends all talks; docs/server.md has the rest.
"""

import argparse
import socket
import ssl
import sys
import webbrowser
from pathlib import Path

from rich.console import Console

from ..errors import UserError
from ..session_store import SessionStore, session_name
from .common import (
    DEMO_NOTE,
    add_model_arguments,
    add_talk_arguments,
    add_user_stt_argument,
    leave_at_once,
    load_model,
    load_user_stt,
    talk_settings,
)

_ANY = ("0.0.0.0", "::", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="localhost", help="address to listen on (this machine)")
    group.add_argument("--port", type=int, default=8998)
    group.add_argument("--token", help="what clients must know; made up when others can connect")
    group.add_argument("--ssl", metavar="DIR", help="folder with cert.pem and key.pem")
    group.add_argument("--ssl-cert", metavar="FILE", help="certificate chain, with --ssl-key")
    group.add_argument("--ssl-key", metavar="FILE")
    group.add_argument("--max-sessions", type=int, default=1, metavar="N", help="talks at a time")
    group.add_argument(
        "--session",
        metavar="NAME",
        help="the talk that every start goes on with, saved when it ends; needs --max-sessions 1",
    )
    group.add_argument(
        "--sessions-dir", metavar="DIR", help="saved talks (default: where `sessions` looks)"
    )
    group.add_argument(
        "--record-minutes",
        type=float,
        default=120.0,
        metavar="M",
        help="sound kept of each talk for download until the server stops; 0 keeps none",
    )
    group.add_argument("--no-browser", action="store_true", help="do not open the page")
    add_user_stt_argument(parser)
    add_model_arguments(parser)
    add_talk_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        from aiohttp import web
    except ImportError as error:
        raise UserError("serve needs aiohttp: pip install 'moshi-ttt-mlx[web]'") from error
    from ..serve.guard import Guard, choose_token
    from ..serve.limits import Limits

    # All that can be wrong without a model is checked first: loading one takes minutes.
    if args.max_sessions < 1 or args.record_minutes < 0:
        raise UserError("--max-sessions is 1 or more, --record-minutes 0 or more")
    if not 0 < args.port < 1 << 16:
        raise UserError(f"--port is 1..65535, got {args.port}")
    if args.session is not None:
        args.session = _usual(args)
    token = choose_token(args.host, args.token)
    context = _ssl_context(args)
    limits = Limits(sessions=args.max_sessions, record_minutes=args.record_minutes)
    app = _load(args, Guard(args.host, token), limits)
    try:
        web.run_app(
            app,
            host=args.host,
            port=args.port,
            ssl_context=context,
            access_log=None,
            print=lambda _: _greet(args, token, secure=context is not None),  # once it listens
        )
    except OSError as error:
        raise UserError(
            f"cannot listen on {args.host} port {args.port}: {error.strerror}: "
            "choose another one with --port"
        ) from error
    return 0


def _usual(args: argparse.Namespace) -> str:
    """The name in `--session`, which is a talk that can be resumed, or none yet."""
    if args.max_sessions != 1:
        raise UserError("--session is one talk: it goes with --max-sessions 1")
    store = SessionStore(args.sessions_dir)
    if store.has(args.session):
        store.whole(args.session)
    return session_name(store.path(args.session))


def _load(args: argparse.Namespace, guard, limits):
    """The application, with its model loaded on the model's own thread."""
    from ..serve.app import Server
    from ..serve.info import describe
    from ..serve.model_thread import ModelThread
    from ..serve.shelf import Shelf
    from ..user_words import open_talk

    console, defaults, thread = Console(stderr=True), talk_settings(args), ModelThread()
    store = SessionStore(args.sessions_dir)

    def load():
        model, listener = load_model(args, console), load_user_stt(args, console)

        def open_session(settings: dict, path: Path | None):
            session = open_talk(model, listener, path, **settings)
            session.warm_up()
            return session

        # Begun and thrown away: bad flags show now, and the first client waits less.
        usual = args.session and store.path(args.session)
        open_session(defaults, usual if usual and usual.exists() else None)
        return open_session, model.fingerprint, describe(model, listener, defaults, limits)

    try:
        open_session, fingerprint, info = thread.call(load).result()
    except KeyboardInterrupt:
        leave_at_once()
    except BaseException:
        thread.close()
        raise
    shelf = Shelf(store, fingerprint, args.session)
    return Server(info, defaults, guard, limits).app(thread, open_session, shelf)


def _ssl_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    cert, key = args.ssl_cert, args.ssl_key
    if args.ssl:
        cert, key = cert or f"{args.ssl}/cert.pem", key or f"{args.ssl}/key.pem"
    if not cert and not key:
        return None
    if not cert or not key:
        raise UserError("--ssl-cert and --ssl-key go together")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot use {cert} with {key}: {reason}") from error
    return context


def _address(host: str, args: argparse.Namespace, token: str | None, secure: bool) -> str:
    host = f"[{host}]" if ":" in host else host
    fragment = f"#token={token}" if token else ""
    return f"http{'s' if secure else ''}://{host}:{args.port}/{fragment}"


def _own_address() -> str | None:
    """This machine's address in its network, as other devices see it; None without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # chooses a way there and sends nothing
        except OSError:
            return None
        return probe.getsockname()[0]


def _greet(args: argparse.Namespace, token: str | None, secure: bool) -> None:
    from ..serve.guard import is_loopback

    everywhere = args.host in _ANY
    address = _address("localhost" if everywhere else args.host, args, token, secure)
    note = Console(stderr=True, highlight=False)
    if args.hf_repo == "demo":
        note.print(DEMO_NOTE, style="yellow")
    if not is_loopback(args.host) and not secure:
        warning = "without --ssl browsers on other devices give no microphone, and all is readable"
        note.print(warning, style="yellow")
    print(f"talk at {address} (Ctrl-C ends)", flush=True)
    if everywhere and (own := _own_address()):
        print(f"on other devices: {_address(own, args, token, secure)}", flush=True)
    if not args.no_browser and sys.stdout.isatty() and is_loopback(args.host):
        webbrowser.open(address)
