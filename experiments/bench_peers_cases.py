"""What `experiments.bench peers` compares: models, methods, hosts and links.

Two models of one kind (`experiments.tasks.transformer`, on bytes). The `large` one, of about 5M
parameters, is for what a step exposes; the `small` one is also trained, for loss. Batches are tiny,
since all hosts share this machine's cores: a step must not be all computation. Every method has
the same initial parameters, batches, AdamW and learning rates. A host's batch is a method's step,
or several: who meets rarely may step on each part of it (Lin et al., "Don't Use Large Mini-Batches,
Use Local SGD", 2018), which costs a synchronous method as many exchanges.
"""

import dataclasses
import itertools
from typing import Any

import ml_collections

from experiments.config import Config
from experiments.tasks import task_config

RAW = ""  # the rate of a link without a bucket
RATES = (RAW, "1gbit", "100mbit", "10mbit")
HOSTS = (2, 4)
DENSE = "DDP float32"  # what others are compared with
PERIOD = 32  # local steps of a round, of every method with rounds of one length
SEEDS = 3  # of the comparison whose outcome a single one would leave to chance
AXIS = "workers"
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-4}

WINDOWS = {"large": 1, "small": 2, "tiny": 2}  # of a host's batch, of 64 bytes together
_SIZES: dict[str, dict[str, Any]] = {
    "large": {"num_layers": 6, "width": 256, "num_heads": 4},
    "small": {"num_layers": 4, "width": 192, "num_heads": 4},
    "tiny": {"num_layers": 1, "width": 32, "num_heads": 2},  # for tests
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row.

    Args:
      name: as printed.
      library: 'jaxcomm', 'jax' (without jaxcomm) or 'torch'.
      tx: of jaxcomm, as in a config; dense AdamW if empty.
      sync: of jaxcomm, as in a config.
      hook: of PyTorch: 'float32', 'fp16', 'post_local' or 'rank R'.
      rounds: steps in which all kinds of a local method's steps occur; 0 where workers meet in
        every step.
      key: belongs to the quick comparison.
      rate: times the learning rate of the others.
      background: of jaxcomm: collectives travel beside the computation.
      seeds: trainings, each of another initialization and order of batches.
      parts: of a host's batch, a step on each.
    """

    name: str
    library: str
    tx: str = ""
    sync: str = ""
    hook: str = ""
    rounds: int = 0
    key: bool = True
    rate: float = 1.0
    background: bool = False
    seeds: int = 1
    parts: int = 1


def _compressed(name: str, transform: str, key: bool = True, background=False) -> Method:
    chain = f"optax.chain({transform}, optax.adamw(learning_rate))"
    return Method(name, "jaxcomm", chain, key=key, background=background)


def _local(name: str, sync: str, rounds: int, **options) -> Method:
    return Method(name, "jaxcomm", "optax.adamw(learning_rate)", sync, rounds=rounds, **options)


_EF = "error_feedback({}, axis_name{})"
_TWO_PHASE = ", exchange='two_phase'"
_TWO_BITS = "compose(block_top_k(0.005), quantize(4))"
_BITS = f"factors=quantize({{}}){_TWO_PHASE}"
_QSR = "qsr(learning_rate, alpha=0.012, h_base=8, warmup_steps=warmup_steps)"
_SHORT = f"periodic({_EF.format('ternary(1024)', _TWO_PHASE)}, 7, total_steps=steps)"

METHODS = (  # in turn: neither library has the quieter half of the day
    Method(DENSE, "torch", hook="float32", seeds=SEEDS),
    _compressed("jaxcomm dense", "average(axis_name, bucket_bytes=2_000_000)", background=True),
    Method("plain JAX dense", "jax"),
    Method("DDP fp16 hook", "torch", hook="fp16"),
    _compressed("jaxcomm sign, two-phase", _EF.format("sign()", _TWO_PHASE)),
    Method("DDP PowerSGD r1", "torch", hook="rank 1"),
    _compressed("jaxcomm PowerSGD r4", "power_sgd(4, axis_name)"),
    _compressed("jaxcomm PowerSGD r4, 8 bits", f"power_sgd(4, axis_name, {_BITS.format(8)})"),
    _compressed("jaxcomm PowerSGD r4, 4 bits", f"power_sgd(4, axis_name, {_BITS.format(4)})"),
    Method("DDP PowerSGD r2", "torch", hook="rank 2", key=False),
    _compressed("jaxcomm EF21 top 1 %", "ef21(block_top_k(0.01), axis_name)", key=False),
    Method("DDP PowerSGD r4", "torch", hook="rank 4"),
    _compressed("jaxcomm top 0.5 %, 4 bits", _EF.format(_TWO_BITS, "")),
    Method("DDP post-local SGD", "torch", hook="post_local", rounds=PERIOD + 1),
    _local("jaxcomm QSR", f"local_sgd(axis_name, {_QSR}, total_steps=steps)", 40),
    _local("jaxcomm DiLoCo", f"diloco(axis_name, {PERIOD}, total_steps=steps)", PERIOD + 1),
    _local("jaxcomm local, ternary, half batches", _SHORT, 14, seeds=SEEDS, parts=2),
    _local(
        "jaxcomm streaming fp4",
        f"streaming_diloco(axis_name, {PERIOD}, 4, total_steps=steps)",
        PERIOD + 1,
    ),
)
BY_NAME = {method.name: method for method in METHODS}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: `time` of a step on a link, or `loss` along a whole training.

    The trajectory does not depend on the link, so that losses are measured without a bucket.
    """

    kind: str
    size: str
    method: str
    hosts: int
    rate: str


def config(size: str, hosts: int, steps: int, seed: int = 0) -> Config:
    """The config of a training, with the fields that `experiments.train` reads."""
    result: Config = ml_collections.ConfigDict()
    task: Config = task_config("lm")
    windows = WINDOWS[size]
    task.update({"seq_len": 64 // windows, "validation_windows": 256, "max_bytes": 4_000_000})
    task.model.update(_SIZES[size])
    result.task = task
    result.seed, result.workers, result.steps = seed, hosts, steps
    result.batch_size = windows * hosts
    warmup = max(1, steps // 10)
    result.learning_rate = ml_collections.ConfigDict(
        {"peak": 2e-3, "init": 0.0, "end": 0.0, "warmup_steps": warmup, "decay": "cosine"}
    )
    return result


def cases(
    hosts: tuple[int, ...], rates: tuple[str, ...], quick: bool, torch: bool = True
) -> list[Case]:
    """Everything there is to measure; meetings of local methods are timed on the small model."""
    chosen = [m for m in METHODS if (m.key or not quick) and (torch or m.library != "torch")]
    found = []
    for n, method in itertools.product(hosts, chosen):
        found.append(Case("loss", "small", method.name, n, RAW))
        sizes = ("small",) if method.rounds else ("small", "large")
        found += [Case("time", size, method.name, n, rate) for size in sizes for rate in rates]
    return found
