"""Measurements, by name.

    python -m experiments.bench wire  [--workdir=DIR]      bytes and times on throttled hosts
    python -m experiments.bench codec [SIZE ...]           encode and decode throughput
    python -m experiments.bench peers [--quick]            beside PyTorch DDP and plain JAX
    python -m experiments.bench faults [--count=100]       processes that die, get stuck, lose disks
    python -m experiments.bench overlap [--workdir=DIR]    do transfers hide behind computation
    python -m experiments.bench scale [--workdir=DIR]      steps as the work grows, beside `plan`

Each is a module `experiments.bench_<name>` with `main(arguments)` and, for flags of its own,
`define_flags()`.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

from absl import app

from experiments import command_line
from experiments.netns import NetworkError

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
    if not names and {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    try:
        module = find(names[0] if names else "")
        getattr(module, "define_flags", lambda: None)()
        measure = lambda rest: module.main(rest[2:])
        app.run(measure, argv=argv, flags_parser=command_line.parse_flags)
    except (ValueError, OSError, NetworkError) as error:
        text = command_line.sentence(error)
        if text is None:
            raise
        print(f"bench: {text}", file=sys.stderr)
        return command_line.exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
