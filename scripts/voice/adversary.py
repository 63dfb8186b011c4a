"""An adversary for the codec's decoder: it learns to tell speech from what the decoder makes.

Spectral losses alone are least where a decoder gives the mean of all that may have been said: harmonics
blur, and noise becomes tones. An adversary sees that at once (multi-scale STFT discriminators: Défossez
et al. 2022, arXiv 2210.13438, section 3.4; Mimi: arXiv 2410.00037, section 3.3). Here it is small, so
that two CPU cores can bear it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (2048, 1024, 512)  # FFT lengths; hops are a quarter
CHANNELS = 16
DILATIONS = (1, 2, 4)  # in time, of the layers that halve the frequencies
SLOPE = 0.2
BETAS = 0.5, 0.9  # of both optimizers while two learn against each other
LOUD = 12.0  # speech is about 0.08 loud: from spectra so faint a critic learns slowly


class Critic(nn.Module):
    """One scale: convolutions over the complex spectrum.

    Args:
        fft: length.

    Shape:
        - Input: `[B, N]`.
        - Output: logits `[B, 1, frames, bins]`, and what each layer before them gave.
    """

    def __init__(self, fft: int) -> None:
        super().__init__()
        self.fft = fft
        self.register_buffer("window", torch.hann_window(fft))
        wide = [nn.Conv2d(2, CHANNELS, (3, 9), padding=(1, 4))]
        for dilation in DILATIONS:
            wide.append(
                nn.Conv2d(CHANNELS, CHANNELS, (3, 9), (1, 2), (dilation, 4), dilation=(dilation, 1))
            )
        wide.append(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        self.layers = nn.ModuleList(nn.utils.parametrizations.weight_norm(c) for c in wide)
        self.last = nn.utils.parametrizations.weight_norm(nn.Conv2d(CHANNELS, 1, 3, padding=1))

    def forward(self, pcm: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = torch.stft(
            LOUD * pcm,
            self.fft,
            self.fft // 4,
            window=self.window,
            normalized=True,
            return_complex=True,
        )
        xs, features = torch.view_as_real(spectrum).permute(0, 3, 2, 1), []
        for layer in self.layers:
            xs = F.leaky_relu(layer(xs), SLOPE)
            features.append(xs)
        return self.last(xs), features


class Adversary:
    """Critics at several scales, and how they learn.

    Args:
        rate: of learning.
    """

    def __init__(self, rate: float) -> None:
        self.critics = nn.ModuleList(Critic(fft) for fft in SCALES)
        self._optimizer = torch.optim.AdamW(self.critics.parameters(), rate, BETAS)

    def learn(self, real: Tensor, made: Tensor) -> Tensor:
        """One update; the loss before it, a hinge, mean over scales.

        Args:
            real, made: `[B, N]`; no gradient reaches `made`.
        """
        losses = [
            F.relu(1 - critic(real)[0]).mean() + F.relu(1 + critic(made.detach())[0]).mean()
            for critic in self.critics
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
        for critic in self.critics:
            with torch.no_grad():
                wanted = critic(real)[1]
            logits, features = critic(made)
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
