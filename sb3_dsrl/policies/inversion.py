"""The noise whose decode comes nearest to a chunk.

Letters in shapes: ``B`` batch, ``T`` = pred_horizon, ``A`` action dim, ``R`` entries of a chunk that are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch as th

#: From noise (B, T, A) to chunks (B, T, A) in the network's units, not clipped.
Generate = Callable[[th.Tensor], th.Tensor]

#: Damping that Gauss-Newton starts with, and the least; in units of the squared Jacobian, whose entries are about 1.
DAMPING, LEAST_DAMPING = 1e-3, 1e-7


@dataclass(frozen=True)
class Inversion:
    """
    Noises that were found for chunks.

    :param noise: (B, T, A)
    :param chunk: what :meth:`FlowPolicy.decode <sb3_dsrl.FlowPolicy.decode>` makes of them, (B, T, A)
    :param error: root mean square difference between the chunk that was asked for and the one that was found, in the units of
        actions, (B,)
    :param norm: root mean square entry of the noise, ``||w|| / sqrt(T * A)``, (B,); that of the prior is about 1
    """

    noise: th.Tensor
    chunk: th.Tensor
    error: th.Tensor
    norm: th.Tensor


def root_mean_square(x: th.Tensor) -> th.Tensor:
    """
    :param x: (B, ...)
    :return: over all but the first dimension, (B,)
    """
    return x.flatten(1).square().mean(dim=1).sqrt()


@th.no_grad()
def gauss_newton(
    generate: Generate,
    undo: Generate,
    wanted: th.Tensor,
    at_bound: th.Tensor,
    rows: th.Tensor,
    pred_horizon: int,
    sigma: float,
    n_iterations: int,
) -> th.Tensor:
    """
    Minimises ``||generate(w)[:, rows] - wanted||^2 + sigma^2 ||w||^2`` by Gauss-Newton steps, damped as Levenberg and
    Marquardt do, each sample by itself. A step that would not lower the sum is not taken.

    :param generate: from noise to chunks
    :param undo: from chunks to about their noise: the start, where it is better than w = 0
    :param wanted: rows of chunks, (B, R / A, A), in the network's units
    :param at_bound: 1 where what is wanted is the upper bound of an action, -1 where it is the lower, else 0: anything beyond
        it will be clipped to it, and so is no error
    :param rows: which rows these are, (R / A,)
    :param pred_horizon: T
    :param sigma: see :meth:`FlowPolicy.invert <sb3_dsrl.FlowPolicy.invert>`
    :param n_iterations: steps
    :return: noise, (B, T, A)
    :raises ValueError: if ``sigma`` or ``n_iterations`` is negative
    """
    if sigma < 0 or n_iterations < 0:
        raise ValueError(f"sigma and n_iterations must not be negative, found {sigma} and {n_iterations}")
    entries, targets = at_bound.flatten(1), wanted.flatten(1)

    def residual(x: th.Tensor) -> th.Tensor:
        difference = x[:, rows].flatten(1) - targets
        return th.where(entries * difference > 0, 0.0, difference)

    def cost(w: th.Tensor, r: th.Tensor) -> th.Tensor:
        return r.square().sum(dim=1) + sigma**2 * w.flatten(1).square().sum(dim=1)

    w = wanted.new_zeros(len(wanted), pred_horizon, wanted.shape[2])
    chunk = generate(w)
    r = residual(chunk)
    chunk[:, rows] = wanted  # the other rows may be anything: as w = 0 has them
    damping = th.full_like(r[:, 0], DAMPING)
    identity = th.eye(w[0].numel(), device=w.device, dtype=w.dtype)
    tried = undo(chunk)  # which may go astray
    for i in range(1 + n_iterations):
        if i:
            jacobian = _jacobian(lambda x: residual(generate(x)), w)
            normal = jacobian.transpose(1, 2) @ jacobian + (sigma**2 + damping)[:, None, None] * identity
            gradient = (jacobian.transpose(1, 2) @ r[:, :, None])[:, :, 0] + sigma**2 * w.flatten(1)
            tried = w - th.linalg.solve(normal, gradient).view_as(w)
        r_tried = residual(generate(tried))
        better = cost(tried, r_tried) < cost(w, r)
        w, r = th.where(better[:, None, None], tried, w), th.where(better[:, None], r_tried, r)
        if i:
            damping = th.where(better, damping / 10, damping * 10).clamp_min(LEAST_DAMPING)
    return w


@th.enable_grad()
def _jacobian(function: Generate, w: th.Tensor) -> th.Tensor:
    """Of a function of each sample alone, from (B, T, A) to (B, R); (B, R, T * A). One backward pass for each of R."""
    w = w.detach().requires_grad_()
    y = function(w)
    rows = [th.autograd.grad(column.sum(), w, retain_graph=True)[0].flatten(1) for column in y.unbind(dim=1)]
    return th.stack(rows, dim=1)
