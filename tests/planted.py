"""The main binary with something planted in one of its processes (a helper of tests).

    python -m tests.planted slow,dies --config=FILE --workdir=DIR

slow  process 1's part of a step takes SLEEP seconds longer, and is measured so
dies  process 2 is killed when it has done step DEATH, in every attempt
WORKDIR/begin<attempt> is the first step that process 0 has logged.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from experiments import cluster
from jaxcomm.training import straggler_monitor
from jaxcomm.training.metrics import MetricsLogger

DEATH, SLEEP = 8, 0.3


def main(part: str, arguments: list[str]) -> None:
    """One process of a job: the main binary, with what is planted in it."""
    rank, attempt = int(os.environ[cluster.PROCESS_ID]), os.environ[cluster.ATTEMPT]
    (workdir,) = (Path(word.split("=")[1]) for word in arguments if word.startswith("--workdir"))
    begin, log, alone = workdir / f"begin{attempt}", MetricsLogger.log, straggler_monitor.step_alone

    def logged(self, step, values):
        if rank == 2 and "dies" in part and step == DEATH:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and not begin.exists():
            begin.write_text(str(step))
        if rank == 1 and "slow" in part:
            time.sleep(SLEEP)
        log(self, step, values)

    def slower(*arguments):
        seconds = alone(*arguments)
        return lambda: seconds() + SLEEP * (rank == 1)

    MetricsLogger.log = logged
    if "slow" in part:
        straggler_monitor.step_alone = slower
    sys.argv = ["experiments.train", *arguments]
    runpy.run_module("experiments.train", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
