r"""Who holds everybody up: slow and hung processes, in computation or in communication.

Training in step is periodic, so the times of its processes can be compared with each other. Of
per-process times x_i the robust score is

    z_i = (x_i - median x) / max(1.4826 MAD x, 0.05 median x),     MAD x = median |x_i - median x|

and a process is slow if z_i > 5 (with the floor: a quarter more than the median at least).

    computation slow      its computation takes longer; the others wait for it in the collective
    communication slow    its collective takes longer than the others', its wait for the last one
                          to come (max_j compute_j - compute_i) left out; or everybody's takes
                          longer than usual
    computation hung      it has not begun a collective that others have begun
    communication hung    all have begun the collective, and some have not finished it

Which link it is says the matrix of delays D_ij from sender i to receiver j: a hot row is a slow
sender, a hot column a slow receiver, a hot point a slow link. `localise` takes, one by one, the
row, column or point S whose mean rise explains most: |S| mean_S(z)^2, the gain of a shift in mean;
z is what the rises of those before it, fitted together, leave.

Source: Dong et al. 2024, "Boosting Large-scale Parallel Training Efficiency with C4", arXiv
2406.04594: the four classes and the reading of the matrix. Scores and the search are ours.
"""

import math
from typing import NamedTuple

import numpy as np

SLOW_COMPUTATION = "slow in computation"
SLOW_COMMUNICATION = "slow in communication"
HUNG_COMPUTATION = "hung in computation"
HUNG_COMMUNICATION = "hung in communication"

MAD_TO_SIGMA = 1.4826  # for a normal distribution
FLOOR = 0.05  # of the median: equal times are no reason to call a microsecond slow
SCORE = 5.0
EVERYBODY = -1  # as a process: the fault is between them; a probe of the links can tell


class Finding(NamedTuple):
    """A process that is not like the others."""

    process: int  # or EVERYBODY
    kind: str  # one of the four classes
    seconds: float  # its time; nan if it hangs
    usual: float  # the median of all, or what was usual before; nan if it hangs
    score: float  # inf if it hangs

    def __str__(self) -> str:
        who = "everybody is" if self.process == EVERYBODY else f"process {self.process} is"
        if math.isnan(self.seconds):
            return f"{who} {self.kind}"
        return f"{who} {self.kind}: {self.seconds:.3g} s a step where {self.usual:.3g} s is usual"


class Fault(NamedTuple):
    """What is slow in a matrix of delays."""

    kind: str  # 'sender', 'receiver' or 'link'
    sender: int | None
    receiver: int | None
    seconds: float  # mean delay there by this fault alone
    usual: float  # median delay

    def __str__(self) -> str:
        names = {
            "sender": f"host {self.sender} sends slowly",
            "receiver": f"host {self.receiver} receives slowly",
            "link": f"the link from host {self.sender} to host {self.receiver} is slow",
        }
        return f"{names[self.kind]}: {self.seconds:.3g} s where {self.usual:.3g} s is usual"


def robust_scores(times) -> np.ndarray:
    """The scores z_i of the module's docstring.

    Args:
      times: shape (n,), seconds; nan (unknown) scores nan.

    Example:
      >>> robust_scores([1.0, 1.0, 1.1, 2.0]).round(1).tolist()
      [-0.7, -0.7, 0.7, 12.8]
    """
    times = np.asarray(times, float)
    if not np.isfinite(times).any():
        return np.full(times.shape, math.nan)
    median = np.nanmedian(times)
    spread = MAD_TO_SIGMA * np.nanmedian(np.abs(times - median))
    return (times - median) / max(spread, FLOOR * abs(median), 1e-12)


