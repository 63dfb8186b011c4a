"""Train the small Mimi: an autoencoder on the bank, in PyTorch with Kyutai's own modules.

    python -m voice.train_codec BANK OUT.safetensors [--steps 2000]                      (in scripts/)
    python -m voice.train_codec BANK OUT.safetensors --decoder-of CODEC.safetensors

Kyutai publishes Mimi's modules with the training side of its quantizer (residual VQ, straight-through
gradients, codebooks as moving averages, unused codes put back to use): package `moshi`. The file that
comes out is in Kyutai's layout, and `moshi_ttt_mlx` opens it as any other.

What is learned: log-mel spectra at four resolutions, the waveform a little, and, as Mimi's first
codebook is taught words by WavLM, here by the phonemes of the text: a linear head on the first
codebook's output alone, three phonemes a frame at most, aligned by CTC (Graves et al. 2006).

With `--decoder-of` the codes stay as they are, so whoever has learned them need not learn again, and
only the way back to sound goes on learning: mostly the model's own voice.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from moshi.models.loaders import get_mimi
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .kokoro import SAMPLE_RATE, phonemes
from .world import HELD_OUT_VOICES, MOSHI_VOICE

FRAME = 1920
FRAMES = 24  # of a piece of sound to learn from: 1.92 s
SUB_FRAMES = 3  # phonemes a frame at most
LOUD = 12.0  # speech is about 0.08 loud where there is some
SCALES = {256: 32, 512: 48, 1024: 80, 2048: 100}  # FFT length -> mel bands


def mimi_config(codebooks: int = 8) -> dict:
    """Arguments of Kyutai's modules; `model.py` has the same shape for `config.json`."""
    dim = 128
    return {
        "channels": 1,
        "sample_rate": SAMPLE_RATE,
        "frame_rate": 12.5,
        "seanet": {
            "channels": 1,
            "dimension": dim,
            "causal": True,
            "n_filters": 16,
            "n_residual_layers": 1,
            "activation": "ELU",
            "compress": 2,
            "dilation_base": 2,
            "disable_norm_outer_blocks": 0,
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 3,
            "norm": "none",
            "pad_mode": "constant",
            "ratios": [8, 6, 5, 4],
            "true_skip": True,
        },
        "quantizer": {
            "dimension": 64,
            "n_q": codebooks,
            "bins": 256,
            "decay": 0.97,
            # As Mimi: half of the time nothing is quantized.
            "no_quantization_rate": 0.5,
            "input_dimension": dim,
            "output_dimension": dim,
        },
        "transformer": {
            "d_model": dim,
            "num_heads": 4,
            "num_layers": 3,
            "causal": True,
            "layer_scale": 0.1,
            "context": 250,
            "conv_layout": True,
            "max_period": 10000,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": 4 * dim,
            "input_dimension": dim,
            "output_dimensions": [dim],
        },
    }


# -- what it learns from -----------------------------------------------------------------------------


@dataclass
class Clip:
    """A piece of speech, its phonemes as numbers; None where the words are not known."""

    pcm: np.ndarray
    labels: list[int] | None


