r"""Step sizes that theory admits, from smoothness constants and the codec's contraction.

With f = (1/n) sum_i f_i, L the smoothness of f, L_i of f_i, and a codec of contraction alpha:

    theta = 1 - sqrt(1 - alpha),  beta = (1 - alpha) / theta,  xi = sqrt(beta / theta)
    L_QM = sqrt(mean L_i^2),  L_AM = mean L_i,   L <= L_AM <= L_QM

Sources: Richtarik, Sokolov & Fatkhullin 2021 (EF21, arXiv 2106.05203; also its PL rate);
Fatkhullin et al. 2021 (Bells & Whistles, arXiv 2110.03294, Theorem 7: PP); Fatkhullin, Tyurin &
Richtarik 2023 (SGDM, arXiv 2305.15155); Richtarik, Gasanov & Burlachenko 2024 (Error Feedback
Reloaded, arXiv 2402.10774: L_AM, weights); Gao, Islamov & Stich 2024 (EControl, arXiv 2311.05645).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Contraction(NamedTuple):
    """Constants of EF21's analysis."""

    theta: float
    beta: float
    xi: float


def contraction_constants(alpha: float) -> Contraction:
    """theta, beta and xi = sqrt(beta / theta) <= 2 / alpha - 1.

    Args:
      alpha: contraction of the codec, e.g. `top_k(0.01).alpha(size)`.

    Raises:
      ValueError: alpha outside (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"contraction_constants: alpha must be in (0, 1], got {alpha}")
    root = math.sqrt(1 - alpha)
    theta = alpha / (1 + root)  # 1 - root without cancellation
    return Contraction(theta, (1 - alpha) / theta, root / theta)


def ef21_step_size(
    smoothness: float, worker_smoothness: Sequence[float], alpha: float, *, rule: str = "am"
) -> float:
    r"""EF21, EF21-W and EF21+: :math:`\gamma = 1 / (L + \tilde L \xi)`.

    Args:
      smoothness: L of the mean function.
      worker_smoothness: the n constants L_i.
      alpha: contraction of the codec.
      rule: 'am', L~ = mean L_i (Error Feedback Reloaded), or 'qm', L~ = sqrt(mean L_i^2) (the
        original and never larger step).

    Returns:
      The largest admissible step size.

    Raises:
      ValueError: constants that are not positive, alpha outside (0, 1], an unknown rule.

    Example:
      >>> import jaxcomm
      >>> jaxcomm.ef21_step_size(1.0, [1.0, 1.0, 4.0], alpha=1.0)  # nothing is lost: 1 / L
      1.0
    """
    return 1 / (smoothness + _mean(smoothness, worker_smoothness, rule) * _xi(alpha))


def ef21_pl_step_size(
    smoothness: float, worker_smoothness: Sequence[float], alpha: float, mu: float
) -> float:
    r"""EF21 under the Polyak-Lojasiewicz inequality, which makes it linear.

    :math:`\gamma = \min\{1/(L + L_{QM}\sqrt{2\beta/\theta}),\ \theta/(2\mu)\}`; then
    :math:`f - f^* + (\gamma/\theta) G` shrinks by :math:`1 - \gamma\mu` a step.

    Args:
      smoothness: L of the mean function.
      worker_smoothness: the n constants L_i.
      alpha: contraction of the codec.
      mu: constant of :math:`\|\nabla f\|^2 \ge 2\mu (f - f^*)`.
    """
    constants = contraction_constants(alpha)
    quadratic = _mean(smoothness, worker_smoothness, "qm")
    first = 1 / (smoothness + quadratic * math.sqrt(2) * constants.xi)
    return min(first, constants.theta / (2 * mu))


def ef21_pp_step_size(
    smoothness: float, worker_smoothness: Sequence[float], alpha: float, participation: float
) -> float:
    r"""EF21-PP with equal probabilities p: :math:`\gamma = 1/(L + \sqrt{B/\theta_p})`.

    With s, rho > 0, theta_s = 1 - (1 + s)(1 - alpha) and beta_s = (1 + 1/s)(1 - alpha):
    theta_p = p theta_s - rho (1 - p) > 0 and B = (beta_s p + (1 + 1/rho)(1 - p)) mean L_i^2. The
    theorem holds for any such s and rho; here B / theta_p is minimised over both (over rho in
    closed form). p = 1 gives `ef21_step_size(..., rule='qm')`.

    Args:
      smoothness: L of the mean function.
      worker_smoothness: the n constants L_i.
      alpha: contraction of the codec.
      participation: p in (0, 1].

    Raises:
      ValueError: participation outside (0, 1], or as `ef21_step_size`.
    """
    p = participation
    if not 0 < p <= 1:
        raise ValueError(f"ef21_pp_step_size: participation must be in (0, 1], got {p}")
    contraction_constants(alpha)
    quadratic = _mean(smoothness, worker_smoothness, "qm")
    lost = 1 - alpha
    s = np.linspace(0, 1, 200_002)[1:-1] * (alpha / lost) if lost else np.ones(1)
    theta, beta = alpha - s * lost, (1 + 1 / s) * lost
    if p == 1:
        return 1 / (smoothness + quadratic * math.sqrt(np.min(beta / theta)))
    # (a + b / rho) / (c - b rho) is least where a rho^2 + 2 b rho = c
    a, b, c = beta * p + 1 - p, 1 - p, p * theta
    rho = c / (b + np.sqrt(b * b + a * c))
    return 1 / (smoothness + quadratic * math.sqrt(np.min((a + b / rho) / (c - b * rho))))


def ef21_sgdm_step_size(
    smoothness: float, worker_smoothness: Sequence[float], alpha: float, momentum: float
) -> float:
    r"""EF21-SGDM: :math:`\gamma = \min\{\alpha/(20 L_{QM}),\ \eta/(7 L)\}`.

    Args:
      smoothness: L of the mean function.
      worker_smoothness: the n constants L_i.
      alpha: contraction of the codec.
      momentum: eta of `ef21(..., momentum=eta)`.
    """
    contraction_constants(alpha)
    quadratic = _mean(smoothness, worker_smoothness, "qm")
    return min(alpha / (20 * quadratic), momentum / (7 * smoothness))


def ef21_rare_features_step_size(
    smoothness: float, worker_smoothness: Sequence[float], features: int, owners: int
) -> float:
    r"""EF21 with Top-1 where workers own few features: :math:`\gamma = 1/(L + L_+ \xi(1/r))`.

    :math:`L_+ = \sqrt{(c/n) \min\{(c/n) \max_i L_i^2,\ \mathrm{mean}_i L_i^2\}}`. Nothing is lost
    to heterogeneity between workers that never touch the same coordinates.

    Args:
      smoothness: L of the mean function.
      worker_smoothness: the n constants L_i.
      features: r, the most features (non-zero gradient coordinates) of any worker.
      owners: c, the most workers that own any one feature, at most n.

    Raises:
      ValueError: features below 1, owners outside 1 to n, or as `ef21_step_size`.

    References:
      Richtarik, Gasanov & Burlachenko, Error Feedback Shines when Features are Rare,
      arXiv 2305.15264.
    """
    n = len(worker_smoothness)
    if features < 1 or not 1 <= owners <= n:
        raise ValueError(
            "ef21_rare_features_step_size: features must be at least 1 and owners from 1 to "
            f"{n}, got {features=}, {owners=}"
        )
    quadratic = _mean(smoothness, worker_smoothness, "qm")
    share = owners / n
    both = math.sqrt(share * min(share * max(worker_smoothness) ** 2, quadratic**2))
    return 1 / (smoothness + both * _xi(1 / features))


def ef21_weights(worker_smoothness: Sequence[float]) -> np.ndarray:
    """EF21-W's weights w_i = L_i / sum_j L_j, float32, for `ef21(..., weight=)`.

    Raises:
      ValueError: constants that are not positive.
    """
    _mean(1.0, worker_smoothness, "am")
    values = np.asarray(worker_smoothness, np.float64)
    return (values / values.sum()).astype(np.float32)


def econtrol_eta(alpha: float) -> float:
    """EControl's eta = alpha / 400, the theory's; experiments use 1e-3 to 0.2."""
    contraction_constants(alpha)
    return alpha / 400


def econtrol_step_size(
    worker_smoothness: Sequence[float], alpha: float, *, constant: float = 0.1
) -> float:
    r"""EControl: :math:`\gamma = c\,\alpha / L_{QM}`.

    Args:
      worker_smoothness: the n constants L_i.
      alpha: contraction of the codec.
      constant: c, which the theory only calls small; 0.1 is our choice, tested on least squares.
    """
    contraction_constants(alpha)
    return constant * alpha / _mean(1.0, worker_smoothness, "qm")


def _xi(alpha: float) -> float:
    return contraction_constants(alpha).xi


def _mean(smoothness: float, worker_smoothness: Sequence[float], rule: str) -> float:
    """L_AM or L_QM, after checking the constants."""
    values = np.asarray(worker_smoothness, np.float64)
    if not smoothness > 0 or values.ndim != 1 or not values.size or not (values > 0).all():
        raise ValueError(
            "smoothness constants must be positive, worker_smoothness one a worker, got "
            f"smoothness={smoothness}, worker_smoothness={worker_smoothness}"
        )
    if rule not in ("am", "qm"):
        raise ValueError(f"rule must be 'am' or 'qm', got {rule!r}")
    return float(values.mean() if rule == "am" else np.sqrt((values**2).mean()))
