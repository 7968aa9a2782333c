"""Replicas with other bits are found, and named, before anything is saved."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcomm
from experiments import cluster
from jaxcomm.training import consistency, distributed
from jaxcomm.training.checkpoint import Checkpointer
from jaxcomm.training.consistency import DivergenceError, ReplicaCheck, checksum
from jaxcomm.training.loop import train_loop
from jaxcomm.training.metrics import MetricsLogger
from tests.common import AXIS, batch, loss_fn, mesh, tree

AUTO = (AxisType.Auto,)
WRONG = 4  # after this step


def corrupted(x, device: int, word=1):
    """The replicated array with one bit flipped in one device's copy."""
    copies = []
    for shard in x.addressable_shards:
        data = np.array(shard.data).reshape(-1)
        if shard.device.id == device:
            data.view(np.uint8)[0] ^= word
        copies.append(jax.device_put(data.reshape(x.shape), shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, copies)


def make(sync=None, codec=jaxcomm.sign(), **way):
    middle = jaxcomm.error_feedback(codec, AXIS)
    tx = optax.adam(0.02) if sync else optax.chain(middle, optax.adam(0.02))
    return jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, sync=sync, **way)


def test_a_wrong_copy_is_named():
    step, check = make(), ReplicaCheck()
    state, _ = step(step.init(tree(jnp.bfloat16), jax.random.key(0)), batch(0))
    check(state)
    adam = state.opt_state[1][0]
    wrong = state._replace(params={**state.params, "w": corrupted(state.params["w"], 5)})
    with pytest.raises(
        DivergenceError, match=r"step 1 .*: worker 5 of 8 holds .*\.params\['w'\] than"
    ):
        check(wrong)
    two = corrupted(corrupted(adam.count, 2), 3, word=2)
    moments = (adam._replace(count=two), *state.opt_state[1][1:])
    wrong = wrong._replace(opt_state=(state.opt_state[0], moments))
    with pytest.raises(DivergenceError, match=r"worker 5 .*\['w'\] and 1 more leaves than"):
        check(wrong)
    wrong = wrong._replace(params=state.params)
    with pytest.raises(DivergenceError, match=r"worker 2, worker 3 of 8 hold .*\[0\]\.count than"):
        check(wrong)
    # a per-worker leaf may differ, and does
    assert np.ptp(np.asarray(state.opt_state[0].error["w"]), axis=0).any()


@pytest.mark.parametrize("way", ["simulate", "devices"])
def test_parameters_that_met_must_be_equal(way):
    way = {"simulate": 4} if way == "simulate" else {"mesh": mesh(4)}
    step, check = make(jaxcomm.local_sgd(AXIS, 2), **way), ReplicaCheck()
    state = step.init(tree(), jax.random.key(0))
    for i in range(2):
        state, _ = step(state, batch(i))
        check(state, met=i == 1)
    apart, _ = step(jax.tree.map(jnp.copy, state), batch(2))
    check(apart)
    with pytest.raises(DivergenceError, match=r"after step 3 .* 4 hold other bits of \.params"):
        check(apart, met=True)


@pytest.mark.parametrize("rule", ["streaming", "eager"])
def test_rules_whose_replicas_do_not_meet_at_once_are_left_alone(rule):
    streaming = rule == "streaming"
    rule = jaxcomm.streaming_diloco(AXIS, 4, 2) if streaming else jaxcomm.eager_diloco(AXIS, 2)
    step = make(rule, simulate=4)
    state = step.init(tree(), jax.random.key(0))
    for i in range(2):
        state, _ = step(state, batch(i))
    ReplicaCheck()(state, met=True)
    assert any(np.ptp(np.asarray(x), axis=0).any() for x in jax.tree.leaves(state.params))


