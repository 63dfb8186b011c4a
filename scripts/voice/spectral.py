"""How far a sound is from another, for the ear: log-mel spectra at four resolutions."""

import numpy as np
import torch
from torch import Tensor, nn

from .kokoro import SAMPLE_RATE

SCALES = {256: 32, 512: 48, 1024: 80, 2048: 100}  # FFT length -> mel bands


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


def sound_losses(spectral: SpectralLoss, made: Tensor, pcm: Tensor) -> dict[str, Tensor]:
    """How far what came back from the codes, `[B, 1, N]`, is from what went in."""
    return {"spectrum": spectral(made[:, 0], pcm[:, 0]), "wave": (made - pcm).abs().mean()}


def total(losses: dict[str, Tensor]) -> Tensor:
    """The loss of the sound: the waveform counts a little."""
    return losses["spectrum"] + 4 * losses["wave"]
