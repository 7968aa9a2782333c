"""A checkpoint of four simulated workers goes on in two processes, and then with three workers."""

import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import jaxcomm
from experiments import cluster
from jaxcomm.training import distributed
from jaxcomm.training.checkpoint import Checkpointer
from jaxcomm.training.loop import put_batch
from tests.common import AXIS, batch, host, loss_fn, same, tree

ROWS = 12


def make(**way):
    codec = jaxcomm.error_feedback(jaxcomm.sign(), AXIS, exchange="two_phase")
    rule = jaxcomm.periodic(optax.chain(codec, optax.sgd(0.7, momentum=0.9)), 2)
    step = jaxcomm.make_train_step(loss_fn, optax.adam(0.02), axis_name=AXIS, sync=rule, **way)
    return step, step.init(tree(), jax.random.key(1))


def checkpoints(folder, workers):
    return Checkpointer(folder / "checkpoints", workers=workers)


@pytest.mark.slow
def test_four_simulated_two_processes_three_simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    four, state = make(simulate=4)
    for i in range(3):
        state, _ = four(state, batch(i, ROWS))
    with checkpoints(tmp_path, 4) as checkpointer:
        checkpointer.save(3, state, data_state={"i": 3})
    job = cluster.Job(("-m", "tests.test_resize_processes", str(tmp_path)), 2, timeout=200)
    report = cluster.launch(job)
    assert report.outcome.exit_code == 0, report.outcome
    two, like_two = make(simulate=2)
    one_step, _ = two(jaxcomm.resize_workers(state, 2), batch(3, ROWS))
    with checkpoints(tmp_path, 2) as checkpointer:
        found, position, _ = checkpointer.restore(like_two)
    assert position == {"i": 4}
    for a, b in zip(*(jax.tree.leaves(host(s)) for s in (found, one_step))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    three, like = make(simulate=3)
    with checkpoints(tmp_path, 3) as checkpointer:
        state, _, _ = checkpointer.restore(like, resize=True)
    assert same(host(state), host(jaxcomm.resize_workers(found, 3)))
    _, metrics = three(state, batch(4, ROWS))
    assert np.isfinite(metrics["loss"])


def main(folder: Path) -> None:
    """One process of the job: a step from the checkpoint, and from the state in memory."""
    jax.config.update("jax_num_cpu_devices", 1)
    assert distributed.initialize()
    rank = jax.process_index()
    workers = Mesh(jax.devices(), (AXIS,), axis_types=(AxisType.Auto,))
    two, like = make(mesh=workers)
    with checkpoints(folder, 2) as checkpointer:
        state, position, _ = checkpointer.restore(like, resize=True)
        rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        data = jax.tree.map(lambda x: x[rows], batch(position["i"], ROWS))
        state, _ = two(state, put_batch(two, data))
        checkpointer.save(4, state, data_state={"i": 4})
        # in memory, of an array that no process has the whole of
        again = jaxcomm.resize_workers(jaxcomm.resize_workers(state, 3), 2)
        means = [two.consensus(s) for s in (state, again)]
        for a, b in zip(*map(jax.tree.leaves, means)):
            np.testing.assert_allclose(*(np.asarray(x.addressable_data(0)) for x in (a, b)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
