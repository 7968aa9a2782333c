"""Joins this process to the others of a job: explicit, by environment, or as JAX detects it.

`experiments.cluster` sets the three environment variables; SLURM, Open MPI, Kubernetes (indexed
jobs) and TPU pods are recognised by JAX itself.
"""

import atexit
import errno
import itertools
import logging
import os
import socket
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as _distributed  # JAX has no public key-value store
from jax._src.clusters import ClusterEnv  # JAX has no public name for "is there a cluster?"
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

COORDINATOR = "JAXCOMM_COORDINATOR"
PROCESSES = "JAXCOMM_PROCESSES"
PROCESS_ID = "JAXCOMM_PROCESS_ID"
_TALKS = itertools.count()


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
      OSError: this is process 0, and somebody listens at its address already (where JAX has
        detected the cluster that is not looked at, and JAX crashes).

    Example:
      >>> import jaxcomm.training.distributed as distributed
      >>> distributed.initialize()  # a process on its own
      False
    """
    if jax.distributed.is_initialized():
        return True
    job = explicit(coordinator, processes, process_id)
    if job is None and not _cluster_detected():
        return False
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if job is not None:  # nothing of what a surrounding cluster says may be mixed in
        options = {"cluster_detection_method": "deactivate", **options}
        options.update(zip(("coordinator_address", "num_processes", "process_id"), job))
        if job[2] == 0:
            _check_free(job[0], options.get("coordinator_bind_address"))
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


def count() -> int:
    """Processes of this process's job, which needs no device; 1 on its own."""
    return _distributed.global_state.num_processes


def tell_all(text: str, seconds: float) -> list[str]:
    """What each process of the job says, by rank; all call it together. It needs no device.

    Raises:
      TimeoutError: somebody has not come within so many seconds; the sentence says who.
    """
    if count() == 1:
        return [text]
    key, begin = f"jaxcomm/talk/{next(_TALKS)}/", time.monotonic()
    client().key_value_set(f"{key}{rank()}", text)
    failed = None
    try:
        client().wait_at_barrier(key, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        failed = error
    said = {int(name.rpartition("/")[2]): text for name, text in client().key_value_dir_get(key)}
    if failed is None:
        return [said[i] for i in range(count())]
    if missing := sorted(set(range(count())) - said.keys()):
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        waited = time.monotonic() - begin
        raise TimeoutError(f"{who} did not come to the others within {waited:.1f} s") from failed
    raise failed


def connect(devices: list[Any]) -> None:
    """Opens the connections among these devices; all processes that have some call it together.

    gloo gives them 30 s to come to the first collective of a set of devices, and no limit later.
    """
    mesh = Mesh(devices, ("devices",), axis_types=(AxisType.Auto,))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    ones = jax.make_array_from_callback(
        (len(devices),), place("devices"), lambda index: np.ones(len(devices), np.float32)[index]
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=place())(ones))


def explicit(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> tuple[str, int, int] | None:
    """The three values from the arguments or the environment; None if there are none.

    Raises:
      ValueError: only some of the three are given, or one makes no sense.
    """
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
    number, index = _integer("processes", values), _integer("process_id", values)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator must be host:port, a port up to 65535, got {address!r}")
    if number < 1:
        raise ValueError(f"processes must be at least 1, got {number}")
    if not 0 <= index < number:
        raise ValueError(f"process_id must be in [0, processes), got {index} of {number}")
    return address, number, index


def _integer(name: str, values) -> int:
    try:
        return int(values[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {values[name]!r}") from None


def _check_free(coordinator: str, bind_address: str | None) -> None:
    """Raises an OSError where JAX's service would crash: somebody else listens there."""
    port = coordinator.rpartition(":")[2]
    bound = bind_address or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f"[::]:{port}"
    host, _, port = bound.rpartition(":")
    host = None if host == "[::]" else host.strip("[]")  # None: every address, of both families
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, *_, where in found:
        try:
            socket.create_server(where[:2], family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                text = f"coordinator: process 0 cannot listen at {bound}, which is in use"
                raise OSError(error.errno, text) from None


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
