"""What the configs share: every field, with its default.

The processes of a job must have the same values, but for local_checkpoints, pace, stuck_seconds and
standstill_seconds, which are of a host.

tx, sync     Python expressions over jaxcomm's public names and optax.*, with axis_name,
             learning_rate, steps, warmup_steps and workers in scope
workers      how many; 0 for as many as there are devices in the job, which may be other ones when
             it is started again with resize=True
mode         devices (shard_map); in one process also simulate (vmap on one device) or pmap
local_checkpoints
             a directory on every host's own disk that gets each checkpoint as well
resize       go on from a checkpoint of another number of workers (jaxcomm.resize_workers)
check_every  steps between two comparisons of the replicas' bits, also before a save; 0 for none
on_failure   what a job does that loses a process: stop; restart (it ends, keeps its compiled
             programs in the workdir, and `experiments.cluster --restarts=K` starts it again); or
             continue with those that are left, see `jaxcomm.training.elastic`
snapshot_every
             with continue: steps between two copies of the state to host memory
stuck_seconds, standstill_seconds
             a process without a sign of life, or a job without a step, for so long ends; 0: never
             (the first counts from the start of the process, the second from the first step's)
             (with continue the others leave such a process, after 11 s at the earliest)
monitor      at every line of metrics of several processes, who is slower than the others: '' nobody
             looks; processor compares the time of a small fixed program; step that of a process's
             part of the step without communication (compiled once more, and run three times a line)
pace         the bandwidth of each host's link, such as 10mbit: TCP then sends no faster, and loses
             fewer packets where the queue of a router is short (Linux)
background   make the transfers of an overlapped sync rule, or without a rule the collectives of
             every step (one CPU device a process), beside the computation
"""

import ml_collections

from experiments.tasks import task_config


def base(task: str, argument: str | None) -> ml_collections.ConfigDict:
    """A complete config for a task; `argument` is '' or 'smoke' (a few seconds)."""
    if argument not in (None, "", "smoke"):
        raise ValueError(f"the only config argument is 'smoke', got {argument!r}")
    smoke = argument == "smoke"
    config = ml_collections.ConfigDict()
    config.task = task_config(task, "smoke" if smoke else "default")
    config.seed = 0
    config.workers = 4 if smoke else 8
    config.mode = "devices"
    config.background = False
    config.axis_name = "workers"
    config.steps = 20 if smoke else 1000
    config.batch_size = 64 if smoke else 128  # global, over all workers
    config.learning_rate = ml_collections.ConfigDict(
        {"peak": 2e-3, "init": 0.0, "end": 0.0, "warmup_steps": 2 if smoke else 20}
    )
    config.learning_rate.decay = "cosine"
    config.tx = ""
    config.sync = ""
    config.log_every = 5 if smoke else 50
    config.evaluate_every = 0 if smoke else 250
    config.checkpoint_every = 10 if smoke else 250
    config.keep = 3
    config.resize = False
    config.local_checkpoints = ""
    config.check_every = 100
    config.on_failure = "stop"
    config.snapshot_every = 1
    config.stuck_seconds = 60.0
    config.standstill_seconds = 1800.0
    config.monitor = ""
    config.pace = ""
    return config


def digits(argument: str | None = None) -> ml_collections.ConfigDict:
    """Handwritten digits, a small convolutional network; 8 workers with 16 images each."""
    return base("digits", argument)


def lm(argument: str | None = None) -> ml_collections.ConfigDict:
    """Byte-level language model on the standard library's source; 8 workers."""
    config = base("lm", argument)
    smoke = argument == "smoke"
    config.learning_rate.peak = 5e-3 if smoke else 3e-3
    config.learning_rate.warmup_steps = 10 if smoke else 20
    config.steps = 100 if smoke else 600
    return config
