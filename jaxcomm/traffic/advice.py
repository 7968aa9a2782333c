"""Which method pays on which link: step times side by side, break-even bandwidths.

On a link of bandwidth B a method's step takes  fixed + bits / B  seconds (fixed: computation,
codec, latencies), so that two methods break even at

    B* = (bits_1 - bits_2) / (fixed_2 - fixed_1)

and the best one at each bandwidth is the lower envelope of these lines in 1/B.
"""

import dataclasses
import math
from collections.abc import Mapping

from jaxcomm.traffic.ledger import Traffic
from jaxcomm.traffic.link import Link, Links, as_links
from jaxcomm.traffic.prediction import Branches, Prediction, predict

WITHOUT = "dense"  # the name of the method without compression


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
    """Step times on one link, and where each method is the best; `print_advice` shows it."""

    link: Links
    predictions: dict[str, Prediction]
    break_even: dict[str, float]  # bits a second below which the method beats the dense one
    ranges: tuple[Range, ...]  # from slow to fast

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
      An Advice; bandwidths in it are those of the one link, or of the axis `vary`.

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
    _check_bandwidth(link, vary)
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
    lines = {}
    for name, m in every.items():
        here, bandwidth = predictions[name].step_seconds, _bandwidth(link, vary)
        bits = _bits(predictions[name], lambda k, m=m: timed(m, k), link, vary)
        lines[name] = (here - bits / bandwidth, bits)
    others = [name for name in every if name != WITHOUT]
    even = {name: break_even(lines[WITHOUT], lines[name]) for name in others}
    return Advice(link, predictions, even, _envelope(lines))


def break_even(dense: tuple[float, float], method: tuple[float, float]) -> float:
    """Bits a second below which the method's step is shorter; 0 never, inf always.

    Both are (fixed seconds, bits) of a step. A method that sends more bits pays nowhere here, even
    if on a fast enough link it should save latency.
    """
    saved, paid = dense[1] - method[1], method[0] - dense[0]
    if saved <= 0:
        return 0.0
    return math.inf if paid <= 0 else saved / paid


def _varied(link: Links, vary: str | None) -> str:
    """The axis whose bandwidth is in question."""
    assert not isinstance(link, Link)
    return vary or min(link, key=lambda name: link[name].bandwidth)


def _check_bandwidth(link: Links, vary: str | None) -> None:
    if not isinstance(link, Link) and vary not in (None, *link):
        raise ValueError(f"advise: vary must be one of {sorted(link)}, got {vary!r}")
    if math.isinf(_bandwidth(link, vary)):
        raise ValueError("advise: the bandwidth in question must be finite, got inf")


def _bandwidth(link: Links, vary: str | None) -> float:
    return (link if isinstance(link, Link) else link[_varied(link, vary)]).bandwidth


def _bits(prediction: Prediction, again, link: Links, vary: str | None) -> float:
    """Bits of a step that wait for the link in question."""
    bandwidth = _bandwidth(link, vary)
    if isinstance(link, Link):
        return prediction.transfer_seconds * bandwidth
    name = _varied(link, vary)
    slower = dataclasses.replace(link[name], bandwidth=bandwidth / 2)
    return (again({**link, name: slower}).step_seconds - prediction.step_seconds) * bandwidth


def _envelope(lines: dict[str, tuple[float, float]]) -> tuple[Range, ...]:
    """The best method from bandwidth 0 (fewest bits) to infinity (least fixed time)."""
    ranges: list[Range] = []
    low = 0.0
    name = min(lines, key=lambda k: lines[k][::-1])
    while True:
        fixed, bits = lines[name]
        rivals = [k for k, (f, _) in lines.items() if f < fixed]
        cross = {k: (lines[k][1] - bits) / (fixed - lines[k][0]) for k in rivals}
        if not cross:
            return (*ranges, Range(name, low, math.inf))
        rival = min(cross, key=lambda k: (cross[k], lines[k][0]))
        if cross[rival] > low:
            ranges.append(Range(name, low, cross[rival]))
        low, name = max(low, cross[rival]), rival
