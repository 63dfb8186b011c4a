"""Clips through a model's codec and back, to be judged by `judge_codec.py`.

    python -m voice.code_clips MODEL IN OUT [--voices af_heart ..]       (in scripts/)

MODEL is what `moshi_ttt_mlx.load` takes: a folder, a repository, or `demo`. `IN/<voice>/<words>.flac`
becomes `OUT/<voice>/<words>.flac`, as long as it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from rich.progress import track

from moshi_ttt_mlx import UserError, load
from moshi_ttt_mlx.audio import iter_frames
from moshi_ttt_mlx.codec import Codec

from .ears import clips_in


def coded(clip: Path, codec: Codec) -> np.ndarray:
    """Frame by frame, as in a talk: float32 `[N]` at the codec's rate, of whole frames."""
    codec.reset()
    with iter_frames(clip, codec.frame_size, codec.sample_rate) as frames:
        return np.concatenate([codec.decode(codec.encode(frame)) for frame in frames])


def code_clips(codec: Codec, source: Path, out: Path, clips: Sequence[Path]) -> None:
    """Write the coded clips; paths are inside `source`, and the same inside `out`.

    Raises:
        UserError: a clip that cannot be read.
    """
    for clip in track(clips, "coding"):
        path = (out / clip).with_suffix(".flac")
        path.parent.mkdir(parents=True, exist_ok=True)
        info = soundfile.info(source / clip)
        samples = round(info.frames * codec.sample_rate / info.samplerate)
        soundfile.write(path, coded(source / clip, codec)[:samples], codec.sample_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--voices", nargs="+", metavar="VOICE", help="default: all")
    args = parser.parse_args()
    clips = clips_in(args.source, args.voices)
    if not clips:
        parser.error(f"{args.source}: expected VOICE/WORDS.flac or .wav in it, found none")
    try:
        code_clips(load(args.model).new_codec(), args.source, args.out, clips)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