def test_the_checksum_sees_every_bit_and_every_place():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    base, run = int(checksum(jnp.asarray(x))), jax.jit(checksum)
    seen = {base}
    for i in range(12):
        for bit in range(32):
            y = x.copy()
            y.view(np.uint32).reshape(-1)[i] ^= np.uint32(1 << bit)
            seen.add(int(run(y)))
    assert len(seen) == 1 + 12 * 32
    assert int(run(np.roll(x, 1))) != base
    nothing = {int(checksum(jnp.full(5, v, x.dtype))) for v in (0.0, -0.0, jnp.nan)}
    assert len(nothing) == 3
    for dtype in (jnp.bool_, jnp.uint8, jnp.bfloat16, jnp.float16, jnp.int32):
        ones, other = jnp.ones(5, dtype), jnp.ones(5, dtype).at[3].set(jnp.zeros((), dtype))
        assert int(checksum(ones)) != int(checksum(other))


def test_few_bytes_travel():
    """One word a worker, named in the program."""
    placed = jax.jit(
        jax.shard_map(
            lambda x: consistency._exchange(AXIS, x, []),
            mesh=mesh(4),
            in_specs=P(AXIS),
            out_specs=(P(), P(AXIS)),
        )
    )
    x = jax.device_put(jnp.zeros((4, 100)), NamedSharding(mesh(4), P(AXIS)))
    text = placed.lower([x]).as_text(debug_info=True)
    assert "jaxcomm.wire.checksum" in text
    assert "tensor<1xui32>" in text or "tensor<ui32>" in text


class Corrupting:
    """A step after which one process's copy has a wrong bit, at one step."""

    def __init__(self, step):
        self._step, self.places = step, step.places

    def __getattr__(self, name):
        return getattr(self._step, name)

    def __call__(self, state, data):
        state, metrics = self._step(state, data)
        if int(state.step) == WRONG:
            last = jax.devices()[-1].id  # of the last process
            state = state._replace(params={**state.params, "w": corrupted(state.params["w"], last)})
        return state, metrics


class Data:
    """Batches by their number; `rows` of them are this process's."""

    def __init__(self, mine: slice):
        self.i, self.mine = 0, mine

    def __next__(self):
        self.i += 1
        return jax.tree.map(lambda x: x[self.mine], batch(self.i))

    def get_state(self):
        return {"i": self.i}

    def set_state(self, state):
        self.i = state["i"]


def train(folder: Path, step, check_every: int) -> None:
    """Saves after every second step."""
    share, rank = 16 // jax.process_count(), jax.process_index()
    state = step.init(tree(), jax.random.key(0))
    with (
        Checkpointer(folder / "checkpoints", workers=step.workers.count) as checkpointer,
        MetricsLogger(str(folder), total_steps=8, is_main=rank == 0) as logger,
    ):
        train_loop(
            Corrupting(step),
            state,
            Data(slice(rank * share, (rank + 1) * share)),
            steps=8,
            logger=logger,
            checkpointer=checkpointer,
            checkpoint_every=2,
            check_every=check_every,
        )


@pytest.mark.parametrize("check_every", [2, 5])
def test_the_loop_stops_before_it_saves(check_every, tmp_path):
    """At its own steps, and before every save."""
    with pytest.raises(DivergenceError, match=r"after step 4 .*worker 3 of 4"):
        train(tmp_path, make(mesh=Mesh(jax.devices()[-4:], (AXIS,), axis_types=AUTO)), check_every)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.steps() == [2]


def test_two_processes_both_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    job = cluster.Job(("-m", "tests.test_consistency", str(tmp_path)), 2, timeout=200)
    report = cluster.launch(job)
    assert report.outcome.exit_code == 0, report.outcome
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "after step 4 the replicas differ" in said
        # of two nobody is the majority: the first counts as right
        assert "worker 1 (process 1) of 2 holds other bits of .params['w'] than the" in said
    names = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert names == ["2"]


def main(folder: Path) -> None:
    """One process of the job."""
    jax.config.update("jax_num_cpu_devices", 1)
    assert distributed.initialize()
    step = make(mesh=Mesh(jax.devices(), (AXIS,), axis_types=AUTO))
    try:
        train(folder, step, 100)  # so that only a save checks
    except DivergenceError as error:
        (folder / f"{jax.process_index()}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