class Alphabet:
    """Phonemes as numbers; 0 is CTC's blank."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        said = [c for c in phonemes(text) if c.isalpha() or c in "ʤʧ"]
        return [self.ids.setdefault(c, 1 + len(self.ids)) for c in said]


def read_clips(bank: Path, alphabet: Alphabet, seed: int) -> tuple[list[Clip], list[Clip]]:
    """The model's own voice, and the users': each of them at two more speeds, and so pitches."""
    own, users, rng = [], [], random.Random(seed)
    for path in sorted(bank.glob("*/*.flac")):
        voice = path.parent.name
        if voice in HELD_OUT_VOICES:
            continue
        pcm = soundfile.read(path, dtype="float32")[0]
        known = not voice.startswith("real-")
        labels = alphabet(path.stem.replace("-", " ")) if known else None
        if voice == MOSHI_VOICE:
            own.append(Clip(pcm, labels))
            continue
        users.append(Clip(pcm, labels))
        for _ in range(2):
            rate = SAMPLE_RATE * rng.uniform(0.85, 1.15)
            users.append(Clip(soxr.resample(pcm, SAMPLE_RATE, rate, quality="HQ"), labels))
    return own, users


def piece(
    own: list[Clip], users: list[Clip], rng: random.Random, own_share: float
) -> tuple[np.ndarray, list[int] | None]:
    """Sound `[FRAMES * FRAME]` with a clip or more in it, somewhere, and the phonemes if known."""
    pcm, labels = np.zeros(FRAMES * FRAME, np.float32), []
    mine = rng.random() < own_share
    clips, place = own if mine else users, rng.randrange(FRAME * 8)
    # The model's own words begin on a frame, so that the same words have the same codes.
    place = place // FRAME * FRAME if mine else place // 4
    gain = 1.0 if mine else 10 ** rng.uniform(-0.5, 0.25)
    while True:
        clip = rng.choice(clips)
        if place + len(clip.pcm) > len(pcm):
            break
        pcm[place : place + len(clip.pcm)] = gain * clip.pcm
        labels = None if None in (labels, clip.labels) else labels + clip.labels
        place += len(clip.pcm) + rng.randrange(FRAME * 4)
        place = -(-place // FRAME) * FRAME if mine else place
    if not mine and rng.random() < 0.5:
        noise = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(len(pcm))
        pcm += (10 ** rng.uniform(-4, -2.5) * noise).astype(np.float32)
    return np.clip(pcm, -1, 1), labels


# -- what it learns -----------------------------------------------------------------------------------


def mel_filters(fft: int, bands: int) -> Tensor:
    """Triangles on the mel scale, `[fft // 2 + 1, bands]`."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    freqs = np.linspace(0, SAMPLE_RATE / 2, fft // 2 + 1)[:, None]
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    width = SAMPLE_RATE / fft  # a triangle narrower than a bin would be empty
    up = (freqs - low) / np.maximum(mid - low, width)
    down = (high - freqs) / np.maximum(high - mid, width)
    return torch.tensor(np.maximum(0, np.minimum(up, down)), dtype=torch.float32)


