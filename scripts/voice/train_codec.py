"""Train the small Mimi: an autoencoder on the bank, in PyTorch with Kyutai's own modules.

    python -m voice.train_codec BANK OUT.safetensors [--steps 4000]                      (in scripts/)
    python -m voice.train_codec BANK OUT.safetensors --decoder-of CODEC.safetensors

Kyutai publishes Mimi's modules with the training side of its quantizer (residual VQ, straight-through
gradients, codebooks as moving averages, unused codes put back to use): package `moshi`. The file that
comes out is in Kyutai's layout, and `moshi_ttt_mlx` opens it as any other.

What is learned: log-mel spectra at four resolutions, the waveform a little, and, as Mimi's first
codebook is taught words by WavLM, here by the text-to-speech model, which knows when it says what: three
phonemes a frame from a linear layer on the first codebook's output alone, and each word from a recurrent
one, a frame after its end. The way back to sound sends the first codebook no gradient, so that it has
nothing to say of voices.

With `--decoder-of` the codes stay as they are, so whoever has learned them need not learn again, and
only the way back to sound goes on learning. It gets residual units then, which make a voice's harmonics
and take half of an update; in the encoder, whose layers Mimi shares the shape of, they do nothing.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from moshi.models.loaders import get_mimi
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .clips import worn
from .kokoro import SAMPLE_RATE
from .world import HELD_OUT_VOICES, MOSHI_VOICE

FRAME = 1920
FRAMES = 32  # of a piece of sound to learn from: 2.56 s
SUB_FRAMES = 3  # phonemes a frame, the last of them 53 ms before the frame's end
WARMUP = 500  # steps until the first codebook is quantized nine times of ten
UNKNOWN = -100  # what the losses leave out
STRESS = "ˈˌ"  # marks in front of a vowel: its own time
LOUD = 12.0  # speech is about 0.08 loud where there is some
SCALES = {256: 32, 512: 48, 1024: 80, 2048: 100}  # FFT length -> mel bands


def mimi_config(units: int) -> dict:
    """Arguments of Kyutai's modules; `model.py` has the same shape for `config.json`.

    Args:
        units: residual ones of each layer of the encoder and the decoder.
    """
    dim = 192
    return {
        "channels": 1,
        "sample_rate": SAMPLE_RATE,
        "frame_rate": 12.5,
        "seanet": {
            "channels": 1,
            "dimension": dim,
            "causal": True,
            "n_filters": 16,
            "n_residual_layers": units,
            "activation": "ELU",
            "compress": 2,
            "dilation_base": 2,
            "disable_norm_outer_blocks": 0,
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 3,
            "norm": "none",
            "pad_mode": "constant",
            "ratios": [4, 5, 6, 8],
            "true_skip": True,
        },
        "quantizer": {
            "dimension": 64,
            "n_q": 8,
            "bins": 256,
            "decay": 0.98,
            # As Mimi: half of the time nothing is quantized.
            "no_quantization_rate": 0.5,
            "input_dimension": dim,
            "output_dimension": dim,
        },
        "transformer": {
            "d_model": dim,
            "num_heads": 6,
            "num_layers": 4,
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


class Vocabulary:
    """Symbols as numbers, in the order in which they come; 0 is silence."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, symbol: str) -> int:
        return self.ids.setdefault(symbol, 1 + len(self.ids))


@dataclass
class Clip:
    """A piece of speech.

    Attributes:
        pcm: float32 `[N]`.
        phonemes: numbers and the samples at which they end; None where nobody knows.
        words: the same of words.
    """

    pcm: np.ndarray
    phonemes: tuple[np.ndarray, np.ndarray] | None = None
    words: tuple[np.ndarray, np.ndarray] | None = None

    def at_rate(self, rate: float) -> "Clip":
        """Faster and higher, or slower and lower."""
        pcm = soxr.resample(self.pcm, SAMPLE_RATE * rate, SAMPLE_RATE, quality="HQ")
        spans = [
            None if part is None else (part[0], part[1] / rate)
            for part in (self.phonemes, self.words)
        ]
        return Clip(pcm, *spans)


