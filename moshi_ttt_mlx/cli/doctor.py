"""Examine this machine for a talk: versions, memory, Metal, devices, codec, time of a frame.

Downloads no weights. Exit status 0 when all is well, 1 when a problem was found, 2 for bad flags.
"""

import argparse
import json
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..doctor import Case, Chosen, Finding, examine, summary
from ..errors import UserError
from .common import add_model_arguments, add_user_stt_argument

_STYLES = {"ok": "green", "problem": "bold red", "skipped": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--no-audio", action="store_true", help="leave the sound devices alone")
    parser.add_argument("--context", type=int, help="frames attention sees, as in chat")
    parser.add_argument("--input-device", metavar="NAME|N", help="microphone, as in chat")
    parser.add_argument("--output-device", metavar="NAME|N", help="loudspeaker, likewise")
    add_user_stt_argument(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.context is not None and args.context < 1:
        raise UserError(f"--context must be 1 or more, got {args.context}")
    console = Console(stderr=True)
    table = not args.json and sys.stdout.isatty()
    findings = []
    with console.status("") as status:
        for finding in examine(_case(args, status.update)):
            findings.append(finding)
            if not args.json and not table:
                _print_plain(finding)
    whole = summary(findings)
    if args.json:
        print(json.dumps(_report(findings, whole), ensure_ascii=False, indent=1))
    elif table:
        Console().print(_table(findings), Text(whole.line, _STYLES[whole.verdict]))
    else:
        _print_plain(whole)
    return 1 if whole.verdict == "problem" else 0


def _case(args: argparse.Namespace, progress) -> Case:
    flags = {
        name: getattr(args, name)
        for name in (
            "hf_repo",
            "moshi_weight",
            "mimi_weight",
            "tokenizer",
            "lm_config",
            "quantized",
        )
    }
    return Case(
        Chosen(flags, args.adapter_path, args.codec),
        user_stt=Chosen({"hf_repo": args.user_stt}, codec=args.codec) if args.user_stt else None,
        context=args.context,
        input_device=args.input_device,
        output_device=args.output_device,
        audio=not args.no_audio,
        progress=progress,
    )


def _report(findings: list[Finding], whole: Finding) -> dict:
    checks = [finding.to_dict() for finding in findings]
    return {"verdict": whole.verdict, "line": whole.line, "checks": checks}


def _print_plain(finding: Finding) -> None:
    print(f"{finding.verdict:8} {finding.check}: {finding.line}", flush=True)


def _table(findings: list[Finding]) -> Table:
    table = Table("", "check", "what was found", show_lines=False)
    for finding in findings:
        style = _STYLES[finding.verdict]
        table.add_row(Text(finding.verdict, style), finding.check, Text(finding.line))
    return table
