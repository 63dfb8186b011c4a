"""Which talks are evaluated: every shard that fits the model; the others are named.

paths = find_paths(["shards", "more/a.safetensors"])
talks, skipped = usable_talks(paths, lm.cfg)
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from moshi_mlx.models import LmConfig

from ..errors import UserError
from ..train.data import Shard, check_codes, check_shards, open_shard, shard_paths


def find_paths(sources: Iterable[str | Path]) -> list[Path]:
    """All shard files of some folders and files; none is opened.

    Raises:
        UserError: a source that does not exist, or a folder without shards.
    """
    return [path for source in sources for path in shard_paths(source)]


def usable_talks(
    paths: Sequence[Path], config: LmConfig
) -> tuple[list[Shard], list[tuple[Path, str]]]:
    """The talks that can be read, and the files that cannot, with reasons.

    Every file is read as a whole here, so that nothing is found out hours later.

    Raises:
        UserError: not one usable talk.
    """
    talks, skipped, seen = [], [], set()
    for path in paths:
        try:
            if path.resolve() in seen:
                raise UserError(f"{path}: named twice")
            seen.add(path.resolve())
            talks.append(_checked(path, config))
        except UserError as error:
            skipped.append((path, str(error).removeprefix(f"{path}: ")))
    if not talks:
        raise UserError(f"not one usable talk; {skipped[0][0]}: {skipped[0][1]}")
    return talks, skipped


def _checked(path: Path, config: LmConfig) -> Shard:
    shard = open_shard(path)
    check_shards([shard], config)
    check_codes(shard.codes(), config, str(path))
    return shard
