"""Whitening of features by the samples of their own block (paper eq. 8-9).

With the ``n`` rollouts of a block as rows of ``X`` (``n x D``) and ``X = U S V^T``, the pseudo-inverse square root of their
second moment ``X^T X`` is ``V S^-1 V^T``. It maps the rollouts to ``U V^T``: orthonormal rows as long as they are
independent, equal rows for duplicates, zero for zero.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

WHITENINGS = ("feature_space", "sample_space", "none")
Whitening = Literal["feature_space", "sample_space", "none"]


class Whitened(NamedTuple):
    """Features after whitening.

    Attributes:
        rollout: ``[..., n, D]``.
        target: ``[..., n, D]``, or ``[..., 1, D]`` where it is the same for all samples.
        negative: ``[..., n]`` bool; where ``sample_space`` multiplied the target by a negative number.
    """

    rollout: Tensor
    target: Tensor
    negative: Tensor


def whiten(rollout: Tensor, target: Tensor, whitening: Whitening, tolerance: float) -> Whitened:
    """Whiten the features of blocks.

    Args:
        rollout: ``[..., n, D]``, finite, float64 (a pseudo-inverse of near-duplicates needs the digits).
        target: ``[..., D]``, likewise.
        whitening: ``"feature_space"`` multiplies both by ``(X^T X)^(-1/2)`` (paper eq. 8). ``"sample_space"`` multiplies
            by ``(X X^T)^(-1/2)`` from the left, as the authors' code does: the same for the rollouts, but the target, as
            ``n`` equal rows, is only scaled per sample, possibly by a negative number. ``"none"`` leaves both.
        tolerance: singular values below this share of the largest count as zero.
    """
    negative = torch.zeros(rollout.shape[:-1], dtype=torch.bool, device=rollout.device)
    if whitening == "none":
        return Whitened(rollout, target[..., None, :], negative)
    X, y = rollout, target
    # n is small and D is not: the n x n Gram matrix has the same U and, in float64, S to within 1e-8 of the largest.
    eigenvalues, U = torch.linalg.eigh(X @ X.transpose(-1, -2))
    S = eigenvalues.clamp(min=0).sqrt()
    kept = S > tolerance * S[..., -1:]
    inverse = torch.where(kept, 1 / S, 0.0)
    left = (U * inverse[..., None, :]) @ U.transpose(-1, -2)  # (X X^T)^(-1/2), [..., n, n]
    if whitening == "sample_space":
        scale = left.sum(dim=-1)
        negative, whitened_target = scale < 0, scale[..., None] * y[..., None, :]
    else:
        V = X.transpose(-1, -2) @ (U * inverse[..., None, :])  # [..., D, n]
        whitened_target = (V @ (inverse[..., None] * (V.transpose(-1, -2) @ y[..., None]))).transpose(-1, -2)
    return Whitened(left @ X, whitened_target, negative)