def find_slow(compute, collective, usual_collective: float | None = None) -> list[Finding]:
    """Processes that are slow, from one or more steps.

    With two processes the median is between them, and only times that differ by more than
    two fifths can be told apart.

    Args:
      compute: seconds of each process's computation, shape (n,) or (steps, n).
      collective: seconds from entering the collective to leaving it, like `compute`; nan where
        unknown. A process whose computation is never known is left out.
      usual_collective: seconds of the shortest collective among the processes, which waited for
        nobody, when all was well.

    Returns:
      Findings, the highest score first.

    Raises:
      ValueError: shapes that differ.
    """
    compute, collective = (np.atleast_2d(_known(x)) for x in (compute, collective))
    if compute.shape != collective.shape:
        raise ValueError(
            "find_slow: compute and collective must have the same shape, got "
            f"{compute.shape} and {collective.shape}"
        )
    here = np.isfinite(compute).any(0)
    # of a step with an unknown computation, which may have been the last, nan: so is the wait
    last = np.max(np.where(here, compute, 0.0), 1, keepdims=True)
    transfer = np.maximum(collective - (last - compute), 0.0)
    compute, transfer = _medians(compute), _medians(transfer)
    found = _outliers(compute, SLOW_COMPUTATION)
    late = {finding.process for finding in found}
    found += [f for f in _outliers(transfer, SLOW_COMMUNICATION) if f.process not in late]
    if usual_collective and here.all() and np.isfinite(transfer).any():
        shortest = float(np.nanmin(transfer))
        score = (shortest / usual_collective - 1) / FLOOR
        if score > SCORE and not any(f.kind == SLOW_COMMUNICATION for f in found):
            everybody = (SLOW_COMMUNICATION, shortest, usual_collective, score)
            found.append(Finding(EVERYBODY, *everybody))
    return sorted(found, key=lambda finding: -finding.score)


def find_hung(started, finished) -> list[Finding]:
    """Processes that hang, from who has begun and who has finished a collective in time.

    Args:
      started: shape (n,), bool.
      finished: shape (n,), bool.

    Example:
      >>> print(*find_hung([True, False, True], [False, False, False]))
      process 1 is hung in computation
    """
    started, finished = np.asarray(started, bool), np.asarray(finished, bool)
    if started.shape != finished.shape or (finished & ~started).any():
        raise ValueError("find_hung: who has finished must have started, of the same n processes")
    hung, kind = ~started, HUNG_COMPUTATION
    if started.all():
        hung, kind = ~finished, HUNG_COMMUNICATION
    elif not started.any():
        return []  # nobody is there yet: nothing to compare with
    return [Finding(int(i), kind, math.nan, math.nan, math.inf) for i in np.flatnonzero(hung)]


def localise(delays, noise: float | None = None, score: float = 5.0) -> list[Fault]:
    """Slow senders, receivers and links in a matrix of delays.

    With two hosts a link, its sender and its receiver are the same thing, and called a link.

    Args:
      delays: seconds from sender i to receiver j, shape (n, n) or (repeats, n, n), nan where
        unknown; the diagonal is not looked at.
      noise: standard deviation of an entry; estimated from the repeats, or from the matrix.
      score: a rise counts if its gain is above score^2 + 2 log(number of candidates), and the
        rise itself above a fifth of the median delay (two fifths with two hosts).

    Returns:
      What is slow, the clearest first.

    Raises:
      ValueError: not a square matrix of at least two hosts.
    """
    cube = _known(delays)
    cube = cube[None] if cube.ndim == 2 else cube
    if cube.ndim != 3 or cube.shape[1] != cube.shape[2] or cube.shape[1] < 2:
        raise ValueError(f"localise: delays must be (n, n), n at least 2, got {np.shape(delays)}")
    n, matrix = cube.shape[1], _medians(cube)
    known = np.isfinite(matrix) & ~np.eye(n, dtype=bool)
    if not known.any():
        return []
    usual = _lower_median(matrix[known])
    sigma = _noise(cube, matrix, known) if noise is None else noise
    sigma = max(sigma, 0.2 * FLOOR * usual, 1e-12)
    z = np.where(known, matrix - usual, 0.0) / sigma
    least = score**2 + 2 * math.log(n * (n + 1))
    smallest = (0.4 if n == 2 else 0.2) * usual / sigma
    found = _search(z, known, least, smallest)
    return [Fault(*place, float(usual + rise * sigma), usual) for place, rise in found]


