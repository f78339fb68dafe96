"""Classifiers that are fixed before training: the simplex ETF and FedLoGe's sparse one.

Shapes: C classes, D features. Weights are laid out like those of ``torch.nn.Linear``, [C, D]: row
c is m_c, the direction of class c.

In a simplex equiangular tight frame (ETF) all classes lie as far apart as they can: every two rows
meet at arccos(-1/(C-1)). The sparse one (SSE-C) has the same angles, but a share of its entries is
zero for good.

References
----------
Xiao et al., "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data", ICLR
2024: the sparse ETF and its place in the method.
Papyan, Han, Donoho, "Prevalence of neural collapse during the terminal phase of deep learning
training", PNAS 2020: the simplex ETF.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.checks import check_hyperparameter
from fedsim.errors import ConfigError, DataError
from fedsim.processor import one_thread

WARN_ABOVE = 0.01
"""Degrees: a sparse ETF with an angle further than this from the ideal comes with a warning."""

ANGLES_STEPS = 10_000
"""Steps of Adam of the recipe "angles", as in the authors' code."""

_CONVERGED = 1e-4  # degrees; ten times better than anyone needs, for a few iterations more
_CHUNK = 20  # iterations of L-BFGS from one look at the angles to the next
_MAX_CHUNKS = 100
_STALL_CHUNKS, _STALL_FALL = 5, 0.7
# torch's L-BFGS forgets curvature below an absolute 1e-10, which an unscaled residual passes
# long before its angles are right.
_LOSS_SCALE = 1e8
_ROWS = 256  # whose angles with the others are in memory at a time
_ANGLES_LR = 1e-4
_MAX_COSINE = 0.99999  # the slope of arccos has no bound at 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Norms, zeros and angles of a classifier's rows."""

    norm_mean: float
    """Mean of the rows' Euclidean norms."""
    norm_min: float
    norm_max: float
    sparsity: float
    """Share of the entries that are exactly zero, 0 to 1."""
    angle_ideal: float
    """arccos(-1/(C-1)), in degrees as the other angles."""
    angle_mean: float
    """Mean over the C(C-1)/2 pairs of rows."""
    angle_min: float
    angle_max: float
    angle_std: float
    """Standard deviation over the pairs (not over a sample of them: divided by their number)."""

    @property
    def deviation(self) -> float:
        """Largest distance of a pair's angle from the ideal, in degrees."""
        return max(self.angle_max - self.angle_ideal, self.angle_ideal - self.angle_min)

    def __str__(self) -> str:
        return (
            f"norms {self.norm_mean:.5g} ({self.norm_min:.5g} to {self.norm_max:.5g}), "
            f"{self.sparsity:.2%} zeros, angles {self.angle_mean:.4f}° "
            f"({self.angle_min:.4f}° to {self.angle_max:.4f}°, sd {self.angle_std:.2g}°; "
            f"ideal {self.angle_ideal:.4f}°)"
        )


def geometry(weight: Tensor) -> Geometry:
    """Measure a classifier's norms, zeros and pairwise angles.

    Parameters
    ----------
    weight : float [C, D]
        One row for each of at least 2 classes; computed in float64.

    Raises
    ------
    DataError
        If `weight` has another shape, or a row is zero or not finite (it has no direction).

    Examples
    --------
    >>> print(geometry(torch.tensor([[3.0, 0.0], [0.0, 1.0]])))
    norms 2 (1 to 3), 50.00% zeros, angles 90.0000° (90.0000° to 90.0000°, sd 0°; ideal 180.0000°)
    """
    if weight.ndim != 2 or len(weight) < 2:
        raise DataError(
            f"weight of shape {list(weight.shape)}: give [classes, features] of at least 2 classes"
        )
    weight = weight.detach().double()
    norms = weight.norm(dim=1)
    directed = norms.isfinite() & (norms > 0)
    if not directed.all():
        row = int(directed.int().argmin())
        raise DataError(f"row {row} of weight has the norm {norms[row]:g}, so it has no angles")
    blocks = [
        (len(angles), angles.mean(), angles.var(correction=0), angles.min(), angles.max())
        for angles in _angles(weight)
    ]
    pairs, means, variances, least, most = torch.tensor(blocks, dtype=torch.float64).T
    share = pairs / pairs.sum()
    mean = (share * means).sum()
    return Geometry(
        norm_mean=norms.mean().item(),
        norm_min=norms.min().item(),
        norm_max=norms.max().item(),
        sparsity=(weight == 0).double().mean().item(),
        angle_ideal=_ideal_angle(len(weight)),
        angle_mean=mean.item(),
        angle_min=least.min().item(),
        angle_max=most.max().item(),
        angle_std=(share * (variances + (means - mean).square())).sum().sqrt().item(),
    )


