"""Train a codec's way back to sound alone: who has learned its codes need not learn them again.

    python -m voice.train_decoder BANK CODEC.safetensors OUT.safetensors      (in scripts/)

The decoder gets residual units if the codec has none: they make a voice's harmonics and take half of an
update; in the encoder, whose layers Mimi shares the shape of, they do nothing.
"""

import argparse
import random
from pathlib import Path

import torch
from moshi.models.loaders import get_mimi
from torch import nn

from .codec_file import decoded, load, mimi_config, save
from .means import Means
from .pieces import Labels, batch_of, piece, read_clips
from .spectral import SpectralLoss, sound_losses, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("codec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--own", type=float, default=0.3, help="share of the model's own voice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    own, users = read_clips(args.bank, Labels(), args.seed)
    print(f"{len(own)} own, {len(users)} of users", flush=True)

    mimi, spectral = get_mimi(None, mimi_config(units=1)).eval(), SpectralLoss()
    load(mimi, args.codec)
    learning = [mimi.upsample, mimi.decoder_transformer, mimi.decoder]
    weights = [weight for part in learning for weight in part.parameters()]
    optimizer = torch.optim.AdamW(weights, args.rate, (0.8, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.rate, total_steps=args.steps, pct_start=0.05, final_div_factor=10
    )
    means = Means()
    for step in range(1, args.steps + 1):
        pcm, *_ = batch_of([piece(own, users, rng, args.own) for _ in range(args.batch)])
        with torch.no_grad():
            latents = mimi.decode_latent(mimi.encode(pcm))
        losses = sound_losses(spectral, decoded(mimi, latents), pcm)
        optimizer.zero_grad()
        total(losses).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        means.add(losses)
        if step % 50 == 0:
            print(step, means.line(), flush=True)
        if step % 250 == 0 or step == args.steps:
            save(mimi, args.out, units=1)


if __name__ == "__main__":
    main()
