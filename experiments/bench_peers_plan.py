"""What `plan` says of the steps that `experiments.bench peers` measures.

Bytes are counted by tracing the step, no host is needed; computation and codec are those measured
in the same run (the step without its communication), and what hosts take for messages is the
communication of the same method on raw loopback. Links carry the headers of Ethernet frames, and
pass at once, once a step, what their bucket holds.
"""

import collections
import functools

import jax

import jaxcomm
from experiments.bench_peers_cases import BY_NAME, RAW, config
from experiments.bench_peers_jax import make_step
from experiments.bench_peers_report import Rows, alone_seconds, exposed, step_seconds
from experiments.probe import throttled_link
from experiments.tasks import make_task


@functools.cache
def traffic(method: str, size: str, hosts: int, steps: int) -> jaxcomm.Traffic:
    """The traffic of a method of jaxcomm."""
    cfg = config(size, hosts, steps)
    task = make_task(cfg)
    step = make_step(BY_NAME[method], cfg, task, simulate=hosts)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = step.abstract_state(jax.eval_shape(task.init, key), key)
    return jaxcomm.traffic(step, state, next(task.train_iterator(cfg.batch_size, cfg.seed)))


def predictions(rows: Rows, steps: int) -> dict[tuple, tuple[float, float]]:
    """(predicted, measured) seconds a step by (size, method, hosts, rate), of throttled links."""
    found = {}
    for kind, size, method, hosts, rate in rows:
        run = rows.get(("loss", "small", method, hosts, RAW))
        ours = BY_NAME[method].library == "jaxcomm"
        if kind != "time" or rate == RAW or not ours or (BY_NAME[method].rounds and run is None):
            continue
        row = rows[kind, size, method, hosts, rate]
        kinds = run["kinds"] if BY_NAME[method].rounds and run else row["kinds"]
        shares = collections.Counter(kinds)
        branches = {tuple(map(int, k)): c / len(kinds) for k, c in shares.items()}
        where = rows, method, size, hosts, rate
        raw = rows, method, size, hosts, RAW
        known, parts = (kind, size, method, hosts, RAW) in rows, BY_NAME[method].parts
        predicted = jaxcomm.predict(
            traffic(method, size, hosts, steps),
            throttled_link(rate),
            compute_seconds=row["local"],
            codec_seconds=max(alone_seconds(*where) / parts - row["local"], 0.0),
            host_seconds=max(exposed(*raw), 0.0) / parts if known else 0.0,
            branches=branches,
            background=BY_NAME[method].background,
        )
        found[size, method, hosts, rate] = parts * predicted.step_seconds, step_seconds(*where)
    return found