def etf(features: int, num_classes: int, rng: np.random.Generator) -> Tensor:
    """Return a randomly turned simplex ETF.

    The rows are sqrt(C/(C-1)) (I - 11^T/C) P^T, with P [D, C] orthonormal columns, uniformly
    distributed. They have norm 1, sum to 0, and every two have the cosine -1/(C-1).

    Parameters
    ----------
    features : int
        D, at least C.
    num_classes : int
        C, at least 2.
    rng : numpy.random.Generator
        Draws P.

    Returns
    -------
    float64 [C, D]

    Raises
    ------
    ConfigError
        If there are fewer than 2 classes, or fewer features than classes.

    Examples
    --------
    >>> m = etf(5, 3, np.random.default_rng(0))
    >>> (m @ m.T).numpy().round(6).tolist()
    [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    _check_size(features, num_classes)
    p, r = np.linalg.qr(rng.standard_normal((features, num_classes)))
    # A QR is only unique up to signs: fixing them makes P uniform on every LAPACK.
    return simplex(p * np.sign(np.diag(r)))


def simplex(p: NDArray[np.float64]) -> Tensor:
    """Return the simplex ETF of orthonormal columns: sqrt(C/(C-1)) (I - 11^T/C) P^T.

    Parameters
    ----------
    p : float64 [D, C]
        P.

    Returns
    -------
    float64 [C, D]
    """
    num_classes = p.shape[1]
    centred = p - p.mean(axis=1, keepdims=True)
    return torch.from_numpy(math.sqrt(num_classes / (num_classes - 1)) * centred.T)


def sparse_etf(
    features: int,
    num_classes: int,
    rng: np.random.Generator,
    *,
    sparsity: float = 0.6,
    norm: float = 0.1,
    recipe: Literal["gram", "angles"] = "gram",
) -> Tensor:
    """Return a static sparse ETF (SSE-C): an ETF's angles with a share of the entries zero.

    An ETF loses a random share of its entries, and the remaining ones are optimised until the
    angles are an ETF's again.

    Parameters
    ----------
    features : int
        D, at least C.
    num_classes : int
        C, at least 2.
    rng : numpy.random.Generator
        Draws the ETF and the positions of the zeros. Nothing else is random.
    sparsity : float
        Share of zeros, at least 0 and below 1: exactly round(sparsity * C * D) entries are 0.
        The positions are random, except that each class keeps at least one entry. As a rule of
        thumb, all the angles can be met while the entries kept outnumber the pairs of classes,
        (1 - sparsity) * D > C / 2, and every two classes share features, which takes a
        (1 - sparsity)^2 * D well above 1 (about 10).
    norm : float
        Norm of each row, 1e-6 to 1e6. In the authors' sweep 0.1 does best.
    recipe : {"gram", "angles"}
        ``"gram"`` minimises ||M M^T - G||_F^2 by L-BFGS, G being the Gram matrix of the ideal ETF
        (1 on the diagonal, -1/(C-1) off it), then scales each row to `norm`. It stops once all
        angles are right to 1e-4 degrees, when the residual falls by less than 30 % in 100
        iterations, or after 2,000 iterations.

        ``"angles"`` is the authors' own: 10,000 steps of Adam with learning rate 1e-4 on
        sum_c (||m_c|| - norm)^2 - mean_c arccos(max_{j != c} cos(m_c, m_j)). It is slower, and
        comes only near the ideal; no warning says so. With the other defaults, D = 512 and
        C = 100 it ends at norms of 0.1000 to 0.1005 and angles of 90.25 to 91.53 degrees
        (ideal 90.58), over two seeds. Its P isn't uniformly distributed either, for it
        orthonormalises positive numbers: the first column lies near -(1, ..., 1), and class 0
        away from all features that are averages after a ReLU (for D = 512 and C = 10 its cosine
        with (1, ..., 1) is about -0.3). Where class 0 is the most frequent one, as in a long
        tail made from CIFAR, the generic model learns more slowly for it.

    Returns
    -------
    float32 [C, D]
        On one machine, the same for the same `rng`.

    Warns
    -----
    UserWarning
        If ``"gram"`` leaves an angle more than 0.01 degrees (`WARN_ABOVE`) from the ideal.

    Raises
    ------
    ConfigError
        If a parameter is out of its range, or the sparsity leaves fewer entries than classes.

    Examples
    --------
    >>> found = geometry(sparse_etf(20, 3, np.random.default_rng(0)))
    >>> found.sparsity, round(found.norm_min, 6), found.deviation < 1e-3
    (0.6, 0.1, True)

    References
    ----------
    Xiao et al., ICLR 2024 (top of this module); recipe and constants as in the authors' code,
    github.com/ZackZikaiXiao/FedLoGe, ``util/etf_methods.py``.
    """
    check_hyperparameter(0 <= sparsity < 1, "sparsity", sparsity, "at least 0 and below 1")
    if not 1e-6 <= norm <= 1e6:
        raise ConfigError(f"norm = {norm}: must be from 1e-6 to 1e6")
    if recipe not in ("gram", "angles"):
        raise ConfigError(f"recipe = {recipe!r}: must be 'gram' or 'angles'")
    dense = (etf if recipe == "gram" else _authors_etf)(features, num_classes, rng)
    mask = _draw_mask(features, num_classes, rng, sparsity)
    with one_thread():
        if recipe == "angles":
            return fit_angles((dense * mask).float(), mask, norm, ANGLES_STEPS)
        fitted = _fit_gram(torch.nn.functional.normalize(dense * mask), mask)
    weight = (norm * torch.nn.functional.normalize(fitted)).float()
    reached = geometry(weight)
    if reached.deviation > WARN_ABOVE:
        warnings.warn(
            f"method.sparsity = {sparsity}: found no exact sparse ETF for {num_classes} classes "
            f"and {features} features, the worst angle is {reached.deviation:.3g} degrees off the "
            f"ideal ({reached}); lower method.sparsity or choose a model with more features",
            UserWarning,
            stacklevel=2,
        )
    return weight


def fit_angles(start: Tensor, mask: Tensor, norm: float, steps: int) -> Tensor:
    """Optimise a masked ETF as FedLoGe's authors do; see `sparse_etf`, recipe "angles".

    Parameters
    ----------
    start : float32 [C, D]
        The ETF with its zeros.
    mask : bool or float [C, D]
        Which entries may change.
    norm : float
        Norm of each row, aimed at.
    steps : int
        Steps of Adam.

    Returns
    -------
    float32 [C, D]
    """
    mask = mask.to(start.dtype)
    m = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([m], lr=_ANGLES_LR)
    for _ in range(steps):
        norms = m.norm(dim=1)
        unit = m / norms[:, None]
        nearest = (unit @ unit.T).fill_diagonal_(-1).max(dim=1).values
        angles = nearest.clamp(-_MAX_COSINE, _MAX_COSINE).arccos()
        loss = (norms - norm).square().sum() - angles.mean()
        (gradient,) = torch.autograd.grad(loss, m)
        m.grad = gradient * mask
        optimizer.step()
    return m.detach()


def _check_size(features: int, num_classes: int) -> None:
    if num_classes < 2:
        raise ConfigError(f"data: an ETF classifier needs at least 2 classes, not {num_classes}")
    if features < num_classes:
        raise ConfigError(
            f"model: {features} features for {num_classes} classes, but an ETF classifier needs at "
            "least as many features as classes; choose a model with a wider last layer"
        )


def _authors_etf(features: int, num_classes: int, rng: np.random.Generator) -> Tensor:
    """Return the ETF [C, D] that the authors' recipe starts from."""
    _check_size(features, num_classes)
    # Householder's reflections make the first column of positive numbers negative in every LAPACK.
    return simplex(np.linalg.qr(rng.random((features, num_classes)))[0])


