"""What both codec backends refuse: frames of a wrong shape, and the state of another codec."""

import numpy as np

from .errors import UserError


def check_pcm(codec, pcm: np.ndarray) -> None:
    """Raise `ValueError` unless this is one frame of samples, `[frame_size]`."""
    if pcm.shape != (codec.frame_size,):
        raise ValueError(
            f"[{codec.name}] encode takes one frame [{codec.frame_size}], got {list(pcm.shape)}"
        )


def check_codes(codec, codes: np.ndarray, bins: int) -> None:
    """Raise `ValueError` unless this is one frame of codes: `[K']`, `1 <= K' <= K`, in range."""
    if codes.ndim != 1 or not 1 <= len(codes) <= codec.num_codebooks:
        raise ValueError(
            f"[{codec.name}] decode takes 1 to {codec.num_codebooks} codes, got {list(codes.shape)}"
        )
    if codes.min() < 0 or codes.max() >= bins:
        raise ValueError(
            f"[{codec.name}] decode takes codes in 0..{bins - 1}, got {codes.tolist()}"
        )


def check_state(meta: dict[str, str], *, backend: str, weights: str, codebooks: int) -> None:
    """Raise `UserError` where a saved state belongs to another codec."""
    expected = {"backend": backend, "weights": weights, "num_codebooks": str(codebooks)}
    for key, own in expected.items():
        if meta.get(key) != own:
            raise UserError(
                f"codec state: it was saved with {key} {meta.get(key)}, this codec has {own}; "
                "open the codec it was saved with"
            )
