"""How long a step takes on a link.

A collective over n workers of which each sends s bytes takes, on a link of bandwidth B bits a
second, latency L and no other traffic,

    seconds = hops * L + 8 s / B,        hops = 2(n-1) all-reduce (ring), n-1 all-gather (ring),
                                         n-1 all-to-all and reduce-scatter, 1 permute

and the collectives of a step one after another, those of meetings in their share of the steps
(between CPU hosts small ones take fewer hops, see `jaxcomm.collectives.direct`, or none of their
own); nothing is assumed to hide behind the gradient's computation:

    step = compute + codec + latencies + max(transfers, hosts)

where all are averages over steps. The transfers of each step are less by what a link passes at
once after the silence before it (`Link.burst`), and `hosts` is what the communication takes on a
link of any bandwidth: the processors' work on messages and the waiting for the slowest worker,
which go on while bytes are on the wire. With messages in the background the codec, too, works on
one while another travels:

    step = compute + max(codec, latencies + max(transfers, hosts))
"""

import dataclasses
from collections.abc import Mapping

from jaxcomm.traffic.ledger import Collective, Traffic, extreme
from jaxcomm.traffic.link import Link, Links, as_links, links_of

HOPS = {
    "all-reduce": lambda n: 2 * (n - 1),
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: n - 1,
    "reduce-scatter": lambda n: n - 1,
    "permute": lambda n: 1 if n > 1 else 0,
}
Branches = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Timed:
    """A collective with its predicted time."""

    collective: Collective
    latency_seconds: float
    transfer_seconds: float
    share: float  # of the steps in which it runs
    burst_seconds: float = 0.0  # of its transfer, what the link's burst would save

    @property
    def seconds(self) -> float:
        """Seconds when it runs."""
        return self.latency_seconds + self.transfer_seconds

    @property
    def seconds_per_step(self) -> float:
        """Seconds a step, on average."""
        return self.share * self.seconds


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted times of a step, in seconds, and bytes one worker sends; averages over steps."""

    collectives: tuple[Timed, ...]
    transfer_seconds: float  # what the bytes take; the collectives of one step share one burst
    compute_seconds: float
    codec_seconds: float
    host_seconds: float = 0.0
    background: bool = False

    @property
    def every_step_seconds(self) -> float:
        """Communication of every step."""
        return sum(t.seconds for t in self.collectives if not t.collective.when)

    @property
    def sync_seconds_per_step(self) -> float:
        """Communication inside conditionals, spread over all steps."""
        return sum(t.seconds_per_step for t in self.collectives if t.collective.when)

    @property
    def communication_seconds(self) -> float:
        """All communication a step."""
        return self.latency_seconds + max(self.transfer_seconds, self.host_seconds)

    @property
    def latency_seconds(self) -> float:
        """The part of the communication that no bandwidth shortens."""
        return sum(t.share * t.latency_seconds for t in self.collectives)

    @property
    def step_seconds(self) -> float:
        """A step, all in all."""
        together = max if self.background else sum
        return self.compute_seconds + together((self.codec_seconds, self.communication_seconds))

    @property
    def bytes_per_step(self) -> float:
        """Bytes that one worker sends."""
        return sum(t.share * t.collective.sent_bytes for t in self.collectives)

    def by_op(self) -> dict[str, float]:
        """Seconds a step by collective."""
        totals: dict[str, float] = {}
        for t in self.collectives:
            totals[t.collective.op] = totals.get(t.collective.op, 0.0) + t.seconds_per_step
        return totals


def predict(
    traffic: Traffic,
    link: Links | str,
    *,
    compute_seconds: float = 0.0,
    codec_seconds: float = 0.0,
    host_seconds: float = 0.0,
    rounds_per_step: float = 1.0,
    branches: Mapping[Branches, float] | None = None,
    background: bool = False,
) -> Prediction:
    """Predicts the average step of a method on a link.

    Args:
      traffic: what the step sends.
      link: the link between workers, or its bandwidth as `Link.parse` reads it; or one for each
        axis: `{"chips": fast, "hosts": slow}`.
      compute_seconds: a step's computation without the method (gradient and optimizer).
      codec_seconds: what encoding and decoding add, a step.
      host_seconds: what communication takes, a step, where bandwidth does not matter: a step on
        the loopback or the fastest link minus the same step without communication.
      rounds_per_step: meetings a step (1/8 for `every(8)`): the share of the dearest step, the
        others being the cheapest one.
      branches: instead of it, share of the steps by the branches they take
        (`metrics['branches']` of a run), for methods with several conditionals.
      background: messages travel beside the codec, as with make_train_step's background=True and
        a transform in buckets.

    Returns:
      A Prediction.

    Raises:
      ValueError: an axis without a link, not a link, negative seconds, or shares that are not in
        [0, 1].

    Example:
      >>> import jaxcomm
      >>> mean = jaxcomm.Collective("all-reduce", ("w",), 4, "float32", (10**6,), "values", 1, ())
      >>> step = jaxcomm.Traffic((mean,), (), workers=4, elements=10**6)
      >>> round(jaxcomm.predict(step, jaxcomm.Link.parse("100mbit@1ms")).step_seconds, 6)
      0.486
    """
    seconds = {
        "compute_seconds": compute_seconds,
        "codec_seconds": codec_seconds,
        "host_seconds": host_seconds,
    }
    for name, value in seconds.items():
        if not value >= 0:  # nor nan
            raise ValueError(f"predict: {name} must not be negative, got {value}")
    link = as_links(link)
    runs = _runs(traffic, link, rounds_per_step, branches)
    share = lambda c: sum(share for run, share in runs if id(c) in run)
    timed = tuple(_timed(c, link, share(c)) for c in traffic.collectives)
    of = lambda run: [t for t in timed if id(t.collective) in run]
    transfers = sum(share * _transfers(of(run)) for run, share in runs)
    return Prediction(timed, transfers, **seconds, background=background)


def _timed(c: Collective, link: Links, share: float = 1.0) -> Timed:
    """The collective on the link that takes longest."""
    hops = HOPS[c.op](c.workers) * c.times
    each = [
        Timed(c, hops * k.latency, k.transfer_seconds(c.sent_bytes), share, k.burst_seconds)
        for k in links_of(link, c.axes)
    ]
    return max(each, key=lambda t: t.seconds)


def _transfers(run: list[Timed]) -> float:
    """Seconds that the bytes of one step take: of them all, one burst passes at once."""
    burst = max((t.burst_seconds for t in run), default=0.0)
    return max(0.0, sum(t.transfer_seconds for t in run) - burst)


def bends(traffic: Traffic, link: Links, own: Link) -> list[float]:
    """Bandwidths of a link below which it holds up a collective, above which another link does.

    Args:
      traffic: what the step sends.
      link: the links of all axes, of which the one in question is infinitely fast.
      own: the one in question.
    """
    found = []
    for c in traffic.collectives:
        alone = _timed(c, own)
        spare = _timed(c, link).seconds - alone.latency_seconds
        if spare > 0 and alone.transfer_seconds:
            found.append(own.bandwidth * alone.transfer_seconds / spare)
    return found


def _runs(traffic, link, rounds_per_step, branches) -> list[tuple[set[int], float]]:
    """The kinds of steps: which collectives each runs (their ids), and its share of the steps."""
    if branches is not None:
        shares = branches.values()
        if not (all(v >= 0 for v in shares) and abs(sum(shares) - 1) <= 1e-6):
            raise ValueError(f"predict: the shares of branches must sum to 1, got {branches}")
        return [({id(c) for c in traffic.during(b)}, share) for b, share in branches.items()]
    if not 0 <= rounds_per_step <= 1:
        raise ValueError(f"predict: rounds_per_step must be in [0, 1], got {rounds_per_step}")
    cost = lambda c: _timed(c, link).seconds
    dear, cheap = ({id(c) for c in extreme(traffic.collectives, cost, f)} for f in (max, min))
    return [(dear, rounds_per_step), (cheap, 1 - rounds_per_step)]
