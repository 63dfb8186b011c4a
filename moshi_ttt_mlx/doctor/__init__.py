"""An examination of this machine for a talk: one check after another, each on its own.

    for finding in examine(Case(Chosen({"hf_repo": "demo"}))):
        print(finding.verdict, finding.check, finding.line)

Every check is a function in a file of its subject (`machine.py`, `footprint.py`, `kernels.py`,
`sound.py`, `probe.py`) that looks at a `case.Case` and returns a `finding.Finding`. What lives here:
their order, and that whatever goes wrong in one of them becomes a line and not the end.
"""

import logging
from collections.abc import Iterator
from importlib import import_module

from ..errors import UserError
from .case import Case, Chosen
from .finding import Finding, Verdict

__all__ = ["CHECKS", "Case", "Chosen", "Finding", "Verdict", "examine", "summary"]

_log = logging.getLogger(__name__)

# Name -> file and function. Imported when it is run: what a check needs may be missing here.
CHECKS = {
    "versions": ("machine", "check_versions"),
    "machine": ("machine", "check_machine"),
    "memory": ("footprint", "check_memory"),
    "metal": ("kernels", "check_metal"),
    "codec": ("probe", "check_codec"),
    "microphone": ("sound", "check_microphone"),
    "loudspeaker": ("sound", "check_loudspeaker"),
    "frame time": ("probe", "check_frame_time"),
}


def examine(case: Case) -> Iterator[Finding]:
    """Run all checks, cheap ones first; a finding for each, whatever happens."""
    for name in CHECKS:
        case.progress(name)
        yield _run(name, case)


def _run(name: str, case: Case) -> Finding:
    module, function = CHECKS[name]
    try:
        return getattr(import_module(f".{module}", __package__), function)(case)
    except UserError as error:
        return Finding(name, "problem", str(error))
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        return Finding(name, "skipped", f"needs {package}, which is not installed")
    except Exception as error:  # a check that fails in an unforeseen way is a finding, too
        _log.debug("%s", name, exc_info=True)
        first_line = str(error).strip().partition("\n")[0]
        return Finding(name, "problem", f"unexpected {type(error).__name__}: {first_line}")


def summary(findings: list[Finding]) -> Finding:
    """All findings in one: a problem if any is."""
    problems = [f.check for f in findings if f.verdict == "problem"]
    skipped = [f.check for f in findings if f.verdict == "skipped"]
    parts = [f"{len(findings) - len(problems) - len(skipped)} of {len(findings)} checks good"]
    if problems:
        parts.append(f"problems: {', '.join(problems)}")
    if skipped:
        parts.append(f"left out: {', '.join(skipped)}")
    return Finding("sum", "problem" if problems else "ok", "; ".join(parts))
