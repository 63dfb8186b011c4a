"""Clips through a codec without its codebooks, for `judge_codec.py`: is it they that limit it?

    python -m voice.code_unquantized CODEC.safetensors IN OUT [--voices af_nova ..]       (in scripts/)

What the encoder gives goes through the quantizer's projections, but is not rounded to any code. In
PyTorch, as `train_codec.py`; `code_clips.py` is the same with codes.
"""

import argparse
from pathlib import Path

import soundfile
import torch
from moshi.models.loaders import get_mimi
from rich.progress import track
from torch import Tensor, nn

from .codec_file import decoded, load, mimi_config
from .ears import clips_in
from .kokoro import SAMPLE_RATE
from .talks import FRAME


@torch.no_grad()
def unquantized(mimi: nn.Module, pcm: Tensor) -> Tensor:
    """Sound `[N]` through the codec, `[N]`."""
    whole = nn.functional.pad(pcm, (0, -len(pcm) % FRAME))[None, None]
    latents = mimi.downsample(mimi.encoder_transformer(mimi.encoder(whole))[0])
    parts = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
    projected = sum(part.output_proj(part.input_proj(latents)) for part in parts)
    return decoded(mimi, projected)[0, 0, : len(pcm)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("codec", type=Path)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--voices", nargs="+", metavar="VOICE", help="default: all")
    args = parser.parse_args()
    mimi = get_mimi(None, mimi_config(units=1)).eval()
    load(mimi, args.codec)
    for clip in track(clips_in(args.source, args.voices), "coding"):
        pcm = torch.from_numpy(soundfile.read(args.source / clip, dtype="float32")[0])
        path = args.out / clip
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, unquantized(mimi, pcm).numpy(), SAMPLE_RATE)


if __name__ == "__main__":
    main()
