"""An adversary for the codec's decoder: it learns to tell speech from what the decoder makes.

Spectral losses alone are least where a decoder gives the mean of all that may have been said: harmonics
blur, and noise becomes tones. An adversary sees that at once (discriminators at several scales: Défossez
et al. 2022, arXiv 2210.13438, section 3.4; Mimi: arXiv 2410.00037, section 3.3). Here it sees log-mel
spectra, without phases: a decoder as small as this one cannot follow them, and what it did instead
was understood by fewer (docs/voice.md).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spectral import SpectralLoss

SCALES = (2048, 1024, 512)  # FFT lengths, of those that the spectral loss has
CHANNELS = 32
DILATIONS = (1, 2, 4)  # in time, of the layers that halve the bands
SLOPE = 0.2
BETAS = 0.5, 0.9  # of both optimizers while two learn against each other
CENTRE, SPREAD = -3.0, 3.0  # of log-mel spectra, roughly


class Critic(nn.Module):
    """One scale: convolutions over time and bands of a log-mel spectrum.

    Shape:
        - Input: `[B, frames, bands]`.
        - Output: logits `[B, 1, frames, fewer bands]`, and what each layer before them gave.
    """

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, CHANNELS, (3, 7), padding=(1, 3))]
        for step in DILATIONS:
            shape = {"stride": (1, 2), "padding": (step, 3), "dilation": (step, 1)}
            layers.append(nn.Conv2d(CHANNELS, CHANNELS, (3, 7), **shape))
        layers.append(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        self.layers = nn.ModuleList(nn.utils.parametrizations.weight_norm(c) for c in layers)
        self.last = nn.utils.parametrizations.weight_norm(nn.Conv2d(CHANNELS, 1, 3, padding=1))

    def forward(self, spectrum: Tensor) -> tuple[Tensor, list[Tensor]]:
        xs, features = (spectrum[:, None] - CENTRE) / SPREAD, []
        for layer in self.layers:
            xs = F.leaky_relu(layer(xs), SLOPE)
            features.append(xs)
        return self.last(xs), features


class Adversary:
    """Critics at several scales, and how they learn.

    Args:
        spectral: its spectra are looked at.
        rate: of learning.
    """

    def __init__(self, spectral: SpectralLoss, rate: float) -> None:
        self._spectral, self.critics = spectral, nn.ModuleList(Critic() for _ in SCALES)
        self._optimizer = torch.optim.AdamW(self.critics.parameters(), rate, BETAS)

    def _looks(self, real: Tensor, made: Tensor) -> Iterator[tuple[Critic, Tensor, Tensor]]:
        for fft, critic in zip(SCALES, self.critics, strict=True):
            yield critic, self._spectral.log_mel(real, fft), self._spectral.log_mel(made, fft)

    def learn(self, real: Tensor, made: Tensor) -> Tensor:
        """One update; the loss before it, a hinge, mean over scales.

        Args:
            real, made: `[B, N]`; no gradient reaches `made`.
        """
        losses = [
            F.relu(1 - critic(theirs)[0]).mean() + F.relu(1 + critic(ours)[0]).mean()
            for critic, theirs, ours in self._looks(real, made.detach())
        ]
        loss = sum(losses) / len(losses)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.critics.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()

    def fooled(self, real: Tensor, made: Tensor) -> dict[str, Tensor]:
        """What the decoder learns from: to pass for real, and to look so in every layer.

        Args:
            real, made: `[B, N]`, the same sentences.
        """
        passing, alike = [], []
        for critic, theirs, ours in self._looks(real, made):
            with torch.no_grad():
                wanted = critic(theirs)[1]
            logits, features = critic(ours)
            passing.append(F.relu(1 - logits).mean())
            alike += [
                F.l1_loss(ours, theirs) / theirs.abs().mean()
                for ours, theirs in zip(features, wanted, strict=True)
            ]
        return {"passing": sum(passing) / len(passing), "alike": sum(alike) / len(alike)}


def balanced(losses: dict[str, Tensor], shares: dict[str, float], made: Tensor) -> Tensor:
    """The gradient by the sound that was made, of losses that each have their share of it.

    Their own scales do not matter then (Défossez et al., section 3.4, "balancer").

    Args:
        losses: scalars.
        shares: of each loss; those that there are not are left out.
        made: the sound, `[B, 1, N]`.

    Returns:
        As `made`, of norm about 1.
    """
    shares = {name: share for name, share in shares.items() if name in losses}
    pull = torch.zeros_like(made)
    for name, share in shares.items():
        gradient = torch.autograd.grad(losses[name], made, retain_graph=True)[0]
        pull += share / sum(shares.values()) * gradient / gradient.norm().clamp_min(1e-12)
    return pull
