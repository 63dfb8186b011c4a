"""What an examination finds, and how sizes are written. No check lives here."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "problem", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        verdict: `ok`; `problem`, which the line says how to solve; or `skipped`, which it gives the
            reason for.
        line: for people, one line.
        facts: the same for programs: numbers and strings by name, ready for JSON.
    """

    check: str
    verdict: Verdict
    line: str
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks and chips are sold: `2.7 MB`, `4.61 GB`."""
    if abs(count) >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB"
