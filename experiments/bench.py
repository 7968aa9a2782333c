"""Measurements, by name.

    python -m experiments.bench wire  [--workdir=DIR]      bytes and times on throttled hosts
    python -m experiments.bench codec [SIZE ...]           encode and decode throughput
    python -m experiments.bench peers [--quick]            beside PyTorch DDP and plain JAX
    python -m experiments.bench faults [--count=100]       processes that die, get stuck, lose disks
    python -m experiments.bench overlap [--workdir=DIR]    do transfers hide behind computation

Each is a module `experiments.bench_<name>` with `main(arguments)` and, for flags of its own,
`define_flags()`.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

from absl import app

NAMES = ("wire", "codec", "faults", "overlap", "peers", "scale")


def find(name: str) -> ModuleType:
    """The module of a measurement.

    Raises:
      ValueError: there is none of that name.
    """
    module = f"experiments.bench_{name}"
    there = [n for n in NAMES if importlib.util.find_spec(f"experiments.bench_{n}")]
    if name not in there:
        raise ValueError(f"what to measure must be one of {', '.join(there)}, got {name!r}")
    return importlib.import_module(module)


def main(argv: list[str]) -> int:
    """`argv` as in sys.argv: the first argument that is no flag names the measurement."""
    names = [word for word in argv[1:] if not word.startswith("-")]
    try:
        module = find(names[0] if names else "")
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    getattr(module, "define_flags", lambda: None)()
    app.run(lambda rest: module.main(rest[2:]), argv=argv)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
