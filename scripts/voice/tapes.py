"""Tokenized talks in one small file, so that a model can learn without any sound being made again.

    python -m voice.tapes OUT.npz --from TALKS SHARDS [--from ..]      (in scripts/)
    python -m voice.tapes FILE.npz --into FOLDER     # FOLDER/talks and FOLDER/shards, for `voice.remix`

Codes and notes of `voice.dialogues` and `moshi-ttt-mlx tokenize`: 13 kB a minute of two voices. The
codes are those of one codec; with another they mean nothing.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from moshi_ttt_mlx.train.data import find_shards, write_shard

from .remix import read_notes

NOTES = ("turns", "left_turns")  # what `voice.remix` reads of them


def pack(sources: list[tuple[Path, Path]], out: Path) -> int:
    """Write talks of one length, without the rest of their notes; how many."""
    codes, about = [], []
    for talks, shards in sources:
        for shard in find_shards(shards):
            name = Path(shard.meta["source"]).stem
            notes = read_notes(talks, shard)
            notes = {part: notes[part] for part in NOTES if part in notes}
            codes.append(shard.codes())
            about.append({"name": f"{talks.name}-{name}", **notes})
    small = np.stack(codes).astype(np.uint8)
    if (small != np.stack(codes)).any():
        raise SystemExit("tokens beyond 255 do not fit")
    words = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with out.open("wb") as file:
        np.savez_compressed(file, codes=small, about=words)
    return len(codes)


def unpack(path: Path, folder: Path) -> int:
    """The inverse of `pack`; how many talks."""
    with np.load(path, allow_pickle=False) as file:
        codes, about = file["codes"].astype(np.int32), json.loads(file["about"].tobytes())
    (folder / "talks").mkdir(parents=True, exist_ok=True)
    for talk, notes in zip(codes, about, strict=True):
        name = notes.pop("name")
        (folder / "talks" / f"{name}.json").write_text(json.dumps(notes))
        write_shard(folder / "shards" / f"{name}.safetensors", talk, {"source": f"{name}.flac"})
    return len(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--from", dest="sources", nargs=2, type=Path, action="append")
    parser.add_argument("--into", type=Path)
    args = parser.parse_args()
    if bool(args.sources) == bool(args.into):
        parser.error("either --from, to pack, or --into, to unpack")
    count = unpack(args.file, args.into) if args.into else pack(args.sources, args.file)
    print(f"{count} talks")


if __name__ == "__main__":
    main()