def _draw_mask(
    features: int, num_classes: int, rng: np.random.Generator, sparsity: float
) -> Tensor:
    """Return which entries [C, D] may be other than zero, as float64 ones and zeros."""
    size = num_classes * features
    kept = size - round(sparsity * size)
    if kept < num_classes:
        raise ConfigError(
            f"method.sparsity = {sparsity}: keeps {kept} of {size} entries for {num_classes} "
            f"classes, but each needs at least one; the most is {1 - 1 / features:.6g}"
        )
    mask = np.zeros(size)
    mask[np.arange(num_classes) * features + rng.integers(features, size=num_classes)] = 1
    mask[rng.choice(np.flatnonzero(mask == 0), kept - num_classes, replace=False)] = 1
    return torch.from_numpy(mask.reshape(num_classes, features))


def _fit_gram(start: Tensor, mask: Tensor) -> Tensor:
    """Return the entries [C, D] under `mask` whose Gram matrix is closest to an ETF's."""
    num_classes = len(start)
    gram = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=torch.float64)
    gram.fill_diagonal_(1)
    m = torch.nn.Parameter(start)
    optimizer = torch.optim.LBFGS(
        [m],
        max_iter=_CHUNK,
        max_eval=10 * _CHUNK,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> float:
        # The gradient by hand needs one matrix product; autograd would take two. Masking it keeps
        # the zeros: L-BFGS only moves along combinations of gradients.
        residual = m @ m.T - gram
        m.grad = 4 * _LOSS_SCALE * (residual @ m) * mask
        return _LOSS_SCALE * residual.square().sum().item()

    ideal = _ideal_angle(num_classes)
    losses: list[float] = []
    while len(losses) < _MAX_CHUNKS:
        if all((of - ideal).abs().max() <= _CONVERGED for of in _angles(m.detach())):
            break
        if len(losses) > _STALL_CHUNKS and losses[-1] > _STALL_FALL * losses[-1 - _STALL_CHUNKS]:
            break
        before = optimizer.step(closure)  # type: ignore[no-untyped-call]
        losses.append(float(before))
    return m.detach()


def _ideal_angle(num_classes: int) -> float:
    return math.degrees(math.acos(-1 / (num_classes - 1)))


def _angles(m: Tensor) -> Iterator[Tensor]:
    """Yield the angles between the rows, in degrees: of some rows with all after them at a time."""
    unit = torch.nn.functional.normalize(m, eps=0)
    for start in range(0, len(m) - 1, _ROWS):
        cosines = unit[start : start + _ROWS] @ unit[start:].T
        i, j = torch.triu_indices(len(cosines), cosines.shape[1], offset=1)
        yield cosines[i, j].clamp(-1, 1).arccos().rad2deg()
