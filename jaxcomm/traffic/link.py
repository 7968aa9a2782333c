"""A link: bandwidth in bits a second, latency in seconds.

An axis is a set of workers joined by one link; a hierarchical job has one for each axis, say
`{"chips": Link.parse("400gbit@2us"), "hosts": Link.parse("10gbit@50us")}`. A collective over
several axes at once is held up by the slowest of their links.
"""

import dataclasses
import re
from collections.abc import Mapping

_PREFIX = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(bit|bps|bit/s|b/s)", re.IGNORECASE)
_PER_SECOND = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|ms|us|ns)")

ETHERNET = 1.055  # bytes on the wire a byte sent: frames of 1,514 bytes with TCP (`bench wire`)


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the workers of an axis; each sends and receives at this rate at the same time.

    Attributes:
      bandwidth: bits a second that a host sends.
      latency: seconds from sending a message to having it, beside the time its bytes take.
      share: workers that send over one such link at the same time (those of one host).
      overhead: bytes on the wire for each byte of a message (`ETHERNET`: headers of its frames).
      burst: bytes that pass at once after a silence, before the rate holds (a token bucket's).

    Raises:
      ValueError: a bandwidth that is not positive, a negative latency or burst, a share or overhead
        below 1.
    """

    bandwidth: float
    latency: float = 0.0
    share: int = 1
    overhead: float = 1.0
    burst: float = 0.0

    def __post_init__(self):
        if not self.bandwidth > 0:
            raise ValueError(f"Link: bandwidth must be positive, got {self.bandwidth}")
        for name in ("latency", "burst"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Link: {name} must not be negative, got {getattr(self, name)}")
        if not (self.share >= 1 and self.overhead >= 1):
            raise ValueError(
                "Link: share and overhead must be at least 1, got "
                f"share={self.share}, overhead={self.overhead}"
            )

    @classmethod
    def parse(cls, text: str, **options) -> "Link":
        """A link from '100mbit', '1gbit', '400gbit@2us' (with the latency behind an @).

        As for `tc`, bit is bits a second and bps bytes a second; b/s is bits, B/s bytes. Prefixes
        are powers of 1,000.

        Args:
          text: bandwidth, and perhaps the latency.
          **options: further attributes; what the text says wins.

        Raises:
          ValueError: not a bandwidth.

        Example:
          >>> Link.parse("100mbit@50us")
          Link(bandwidth=100000000.0, latency=5e-05, share=1, overhead=1.0, burst=0.0)
        """
        rate, _, delay = text.strip().partition("@") if isinstance(text, str) else ("", "", "")
        match = _BANDWIDTH.fullmatch(rate.strip())
        if not match:
            raise ValueError(
                f"a link is a bandwidth such as 100mbit, 1gbit or 400gbit@2us, got {text!r}"
            )
        number, prefix, unit = match.groups()
        unit_bits = 8 if unit.lower() == "bps" or unit.startswith("B/") else 1
        bandwidth = float(number) * _PREFIX[prefix.lower()] * unit_bits
        if delay:
            options["latency"] = parse_seconds(delay)
        return cls(bandwidth=bandwidth, **options)

    def transfer_seconds(self, sent_bytes: float) -> float:
        """Seconds that the bytes of one worker take, latency left out."""
        return 8 * sent_bytes * self.share * self.overhead / self.bandwidth

    @property
    def burst_seconds(self) -> float:
        """Seconds that a burst would take at the rate."""
        return 8 * self.burst / self.bandwidth

    def __str__(self) -> str:
        for prefix in reversed(_PREFIX):
            if self.bandwidth >= _PREFIX[prefix]:
                return f"{self.bandwidth / _PREFIX[prefix]:g}{prefix}bit"
        return f"{self.bandwidth:g}bit"


Links = Link | Mapping[str, Link]


def as_links(link: Links | str) -> Links:
    """The links themselves, or the one that a text describes.

    Raises:
      ValueError: not a bandwidth.
    """
    return link if isinstance(link, (Link, Mapping)) else Link.parse(link)


def parse_seconds(text: str) -> float:
    """Seconds of '50us', '1.5ms', '2s'.

    Raises:
      ValueError: not a time.
    """
    match = _TIME.fullmatch(text.strip().lower())
    if not match:
        raise ValueError(f"a time is a number with a unit such as 50us or 1.5ms, got {text!r}")
    return float(match[1]) / _PER_SECOND[match[2]]


def links_of(links: Links, axes: tuple[str, ...]) -> list[Link]:
    """The links that a collective over these axes uses; over no axis by name, all of them.

    Raises:
      ValueError: an axis without a link.
    """
    if isinstance(links, Link):
        return [links]
    for name in axes:
        if name not in links:
            raise ValueError(f"no link is given for axis {name!r}, only for {sorted(links)}")
    return [links[name] for name in axes or links]
