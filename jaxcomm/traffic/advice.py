"""Which method pays on which link: step times side by side, break-even bandwidths.

On a link of bandwidth B a method's step takes  fixed + bits / B  seconds (fixed: computation,
codec, latencies), so that two methods break even at

    B* = (bits_1 - bits_2) / (fixed_2 - fixed_1)

and the best one at each bandwidth is the lower envelope of these lines in 1/B. With a link for each
axis a collective over several waits for the slowest, and the lines bend at the bandwidths at which
that is another one: between two bends they are straight.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

from jaxcomm.traffic.ledger import Traffic
from jaxcomm.traffic.link import Link, Links, as_links
from jaxcomm.traffic.prediction import Branches, Prediction, bends, predict

WITHOUT = "dense"  # the name of the method without compression
Piece = tuple[float, float, dict[str, tuple[float, float]]]  # low, high, (fixed, bits) by name


@dataclasses.dataclass(frozen=True)
class Method:
    """What `advise` compares: a step's traffic, and what else is needed to time it."""

    traffic: Traffic
    codec_seconds: float = 0.0
    rounds_per_step: float = 1.0
    branches: Mapping[Branches, float] | None = None


@dataclasses.dataclass(frozen=True)
class Range:
    """From `low` to `high` bits a second this method has the shortest step."""

    method: str
    low: float
    high: float  # math.inf: however fast


@dataclasses.dataclass(frozen=True)
class Advice:
    """Step times on one link, and where each method is the best; `print_advice` shows it.

    Attributes:
      link: the link, or those of all axes.
      predictions: of a step, by method.
      break_even: bits a second below which the method always beats the dense one; 0 never, inf at
        any bandwidth. A method that wins on fast links alone (it saves latency, but sends more), or
        on faster ones again, pays there as well: of that only `ranges` tells.
      ranges: from slow to fast.
    """

    link: Links
    predictions: dict[str, Prediction]
    break_even: dict[str, float]
    ranges: tuple[Range, ...]

    @property
    def best(self) -> str:
        """The method with the shortest step on this link."""
        return min(self.predictions, key=lambda name: self.predictions[name].step_seconds)

    def speedup(self, method: str) -> float:
        """Dense step time over this method's."""
        return self.predictions[WITHOUT].step_seconds / self.predictions[method].step_seconds


def advise(
    methods: Traffic | Method | Mapping[str, Traffic | Method],
    link: Links | str,
    *,
    compute_seconds: float = 0.0,
    codec_seconds: float = 0.0,
    vary: str | None = None,
) -> Advice:
    """Compares step times with and without compression, and says which method pays where.

    Args:
      methods: one method, or several by name. The dense mean of all parameters in every step is
        added as 'dense' unless a method of that name is there.
      link: the link, or its bandwidth as `Link.parse` reads it; or one for each axis.
      compute_seconds: a step's computation, the same for all.
      codec_seconds: of methods given as a bare Traffic.
      vary: with a link for each axis, the axis whose bandwidth is in question; default: the
        slowest one.

    Returns:
      An Advice; bandwidths in it are those of the one link, or of the axis `vary`. They are exact
      unless another branch becomes the dearest (`rounds_per_step`), or links of several axes have
      bursts.

    Raises:
      ValueError: no method, no link for `vary`, an infinite bandwidth, or as `predict`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxcomm
      >>> tx = optax.chain(jaxcomm.error_feedback(jaxcomm.sign(), "workers"), optax.sgd(0.1))
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> step = jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=4)
      >>> state = step.abstract_state(jnp.zeros(10_000_000), jax.random.key(0))
      >>> report = jaxcomm.traffic(step, state, jax.ShapeDtypeStruct((4, 10_000_000), jnp.float32))
      >>> advice = jaxcomm.advise(report, jaxcomm.Link.parse("100mbit"), codec_seconds=0.05)
      >>> advice.best, round(advice.speedup("method"), 1), f"{advice.break_even['method']:.2g}"
      ('method', 13.7, '9e+09')
    """
    if isinstance(methods, (Traffic, Method)):
        methods = {"method": methods}
    if not methods:
        raise ValueError("advise: at least one method is needed, got none")
    link = as_links(link)
    own, at = _in_question(link, vary)
    as_method = lambda m: m if isinstance(m, Method) else Method(m, codec_seconds)
    every = {name: as_method(m) for name, m in methods.items()}
    if WITHOUT not in every:
        dense = Method(next(iter(every.values())).traffic.without_compression())
        every = {WITHOUT: dense, **every}
    timed = lambda m, link: predict(
        m.traffic,
        link,
        compute_seconds=compute_seconds,
        codec_seconds=m.codec_seconds,
        rounds_per_step=m.rounds_per_step,
        branches=m.branches,
    )
    predictions = {name: timed(m, link) for name, m in every.items()}
    bent = {b for m in every.values() for b in bends(m.traffic, at(math.inf), own)}
    ends = (0.0, *sorted({float(f"{b:.12g}") for b in bent}), math.inf)  # no two almost the same
    line = lambda m, *piece: _line(lambda b: timed(m, at(b)).step_seconds, *piece)
    pieces = [
        (low, high, {name: line(m, low, high) for name, m in every.items()})
        for low, high in itertools.pairwise(ends)
    ]
    others = [name for name in every if name != WITHOUT]
    even = {name: _break_even(pieces, name) for name in others}
    return Advice(link, predictions, even, _envelope(pieces))


def _in_question(link: Links, vary: str | None) -> tuple[Link, Callable[[float], Links]]:
    """The link whose bandwidth is in question, and all links when it has another one."""
    if isinstance(link, Link):
        own, among = link, lambda k: k
    else:
        if vary not in (None, *link):
            raise ValueError(f"advise: vary must be one of {sorted(link)}, got {vary!r}")
        axis = vary or min(link, key=lambda name: link[name].bandwidth)
        own, among = link[axis], lambda k: {**link, axis: k}
    if math.isinf(own.bandwidth):
        raise ValueError("advise: the bandwidth in question must be finite, got inf")
    return own, lambda bandwidth: among(dataclasses.replace(own, bandwidth=bandwidth))


def _line(seconds, low: float, high: float) -> tuple[float, float]:
    """(fixed seconds, bits) of a step, where its time is straight in 1/B."""
    slow, fastest = low or min(high / 2, 1.0), seconds(high)
    bits = (seconds(slow) - fastest) / (1 / slow - 1 / high)
    return fastest - bits / high, bits


def _break_even(pieces: list[Piece], name: str) -> float:
    """The end of the range that the method has from bandwidth 0 on, beside the dense one alone."""
    two = [(*ends, {k: lines[k] for k in (WITHOUT, name)}) for *ends, lines in pieces]
    first = _envelope(two)[0]
    return first.high if first.method == name else 0.0


def _envelope(pieces: list[Piece]) -> tuple[Range, ...]:
    """The best method from bandwidth 0 (fewest bits) to infinity (least fixed time)."""
    ranges: list[Range] = []
    for low, high, lines in pieces:
        name = min(lines, key=lambda k: (lines[k][0] * low + lines[k][1], lines[k][0]))
        while low < high:
            fixed, bits = lines[name]
            cross = {k: (b - bits) / (fixed - f) for k, (f, b) in lines.items() if f < fixed}
            rival = min(cross, key=lambda k: (cross[k], lines[k][0]), default=name)
            end = min(cross.get(rival, high), high)
            if end > low:
                start = ranges.pop().low if ranges and ranges[-1].method == name else low
                ranges.append(Range(name, start, end))
            low, name = max(low, end), rival
    return tuple(ranges)