def _search(z: np.ndarray, known: np.ndarray, least: float, smallest: float):
    """Places (kind, sender, receiver) and their rises in z."""
    places: list[tuple[str, int | None, int | None]] = []
    rises, rest = [], z
    while True:
        place, gain, rise = _best(rest, known)
        if gain < least or rise < smallest or place in places:
            # a sender of whom most links have been named since may have nothing of its own left
            return [(p, rise) for p, rise in zip(places, rises) if rise >= smallest / 2]
        places.append(place)
        rises, rest = _fit(z, known, places)


def _known(times) -> np.ndarray:
    """As an array; nan for what is not finite."""
    times = np.asarray(times, float)
    return np.where(np.isfinite(times), times, math.nan)


def _medians(times: np.ndarray) -> np.ndarray:
    """Over the first axis; nan where there is none."""
    known = np.isfinite(times).any(0)
    return np.where(known, np.nanmedian(np.where(known, times, 0.0), 0), math.nan)


def _outliers(times: np.ndarray, kind: str) -> list[Finding]:
    if not np.isfinite(times).any():
        return []
    scores, usual = robust_scores(times), float(np.nanmedian(times))
    if np.isfinite(times).sum() == 2:  # each is as far from the median as the other
        usual = float(np.nanmin(times))
        scores = (times - usual) / max(2 * FLOOR * usual, 1e-12)
    found = [(i, float(z)) for i, z in enumerate(scores) if z > SCORE]
    return [Finding(i, kind, float(times[i]), usual, z) for i, z in found]


def _lower_median(values: np.ndarray) -> float:
    """The median; of an even number the lower one, which is no mean of good and bad."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _noise(cube: np.ndarray, matrix: np.ndarray, known: np.ndarray) -> float:
    count = np.isfinite(cube).sum(0)
    often = known & (count > 2)
    if often.any():  # of the median of the fewest; two entries are compared with each other only
        spread = MAD_TO_SIGMA * float(np.nanmedian(np.abs(cube - matrix)[:, often]))
        fewest = max(int(count[known].min()), 2)
        return spread * math.sqrt(math.pi / 2 / (fewest - 1) * (2 if len(matrix) == 2 else 1))
    values = matrix[known]
    return MAD_TO_SIGMA * _lower_median(np.abs(values - _lower_median(values)))


def _best(z: np.ndarray, known: np.ndarray):
    """Of the row, column or point with most gain: (kind, sender, receiver), gain, mean rise."""
    i, j = np.unravel_index(np.argmax(np.where(known, z, -np.inf)), z.shape)
    candidates: list = [(("link", int(i), int(j)), max(z[i, j], 0.0) ** 2, z[i, j])]
    for axis, kind in ((1, "sender"), (0, "receiver")):
        count = np.maximum(known.sum(axis), 1)
        means = z.sum(axis) / count
        gains = count * np.maximum(means, 0.0) ** 2
        k = int(np.argmax(gains))
        candidates.append(((kind, k, None) if axis else (kind, None, k), gains[k], means[k]))
    return max(candidates, key=lambda candidate: candidate[1])  # the first of equals: the link


def _fit(z: np.ndarray, known: np.ndarray, places: list) -> tuple[list, np.ndarray]:
    """The rises of all places, by least squares together, and what they leave of z.

    A link takes what is left of its entry, so rows and columns are fitted to the other entries.
    """
    free, lines = known.copy(), []
    for kind, sender, receiver in places:
        if kind == "link":
            free[sender, receiver] = False
        else:
            lines.append(np.zeros_like(z))
            lines[-1][sender if receiver is None else np.s_[:, receiver]] = 1.0
    shapes = np.reshape(lines, (len(lines), *z.shape))
    flat = (shapes * free).reshape(len(lines), z.size)
    fitted = np.linalg.lstsq(flat @ flat.T, flat @ z.ravel(), rcond=None)[0]
    rest, each = z - np.tensordot(fitted, shapes, 1), iter(fitted)
    return [rest[i, j] if kind == "link" else next(each) for kind, i, j in places], rest * free
