"""Joins this process to the others of a job: explicit, by environment, or as JAX detects it.

`experiments.cluster` sets the three environment variables; SLURM, Open MPI, Kubernetes (indexed
jobs) and TPU pods are recognised by JAX itself.
"""

import atexit
import logging
import os
import sys
from typing import Any

import jax
from jax._src import distributed as _distributed  # JAX has no public key-value store
from jax._src.clusters import ClusterEnv  # JAX has no public name for "is there a cluster?"

COORDINATOR = "JAXCOMM_COORDINATOR"
PROCESSES = "JAXCOMM_PROCESSES"
PROCESS_ID = "JAXCOMM_PROCESS_ID"


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    **options,
) -> bool:
    """Connects this process to its job; call it before anything that touches a device.

    The arguments win over the environment variables JAXCOMM_COORDINATOR, JAXCOMM_PROCESSES and
    JAXCOMM_PROCESS_ID, and those over the cluster that JAX detects. Without any of them nothing
    happens, so that every program may call it. CPU devices communicate over gloo.

    A process that ends by an uncaught exception does not wait for the others to end as well:
    JAX's own shutdown would, for five minutes, while they wait for it in a collective.

    Args:
      coordinator: `host:port` of process 0.
      processes: how many processes the job has.
      process_id: which one this is, from 0.
      **options: passed on to `jax.distributed.initialize`.

    Returns:
      True if this process is part of a job now.

    Raises:
      ValueError: only some of the three are given, or one makes no sense.

    Example:
      >>> import jaxcomm.training.distributed as distributed
      >>> distributed.initialize()  # a process on its own
      False
    """
    if jax.distributed.is_initialized():
        return True
    explicit = _explicit(coordinator, processes, process_id)
    if explicit is None and not _cluster_detected():
        return False
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if explicit is not None:  # nothing of what a surrounding cluster says may be mixed in
        options = {"cluster_detection_method": "deactivate", **options}
        options.update(zip(("coordinator_address", "num_processes", "process_id"), explicit))
    jax.distributed.initialize(**options)
    _leave_at_once_on_failure()
    return True


def client() -> Any:
    """The connection to the job's coordination service.

    Raises:
      RuntimeError: this process is not part of a job.
    """
    found = _distributed.global_state.client
    if found is None:
        raise RuntimeError("this process is not part of a job: call initialize() first")
    return found


def rank() -> int:
    """This process's number in its job, which needs no device; 0 on its own."""
    return _distributed.global_state.process_id


def _explicit(coordinator, processes, process_id) -> tuple[str, int, int] | None:
    """The three values from the arguments or the environment; None if there are none."""
    given = {
        "coordinator": (coordinator, COORDINATOR),
        "processes": (processes, PROCESSES),
        "process_id": (process_id, PROCESS_ID),
    }
    values = {
        name: os.environ.get(variable) or None if value is None else value
        for name, (value, variable) in given.items()
    }
    missing = [f"{name} ({given[name][1]})" for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise ValueError(
            "coordinator, processes and process_id go together, as arguments or as environment "
            f"variables; missing: {', '.join(missing)}"
        )
    address = str(values["coordinator"])
    count, index = _integer("processes", values), _integer("process_id", values)
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator must be host:port, got {address!r}")
    if not 0 <= index < count:
        raise ValueError(f"process_id must be in [0, processes), got {index} of {count}")
    return address, count, index


def _integer(name: str, values) -> int:
    try:
        return int(values[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {values[name]!r}") from None


def _cluster_detected() -> bool:
    """Whether JAX's detection would find the environment of a cluster."""
    lonely_pod = "JOB_COMPLETION_INDEX" not in os.environ  # not one of an indexed job's
    return any(
        cluster.is_env_present()
        for cluster in ClusterEnv._cluster_types
        if not cluster.opt_in_only_method and not (cluster.__name__ == "K8sCluster" and lonely_pod)
    )


def _leave_at_once_on_failure() -> None:
    """After an uncaught exception, end before JAX's exit handler waits for the other processes.

    Exit handlers registered later than this one (writers, checkpoints) still run before it.
    """
    report, failed = sys.excepthook, []

    def note(kind, value, trace):
        failed.append(kind)
        report(kind, value, trace)

    def leave():
        if failed:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    sys.excepthook = note
    atexit.register(leave)
