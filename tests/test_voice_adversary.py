"""The adversary of the codec's decoder. PyTorch is no dependency: these are skipped where it is not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

torch = pytest.importorskip("torch", reason="PyTorch is needed to train the codec only")
from voice.adversary import Adversary, balanced  # noqa: E402
from voice.spectral import SpectralLoss  # noqa: E402


@pytest.fixture
def adversary():
    torch.manual_seed(0)
    return Adversary(SpectralLoss(), rate=5e-3)


def noise(seed, loud=0.1):
    return loud * torch.randn(2, 6000, generator=torch.Generator().manual_seed(seed))


def test_each_loss_has_its_share_of_the_pull_whatever_its_scale():
    made = torch.randn(2, 1, 50, requires_grad=True)
    one, other = (made * torch.randn(50)).sum(), made.square().sum()
    alone = balanced({"one": one}, {"one": 3.0, "absent": 9.0}, made)
    gradient = torch.autograd.grad(one, made, retain_graph=True)[0]
    torch.testing.assert_close(alone, gradient / gradient.norm())
    shares = {"one": 3.0, "other": 1.0}
    both = balanced({"one": one, "other": other}, shares, made)
    torch.testing.assert_close(both, balanced({"one": 1e4 * one, "other": other}, shares, made))
    rest = made.detach() / made.detach().norm()
    torch.testing.assert_close(both, 0.75 * alone + 0.25 * rest)


def test_the_adversary_learns_without_moving_the_decoder_and_tells_tones_from_noise(adversary):
    tone = (0.1 * torch.sin(torch.arange(6000) * 0.2)).repeat(2, 1).requires_grad_()
    losses = [adversary.learn(noise(step), tone) for step in range(15)]
    assert tone.grad is None
    assert losses[-1] < 0.5 * losses[0]
    assert adversary.fooled(noise(99), noise(98))["passing"] < 0.5
    assert adversary.fooled(noise(99), tone)["passing"] > 1.5


def test_sound_that_is_the_same_is_alike_and_gradients_reach_what_was_made(adversary):
    same = adversary.fooled(noise(0), noise(0))
    assert same["alike"] == 0
    made = noise(1).requires_grad_()
    losses = adversary.fooled(noise(0), made)
    assert losses["alike"] > 0
    for loss in losses.values():
        assert torch.autograd.grad(loss, made, retain_graph=True)[0].norm() > 0
