"""Train a codec's way back to sound alone: who has learned its codes need not learn them again.

    python -m voice.train_decoder BANK CODEC.safetensors OUT.safetensors      (in scripts/)

The decoder gets residual units if the codec has none: they make a voice's harmonics and take half of an
update; in the encoder, whose layers Mimi shares the shape of, they do nothing.
"""

import argparse
from pathlib import Path

import torch
from moshi.models.loaders import get_mimi

from .codec_file import decoded, load, mimi_config, save
from .descent import Descent, add_arguments, begin
from .pieces import Labels, batch_of, piece, read_clips
from .spectral import SpectralLoss, sound_losses, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("codec", type=Path)
    parser.add_argument("out", type=Path)
    add_arguments(parser, steps=5000, rate=8e-4, threads=1)
    args = parser.parse_args()
    rng = begin(args)
    own, users = read_clips(args.bank, Labels(), args.seed)
    print(f"{len(own)} own, {len(users)} of users", flush=True)

    mimi, spectral = get_mimi(None, mimi_config(units=1)).eval(), SpectralLoss()
    load(mimi, args.codec)
    learning = [mimi.upsample, mimi.decoder_transformer, mimi.decoder]
    weights = [weight for part in learning for weight in part.parameters()]
    descent = Descent(weights, args.rate, args.steps)
    for _ in range(args.steps):
        pcm, *_ = batch_of([piece(own, users, rng, args.own) for _ in range(args.batch)])
        with torch.no_grad():
            latents = mimi.decode_latent(mimi.encode(pcm))
        losses = sound_losses(spectral, decoded(mimi, latents), pcm)
        if descent.update(total(losses), losses):
            save(mimi, args.out, units=1)


if __name__ == "__main__":
    main()
