"""Train the small Mimi: an autoencoder on the bank, in PyTorch with Kyutai's own modules.

    python -m voice.train_codec BANK OUT.safetensors [--steps 4000]      (in scripts/)

Kyutai publishes Mimi's modules with the training side of its quantizer (residual VQ, straight-through
gradients, codebooks as moving averages, unused codes put back to use): package `moshi`. The file that
comes out is in Kyutai's layout, and `moshi_ttt_mlx` opens it as any other.

What is learned: log-mel spectra at four resolutions, the waveform a little, and, as Mimi's first
codebook is taught words by WavLM, here by the text-to-speech model, which knows when it says what: three
phonemes a frame from a linear layer on the first codebook's output alone, and each word from a recurrent
one, a frame after its end. The way back to sound sends the first codebook no gradient, so that it has
nothing to say of voices.

The way back to sound goes on learning in `train_decoder.py`, while others learn the codes.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from moshi.models.loaders import get_mimi
from torch import Tensor, nn

from .codec_file import decoded, mimi_config, save
from .descent import Descent, Means, add_arguments, begin
from .kokoro import SAMPLE_RATE
from .pieces import SUB_FRAMES, UNKNOWN, Labels, Piece, batch_of, piece, read_clips
from .spectral import SpectralLoss, sound_losses, total
from .talks import FRAME
from .world import HELD_OUT_VOICES

WARMUP = 500  # steps until the first codebook is quantized nine times of ten
LOUD = 12.0  # speech is about 0.08 loud where there is some


def start(mimi: nn.Module) -> None:
    """First weights that keep the loudness of sound through all layers.

    With PyTorch's own a signal shrinks from layer to layer until the biases outweigh it, and all
    sounds had the same codes for hundreds of steps.
    """
    convolutions = [
        (name, module)
        for name, module in mimi.named_modules()
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
    ]
    last = [name for name, _ in convolutions if name.startswith("decoder.")][-1]
    for name, module in convolutions:
        fan_in = module.in_channels // module.groups * module.kernel_size[0]
        if isinstance(module, nn.ConvTranspose1d):
            fan_in //= module.stride[0]
        gain = 1.2 if name.startswith(("encoder.", "decoder.")) else 1.0  # for what ELU takes away
        gain *= LOUD if name.startswith("encoder.model.0.") else 1
        gain /= 2 * LOUD if name == last else 1
        nn.init.normal_(module.weight, std=gain / max(fan_in, 1) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Autoencoder(nn.Module):
    """Mimi and what teaches it.

    Args:
        phonemes, words: how many there are, with silence.
    """

    def __init__(self, phonemes: int, words: int) -> None:
        super().__init__()
        config = mimi_config(units=0)
        self.mimi = get_mimi(None, config)
        start(self.mimi)
        dim = config["seanet"]["dimension"]
        self.phonemes = nn.Linear(dim, SUB_FRAMES * phonemes)
        self.listener = nn.GRU(dim, dim, batch_first=True)
        self.words = nn.Linear(dim, words)
        self.spectral = SpectralLoss()

    def quantize_first(self, share: float) -> None:
        """How often the first codebook's output is a code: seldom while there is none to find."""
        self.mimi.quantizer.rvq_first.no_quantization_rate = 1 - share

    def forward(self, pcm: Tensor, phonemes: Tensor, words: Tensor) -> dict[str, Tensor]:
        mimi = self.mimi
        latents = mimi.downsample(mimi.encoder_transformer(mimi.encoder(pcm))[0])
        first = mimi.quantizer.rvq_first(latents, mimi.frame_rate)
        rest = mimi.quantizer.rvq_rest(latents, mimi.frame_rate)
        return (
            sound_losses(self.spectral, decoded(mimi, first.x.detach() + rest.x), pcm)
            | {"commit": first.penalty + 7 * rest.penalty}
            | self.understood(first.x.transpose(1, 2), phonemes, words)
        )

    def understood(self, first: Tensor, phonemes: Tensor, words: Tensor) -> dict[str, Tensor]:
        """Cross entropies of phonemes and words, and shares of wrong ones.

        Args:
            first: the first codebook's output `[B, FRAMES, dim]`.
            phonemes: `[B, FRAMES, SUB_FRAMES]`.
            words: `[B, FRAMES]`.
        """
        sounds = self.phonemes(first).unflatten(-1, (SUB_FRAMES, -1)).flatten(0, 2)
        said = self.words(self.listener(first)[0]).flatten(0, 1)
        losses = {}
        for name, logits, labels in ("phoneme", sounds, phonemes), ("word", said, words):
            labels = labels.flatten()
            losses[f"{name}s"] = F.cross_entropy(logits, labels, ignore_index=UNKNOWN)
            told = labels > 0  # silence is easy
            losses[f"wrong {name}s"] = (logits.argmax(-1) != labels)[told].float().mean()
        return losses


# Beside those of the sound.
WEIGHTS = {"commit": 0.02, "phonemes": 1.0, "words": 0.3}


@torch.no_grad()
def unheard(model: Autoencoder, bank: Path, labels: Labels, clips: int = 48) -> dict[str, Tensor]:
    """Losses on sentences of voices that are kept for testing."""
    pieces, known = [], (len(labels.phonemes.ids), len(labels.words.ids))
    paths = sorted(path for voice in HELD_OUT_VOICES for path in (bank / voice).glob("*.flac"))
    for path in random.Random(0).sample(paths, min(clips, len(paths))):
        made = Piece()
        made.put(labels.clip(path), 2 * FRAME, 1.0)
        pieces.append(made)
    if not pieces:
        return {}
    assert known == (len(labels.phonemes.ids), len(labels.words.ids)), "sounds not in training"
    model.eval()
    losses = model(*batch_of(pieces))
    model.train()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("out", type=Path)
    add_arguments(parser, steps=4000, rate=1e-3, threads=2)
    args = parser.parse_args()
    rng, labels = begin(args), Labels()
    own, users = read_clips(args.bank, labels, args.seed)
    seconds = sum(len(clip.pcm) for clip in own + users) / SAMPLE_RATE
    sounds, words = 1 + len(labels.phonemes.ids), 1 + len(labels.words.ids)
    print(f"{len(own)} own, {len(users)} of users, {seconds:.0f} s, {sounds} sounds, {words} words")
    model = Autoencoder(sounds, words).train()
    print(f"{sum(p.numel() for p in model.mimi.parameters()) / 1e6:.2f} M parameters", flush=True)
    descent = Descent(model.parameters(), args.rate, args.steps)
    for step in range(1, args.steps + 1):
        pcm, *said = batch_of([piece(own, users, rng, args.own) for _ in range(args.batch)])
        model.quantize_first(min(0.9, step / WARMUP))
        losses = model(pcm, *said)
        loss = total(losses) + sum(weight * losses[name] for name, weight in WEIGHTS.items())
        if descent.update(loss, losses):
            save(model.mimi, args.out, units=0)
            means = Means()
            means.add(unheard(model, args.bank, labels))
            print("  unheard:", means.line(), flush=True)


if __name__ == "__main__":
    main()
