"""Devices of a run: how many CPU devices a process makes, and which hold a worker."""

import os
from typing import Any

import jax

from experiments import job
from experiments.config import Config
from jaxcomm.training._sockets import Connections
from jaxcomm.training.distributed import connect


def setup_devices(config: Config) -> None:
    """As many CPU devices as this process has workers, before JAX starts.

    Twice as many where a sync rule's transfers run in the background: half of them compute.
    """
    processes = job.count()
    if config.mode in ("devices", "pmap") and "JAX_NUM_CPU_DEVICES" not in os.environ:
        share = max(1, config.workers // processes) * (2 if _two_each(config) else 1)
        jax.config.update("jax_num_cpu_devices", share)


def with_workers(config: Config) -> Config:
    """The config with the number of workers: for 0 that of the devices in the job.

    Raises:
      ValueError: less than 0, 0 simulated workers, or a batch that the workers do not divide.
    """
    if config.workers < 0:
        raise ValueError(f"config.workers must not be negative, got {config.workers}")
    if not config.workers:
        if config.mode == "simulate":
            raise ValueError("config.workers=0 counts devices: simulated workers need a number")
        count = jax.device_count()
        if _two_each(config) and jax.default_backend() == "cpu":
            count //= 2  # the others make the transfers
        config = config.copy_and_resolve_references()
        config.workers = count
    if config.batch_size % config.workers:
        raise ValueError(
            f"config.batch_size={config.batch_size} is not divisible by "
            f"config.workers={config.workers}"
        )
    return config


def connect_devices(config: Config) -> Connections:
    """Opens the connections of a job before its processes read data and compile, some for longer.

    Between all devices, between those with a worker, and between those that make its transfers.
    """
    workers = worker_devices(config)  # gloo listens from here on: that is no connection
    apart = [device for device in jax.devices() if device not in workers]
    connections = Connections()
    if jax.process_count() > 1:
        with connections.watching():
            for devices in (jax.devices(), workers, apart):
                if any(d.process_index == jax.process_index() for d in devices):
                    connect(devices)
    return connections


def _two_each(config: Config) -> bool:
    """Whether a worker has a second device for its transfers."""
    return bool(config.background and config.sync)


def check_devices(config: Config) -> None:
    """Raises a ValueError if the workers do not fit the devices of the job.

    Processes have as many workers each, and as many devices: JAX gathers from no others.
    """
    owners = [d.process_index for d in jax.devices()]
    counts = [owners.count(i) for i in range(jax.process_count())]
    if len(set(counts)) > 1 or len(worker_devices(config)) != config.workers:
        raise ValueError(
            f"config.mode={config.mode!r} with config.workers={config.workers} does not fit "
            f"{' + '.join(map(str, counts))} devices in {len(counts)} processes (each must have as "
            "many devices, and workers, as the others); "
            "one process with --config.mode=simulate runs any number of workers"
        )


def worker_mesh(config: Config, devices: list[Any] | None) -> jax.sharding.Mesh:
    """The axis of workers, over these devices or `worker_devices`."""
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.sharding.Mesh(
        devices or worker_devices(config), (config.axis_name,), axis_types=axis_types
    )


def worker_devices(config: Config) -> list[Any]:
    """The same number from every process."""
    share = config.workers // jax.process_count()
    return [
        d
        for i in range(jax.process_count())
        for d in [d for d in jax.devices() if d.process_index == i][:share]
    ]