class SpectralLoss(nn.Module):
    """Distance of log-mel spectra, mean over four resolutions."""

    def __init__(self) -> None:
        super().__init__()
        for fft, bands in SCALES.items():
            self.register_buffer(f"filters{fft}", mel_filters(fft, bands))
            self.register_buffer(f"window{fft}", torch.hann_window(fft))

    def log_mel(self, pcm: Tensor, fft: int) -> Tensor:
        window = getattr(self, f"window{fft}")
        spectrum = torch.stft(pcm, fft, fft // 4, window=window, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = power.transpose(1, 2) @ getattr(self, f"filters{fft}")
        return torch.log(mel + 1e-5 * fft)

    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        losses = []
        for fft in SCALES:
            distance = self.log_mel(ours, fft) - self.log_mel(theirs, fft)
            losses.append(distance.abs().mean() + 0.3 * distance.square().mean())
        return sum(losses) / len(SCALES)


def start(mimi: nn.Module) -> None:
    """First weights that keep the loudness of sound through all layers.

    With PyTorch's own a signal shrinks from layer to layer until the biases outweigh it, and all
    sounds had the same codes for hundreds of steps.
    """
    for name, module in mimi.named_modules():
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        fan_in = module.in_channels // module.groups * module.kernel_size[0]
        if isinstance(module, nn.ConvTranspose1d):
            fan_in //= module.stride[0]
        gain = 1.2 if name.startswith(("encoder.", "decoder.")) else 1.0  # for what ELU takes away
        gain *= LOUD if name.startswith("encoder.model.0.") else 1
        gain /= 2 * LOUD if name.startswith("decoder.model.14.") else 1
        nn.init.normal_(module.weight, std=gain / max(fan_in, 1) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Autoencoder(nn.Module):
    """Mimi and what teaches it."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        config = mimi_config()
        self.mimi = get_mimi(None, config)
        start(self.mimi)
        self.head = nn.Linear(config["seanet"]["dimension"], SUB_FRAMES * symbols)
        self.spectral = SpectralLoss()

    def forward(self, pcm: Tensor, labels: list[list[int] | None]) -> dict[str, Tensor]:
        mimi = self.mimi
        latents = mimi.downsample(mimi.encoder_transformer(mimi.encoder(pcm))[0])
        words = mimi.quantizer.rvq_first(latents, mimi.frame_rate)
        sound = mimi.quantizer.rvq_rest(latents, mimi.frame_rate)
        return self.heard(words.x + sound.x, pcm) | {
            "commit": words.penalty + 7 * sound.penalty,
            "phonemes": self.ctc(words.x, labels),
        }

    def heard(self, quantized: Tensor, pcm: Tensor) -> dict[str, Tensor]:
        """How far what comes back from the codes is from what went in."""
        mimi = self.mimi
        out = mimi.decoder(mimi.decoder_transformer(mimi.upsample(quantized))[0])
        return {
            "spectrum": self.spectral(out[:, 0], pcm[:, 0]),
            "wave": (out - pcm).abs().mean(),
        }

    def decoder_only(self, pcm: Tensor) -> dict[str, Tensor]:
        """The same with codes that stay as they are."""
        with torch.no_grad():
            quantized = self.mimi.decode_latent(self.mimi.encode(pcm))
        return self.heard(quantized, pcm)

    def ctc(self, words: Tensor, labels: list[list[int] | None]) -> Tensor:
        known = [i for i, row in enumerate(labels) if row is not None]
        words, labels = words[known], [labels[i] for i in known]
        batch, _, frames = words.shape
        logits = self.head(words.transpose(1, 2)).reshape(batch, frames * SUB_FRAMES, -1)
        lengths = torch.tensor([len(row) for row in labels])
        steps = torch.full((batch,), frames * SUB_FRAMES)
        flat = torch.tensor([i for row in labels for i in row])
        log_p = F.log_softmax(logits.transpose(0, 1).float(), -1)
        return F.ctc_loss(log_p, flat, steps, lengths, zero_infinity=True)


WEIGHTS = {"spectrum": 1.0, "wave": 4.0, "commit": 0.02, "phonemes": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decoder-of", type=Path, help="a codec whose codes are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    rng, alphabet = random.Random(args.seed), Alphabet()
    own, users = read_clips(args.bank, alphabet, args.seed)
    seconds = sum(len(clip.pcm) for clip in own + users) / SAMPLE_RATE
    print(f"{len(own)} own, {len(users)} of users, {seconds:.0f} s, {len(alphabet.ids)} phonemes")
    model, own_share = Autoencoder(1 + len(alphabet.ids)).train(), 0.4
    if args.decoder_of:
        load(model.mimi, args.decoder_of)
        model.eval()
        own_share = 0.8
    print(f"{sum(p.numel() for p in model.mimi.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, (0.8, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.rate, total_steps=args.steps, pct_start=0.05, final_div_factor=10
    )
    start, sums = time.time(), {}
    for step in range(1, args.steps + 1):
        pieces = [piece(own, users, rng, own_share) for _ in range(args.batch)]
        pcm = torch.from_numpy(np.stack([p for p, _ in pieces]))[:, None]
        labels = [labels for _, labels in pieces]
        losses = model.decoder_only(pcm) if args.decoder_of else model(pcm, labels)
        loss = sum(WEIGHTS[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % 50 == 0:
            means = " ".join(f"{name} {value / 50:.4f}" for name, value in sums.items())
            print(f"{step} {means} ({time.time() - start:.0f} s)", flush=True)
            sums = {}
        if step % 200 == 0 or step == args.steps:
            save(model.mimi, args.out)


# The published file is older than the modules: one projection for all codebooks.
_OLDER = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}


def save(mimi: nn.Module, path: Path) -> None:
    """In Kyutai's layout; half precision, which is more than the ear needs."""
    tensors = {}
    for name, tensor in mimi.state_dict().items():
        for new, old in _OLDER.items():
            name = name.replace(new, old)
        tensors[name] = tensor.contiguous().half()
    part = path.with_suffix(".part")
    save_file(tensors, part, {"config": json.dumps(mimi_config())})
    part.rename(path)


def load(mimi: nn.Module, path: Path) -> None:
    """The inverse of `save`."""
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, old in _OLDER.items():
            name = name.replace(f"self_attn.{old}", f"self_attn.{new}")
        tensors[name] = tensor.float()
    mimi.load_state_dict(tensors)


if __name__ == "__main__":
    main()