class Labels:
    """Reads what the bank knows of its clips."""

    def __init__(self) -> None:
        self.phonemes, self.words = Vocabulary(), Vocabulary()

    def clip(self, path: Path) -> Clip:
        pcm = soundfile.read(path, dtype="float32")[0]
        notes = path.with_suffix(".json")
        if not notes.exists():
            return Clip(pcm)
        about = json.loads(notes.read_text())
        said = [(s, end) for s, _, end in about["symbols"] if s not in STRESS]
        names = re.findall(r"\w+", about["text"].lower())
        ends = self._word_ends(said)
        numbers = np.array([self.phonemes(s if s.isalpha() else " ") for s, _ in said])
        phonemes = numbers, np.array([end for _, end in said])
        # espeak-ng writes some words as one.
        if len(ends) != len(names):
            return Clip(pcm, phonemes)
        return Clip(pcm, phonemes, (np.array([self.words(n) for n in names]), np.array(ends)))

    @staticmethod
    def _word_ends(said: list[tuple[str, int]]) -> list[int]:
        """Samples at which words end: the last letter before anything else."""
        letters = pairwise([*(s.isalpha() for s, _ in said), False])
        return [
            end for (_, end), (now, then) in zip(said, letters, strict=True) if now and not then
        ]


def read_clips(bank: Path, labels: Labels, seed: int) -> tuple[list[Clip], list[Clip]]:
    """The model's own voice, and the users': each of them at two more speeds, and so pitches."""
    own, users, rng = [], [], random.Random(seed)
    for path in sorted(bank.glob("*/*.flac")):
        if path.parent.name in HELD_OUT_VOICES:
            continue
        clip = labels.clip(path)
        if path.parent.name == MOSHI_VOICE:
            own.append(clip)
            continue
        users += [clip, *(clip.at_rate(rng.uniform(0.82, 1.2)) for _ in range(2))]
    return own, users


class Piece:
    """Sound `[FRAMES * FRAME]` with a clip or more in it, and what is said in each frame.

    Attributes:
        pcm: float32.
        phonemes: int64 `[FRAMES, SUB_FRAMES]`.
        words: int64 `[FRAMES]`; a word stands in the frame after the one that it ends in.
    """

    def __init__(self) -> None:
        self.pcm = np.zeros(FRAMES * FRAME, np.float32)
        self._grid = np.zeros(1 + FRAMES * SUB_FRAMES, np.int64)
        self.words = np.full(FRAMES, UNKNOWN)

    @property
    def phonemes(self) -> np.ndarray:
        return self._grid[:-1].reshape(FRAMES, SUB_FRAMES)

    def put(self, clip: Clip, place: int, gain: float) -> None:
        """Add a clip; what lies beyond the end is cut off."""
        end = min(place + len(clip.pcm), len(self.pcm))
        self.pcm[place:end] += gain * clip.pcm[: end - place]
        step = FRAME // SUB_FRAMES
        times = (np.arange(len(self._grid)) - 1) * step
        inside = (times >= place) & (times < place + len(clip.pcm))
        if clip.phonemes is None:
            self._grid[inside] = UNKNOWN
        else:
            numbers, ends = clip.phonemes
            where = np.searchsorted(ends, times[inside] - place, side="right")
            self._grid[inside] = np.append(numbers, 0)[where]
        if clip.words is not None:
            frames = ((clip.words[1] + place) // FRAME + 1).astype(int)
            fits = frames < FRAMES
            self.words[frames[fits]] = clip.words[0][fits]


def piece(own: list[Clip], users: list[Clip], rng: random.Random, own_share: float) -> Piece:
    """Clips of the model or of users at random, one after another."""
    made, mine = Piece(), rng.random() < own_share
    clips, place = own if mine else users, rng.randrange(FRAME * 6)
    # The model's own words begin on a frame, so that the same words have the same codes.
    place = place // FRAME * FRAME if mine else place
    gain = 1.0 if mine else 10 ** rng.uniform(-0.5, 0.25)
    while place < (FRAMES - 8) * FRAME:
        clip = rng.choice(clips)
        made.put(clip, place, gain)
        place += len(clip.pcm) + rng.randrange(FRAME * 4)
        place = -(-place // FRAME) * FRAME if mine else place
    if not mine:
        made.pcm = worn(made.pcm, rng)
    made.pcm = np.clip(made.pcm, -1, 1)
    return made


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
        units: see `mimi_config`.
    """

    def __init__(self, phonemes: int, words: int, units: int) -> None:
        super().__init__()
        config = mimi_config(units)
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
            self.heard(first.x.detach() + rest.x, pcm)
            | {"commit": first.penalty + 7 * rest.penalty}
            | self.understood(first.x.transpose(1, 2), phonemes, words)
        )

    def heard(self, quantized: Tensor, pcm: Tensor) -> dict[str, Tensor]:
        """How far what comes back from the codes is from what went in."""
        mimi = self.mimi
        out = mimi.decoder(mimi.decoder_transformer(mimi.upsample(quantized))[0])
        return {
            "spectrum": self.spectral(out[:, 0], pcm[:, 0]),
            "wave": (out - pcm).abs().mean(),
        }

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

    def decoder_only(self, pcm: Tensor) -> dict[str, Tensor]:
        """The same with codes that stay as they are."""
        with torch.no_grad():
            quantized = self.mimi.decode_latent(self.mimi.encode(pcm))
        return self.heard(quantized, pcm)


WEIGHTS = {"spectrum": 1.0, "wave": 4.0, "commit": 0.02, "phonemes": 1.0, "words": 0.3}


def batch_of(pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    pcm = torch.from_numpy(np.stack([p.pcm for p in pieces]))[:, None]
    phonemes = torch.from_numpy(np.stack([p.phonemes for p in pieces]))
    return pcm, phonemes, torch.from_numpy(np.stack([p.words for p in pieces]))


@torch.no_grad()
def unheard(model: Autoencoder, bank: Path, labels: Labels, clips: int = 48) -> dict[str, float]:
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
    return {name: value.item() for name, value in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decoder-of", type=Path, help="a codec whose codes are kept")
    parser.add_argument("--own", type=float, default=0.3, help="share of the model's own voice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    rng, labels = random.Random(args.seed), Labels()
    own, users = read_clips(args.bank, labels, args.seed)
    seconds = sum(len(clip.pcm) for clip in own + users) / SAMPLE_RATE
    sounds, words = 1 + len(labels.phonemes.ids), 1 + len(labels.words.ids)
    print(f"{len(own)} own, {len(users)} of users, {seconds:.0f} s, {sounds} sounds, {words} words")
    units = 1 if args.decoder_of else 0
    model = Autoencoder(sounds, words, units).train()
    if args.decoder_of:
        load(model.mimi, args.decoder_of)
        model.eval()
    print(f"{sum(p.numel() for p in model.mimi.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, (0.8, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.rate, total_steps=args.steps, pct_start=0.05, final_div_factor=10
    )
    begun, sums = time.time(), {}
    for step in range(1, args.steps + 1):
        pcm, *said = batch_of([piece(own, users, rng, args.own) for _ in range(args.batch)])
        model.quantize_first(min(0.9, step / WARMUP))
        losses = model.decoder_only(pcm) if args.decoder_of else model(pcm, *said)
        loss = sum(weight * losses[name] for name, weight in WEIGHTS.items() if name in losses)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % 50 == 0:
            means = {name: value / 50 for name, value in sums.items()}
            print(f"{step} {line(means)} ({time.time() - begun:.0f} s)", flush=True)
            sums = {}
        if step % 250 == 0 or step == args.steps:
            save(model.mimi, args.out, units)
            if not args.decoder_of:
                print(f"  unheard: {line(unheard(model, args.bank, labels))}", flush=True)


def line(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in losses.items())


# The published file is older than the modules: one projection for all codebooks.
_OLDER = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}


def save(mimi: nn.Module, path: Path, units: int) -> None:
    """In Kyutai's layout; half precision, which is more than the ear needs."""
    tensors = {}
    for name, tensor in mimi.state_dict().items():
        for new, old in _OLDER.items():
            name = name.replace(new, old)
        tensors[name] = tensor.contiguous().half()
    part = path.with_suffix(".part")
    save_file(tensors, part, {"config": json.dumps(mimi_config(units))})
    part.rename(path)


def load(mimi: nn.Module, path: Path) -> None:
    """The inverse of `save`; residual units that the file does not have add nothing at first."""
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, old in _OLDER.items():
            name = name.replace(f"self_attn.{old}", f"self_attn.{new}")
        tensors[name] = tensor.float()
    own = mimi.state_dict()
    if not any(".block." in name for name in tensors):
        places = _places(own)
        moved = dict(zip(_places(tensors), places, strict=True))
        tensors = {_moved(name, moved): tensor for name, tensor in tensors.items()}
        units = {name: tensor for name, tensor in own.items() if ".block." in name}
        last = {name: torch.zeros_like(t) for name, t in units.items() if ".block.3." in name}
        tensors |= units | last
    mimi.load_state_dict(tensors)


# Numbers of layers in a sequence, which residual units take part in: "encoder.model.3".
_PLACE = re.compile(r"(?:encoder|decoder)\.model\.(\d+)")


def _places(names: Iterable[str]) -> list[str]:
    """Places of all but residual units, in order."""
    found = {m[0]: int(m[1]) for n in names if ".block." not in n and (m := _PLACE.match(n))}
    return sorted(found, key=lambda place: (place.split(".")[0], found[place]))


def _moved(name: str, places: dict[str, str]) -> str:
    match = _PLACE.match(name)
    return places[match[0]] + name[match.end() :] if match else name


if __name__ == "__main__":
    main()
