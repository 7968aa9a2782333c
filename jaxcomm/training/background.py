"""The background channel: transfers on host CPU devices while the computing devices go on.

A rule whose results are used later than they are asked for (`streaming` with a delay, `overlapped`:
eager, delayed, CO2) comes apart into what computes and what travels. Here the first runs on the
computing devices, the second on a mesh of CPU devices of the same hosts, one for each worker:

    computing devices   step t     step t+1   ...   step t+tau
                          \\ parcel                  / result
    host devices           `---- the transfer -----'

Everything is dispatched and nothing is waited for: JAX runs the programs of both meshes at the same
time, and step t+tau waits on its device for what it needs. The state is the plain rule's, with the
fields that travel on the host devices (what is in flight among them), and so are its values, to the
last bit of what XLA makes of the same operations. The last step of a training is the plain step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh

from jaxcomm.collectives import axis
from jaxcomm.sync._rule import Background, SyncRule
from jaxcomm.training.step import TrainState, TrainStep
from jaxcomm.training.workers import Place, Workers

_HORIZON = 1024  # steps that are planned at a time


class BackgroundStep(TrainStep):
    """A TrainStep whose transfers run beside the computation; see make_train_step(background=)."""

    def __init__(self, loss_fn, tx, workers: Workers, sync: SyncRule | None, donate: bool):
        super().__init__(loss_fn, tx, workers, sync, donate)
        self._parts = _parts(sync)
        self._hosts = _host_workers(workers)
        self._devices = _devices(workers, self._hosts)
        self._at = {d: i for devices in self._devices for i, d in enumerate(devices)}
        apart = SyncRule(lambda params: (), lambda params, state, step: (params, state))
        self._local = TrainStep(loss_fn, tx, workers, apart, donate)
        self._programs: dict[tuple[str, int], Any] = {}
        self._table: Timetable | None = None

    def init(self, params, key) -> TrainState:
        """As TrainStep.init; what travels is on the host devices."""
        state = super().init(params, key)
        return state._replace(sync_state=self._carry(state.sync_state, self._hosts))

    def __call__(self, state: TrainState, batch) -> tuple[TrainState, dict]:
        """As TrainStep's; returns when everything is dispatched."""
        state = self._own(state)
        self._locate(state)
        self._local.layout.types = self.layout.types._replace(sync_state=())
        self._local._update_axes = self._update_axes  # the same optimizer: it need not look again
        step = int(state.step) + 1
        if step == self._parts.total_steps:
            sync_state = self._carry(state.sync_state, self.workers)
            state, metrics = super().__call__(state._replace(sync_state=sync_state), batch)
            return state._replace(sync_state=self._carry(state.sync_state, self._hosts)), metrics
        sync_state = state.sync_state
        state, metrics = self._local(state._replace(sync_state=()), batch)
        counters, launched, arrived = self._due(sync_state, step)
        state = state._replace(step=self._known(step), sync_state=sync_state)
        if any(launched) or any(arrived):
            state = self._meet(state, launched, arrived, step)
            counters = {name: self._known(value) for name, value in counters.items()}
            state = state._replace(sync_state=state.sync_state._replace(**counters))
        branches = np.asarray(self._parts.branches(launched, arrived), np.int32)
        return state, {**metrics, "branches": branches}

    def consensus(self, state: TrainState):
        """As TrainStep's; waits for what is travelling only if the rule evaluates that."""
        assert self._sync is not None
        if self._sync.evaluated is not None and not isinstance(state.step, Tracer):
            self._locate(self._checked(state))
            sync_state = self._carry(state.sync_state, self.workers)
            state = state._replace(sync_state=sync_state)
        return super().consensus(state)

    def _known(self, number):
        """What the host knows (the number of the step): nobody waits for a device to read it."""
        return self._place(np.asarray(number, np.int32), Place.REPLICATED, self.workers)

    def _meet(self, state: TrainState, launched, arrived, step: int) -> TrainState:
        params, slots = state.params, range(self._parts.slots)
        sync_state = self._carry(state.sync_state, self._hosts)
        parcels = {p: self._leave(params, sync_state, p) for p in slots if launched[p]}
        for p in slots:
            if arrived[p]:
                params, sync_state = self._arrive(params, sync_state, p, step)
        for p, parcel in parcels.items():
            sync_state = self._travel(parcel, sync_state, p, step)
        self.workers.settle(params)
        return state._replace(params=params, sync_state=sync_state)

    def alone(self, state: TrainState, batch) -> tuple[TrainState, dict]:
        """A local step without the rule; `state.sync_state` is (). For measuring."""
        return self._local(state, batch)

    def transfers(self, state: TrainState):
        """The transfers of a round and nothing else, one after the other. For measuring."""
        self._locate(state)
        sync_state = state.sync_state
        for p in range(self._parts.slots):
            parcel = self._leave(state.params, sync_state, p)
            sync_state = self._travel(parcel, sync_state, p, int(state.step))
        return sync_state

    # The parts of a meeting.

    def _leave(self, params, sync_state, slot: int):
        def leave(params, near):
            # a copy: the next step may reuse the buffers of what it is given
            parcel = jax.tree.map(jnp.copy, self._parts.leave(params, near, slot))
            return axis.varying(parcel, self.workers.axis_name)

        places = (self.places.params, self._near(self.places.sync_state))
        run = self._program("leave", slot, self.workers, leave, places, Place.PER_WORKER)
        parcel = self.workers.settle(run(params, self._near(sync_state)))
        return self._move(parcel, Place.PER_WORKER, self._hosts)

    def _travel(self, parcel, sync_state, slot: int, step: int):
        def travel(parcel, far, step):
            return self._parts.travel(parcel, far, slot, step)

        far = self._far(self.places.sync_state)
        places = (Place.PER_WORKER, far, Place.REPLICATED)
        run = self._program("travel", slot, self._hosts, travel, places, far)
        clock = self._place(np.int32(step), Place.REPLICATED, self._hosts)
        far = self._hosts.settle(run(parcel, self._far(sync_state), clock))
        return sync_state._replace(**{name: getattr(far, name) for name in self._parts.far})

    def _arrive(self, params, sync_state, slot: int, step: int):
        def arrive(params, near, result, step):
            return self._parts.arrive(params, near, result, slot, step)

        here = (self.places.params, self._near(self.places.sync_state))
        places = (*here, Place.REPLICATED, Place.REPLICATED)
        run = self._program("arrive", slot, self.workers, arrive, places, here)
        result = self._move(self._parts.result(sync_state, slot), Place.REPLICATED, self.workers)
        params, near = run(params, self._near(sync_state), result, self._known(step))
        fields = (*self._parts.near, *self._parts.counters)
        return params, sync_state._replace(**{name: getattr(near, name) for name in fields})

    def _program(self, name: str, slot: int, workers: Workers, fn, in_places, out_places):
        if (name, slot) not in self._programs:
            self._programs[name, slot] = workers.jit(fn, in_places, out_places)
        return self._programs[name, slot]

    # Which part of the state is where.

    def _near(self, sync_state):
        return sync_state._replace(**dict.fromkeys(self._parts.far))

    def _far(self, sync_state):
        return sync_state._replace(**dict.fromkeys((*self._parts.near, *self._parts.counters)))

    def _carry(self, sync_state, workers: Workers):
        """The state with its far fields on these workers' devices."""
        places = self.places.sync_state
        move = lambda name: self._move(getattr(sync_state, name), getattr(places, name), workers)
        return sync_state._replace(**{name: move(name) for name in self._parts.far})

    def _move(self, tree, places, workers: Workers):
        place = lambda place, part: jax.tree.map(lambda x: self._place(x, place, workers), part)
        return jax.tree.map(place, places, tree, is_leaf=lambda x: isinstance(x, Place))

    def _place(self, x, place: Place, workers: Workers):
        """The array on these workers' devices; every process moves what it holds."""
        sharding, targets = workers.sharding(place), self._devices[workers is self._hosts]
        if sharding is None:  # simulated
            return jax.device_put(x, targets[0])
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if not isinstance(x, jax.Array) or not x.size:  # XLA lays out empty arrays as it likes
            known = np.zeros(x.shape, x.dtype) if not x.size else np.asarray(x)
            return jax.make_array_from_callback(known.shape, sharding, lambda where: known[where])
        held = {self._at[s.device]: s.data for s in x.addressable_shards}
        own = [i for i, d in enumerate(targets) if d.process_index == jax.process_index()]
        shards = [jax.device_put(held[i], targets[i]) for i in own]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

    def _due(self, sync_state, step: int):
        """The counters after this step, and which slots leave and arrive."""
        now = {name: getattr(sync_state, name) for name in self._parts.counters}
        if self._table is None or not self._table.holds(now, step):
            self._table = Timetable(self._parts, sync_state, now, step)
        return self._table.at(step)


class Timetable:
    """When transfers of the next steps leave and arrive, and the counters after each step."""

    def __init__(self, parts: Background, sync_state, now: dict, step: int):
        empty = dict.fromkeys((*parts.near, *parts.far))
        start = jax.device_get(now)

        def one(counters, step):
            state, launched, arrived = parts.clock(sync_state._replace(**empty, **counters), step)
            counters = {name: getattr(state, name) for name in parts.counters}
            return counters, (counters, launched, arrived)

        with jax.default_device(jax.local_devices(backend="cpu")[-1]):
            steps = jnp.arange(step, step + _HORIZON, dtype=jnp.int32)
            rows = jax.device_get(jax.jit(lambda c, t: jax.lax.scan(one, c, t)[1])(start, steps))
        self._first, self._start = step, start
        self._counters, self._launched, self._arrived = rows

    def holds(self, now: dict, step: int) -> bool:
        """Whether the table covers the step and goes on from these counters."""
        if not self._first <= step < self._first + _HORIZON:
            return False
        before = self._row(step - 1) if step > self._first else self._start
        return all(np.array_equal(before[name], np.asarray(now[name])) for name in now)

    def at(self, step: int):
        """(counters after the step, launched, arrived)."""
        i = step - self._first
        return self._row(step), self._launched[i], self._arrived[i]

    def _row(self, step: int) -> dict:
        return {name: values[step - self._first] for name, values in self._counters.items()}


def _parts(sync: SyncRule | None) -> Background:
    parts = None if sync is None else sync.background
    if parts is None:
        raise ValueError(
            "background=True needs a sync rule whose results are used later than they are asked "
            "for: streaming_diloco(delay=...), eager_diloco, co2 or overlapped"
        )
    return parts


def _processes() -> range:
    return range(jax.process_count())


def _host_workers(workers: Workers) -> Workers:
    """The same workers on CPU devices that do not compute, one each, in the same processes."""
    if workers.mode == "pmap":
        raise ValueError("background=True works with mesh= and simulate=, not with pmap=")
    if workers.mesh is None:
        return Workers(workers.axis_name, simulate=workers.sizes)
    mesh = workers.mesh
    if mesh.axis_names != workers.names:
        raise ValueError(
            "background=True needs a mesh of the worker axes alone, got the axes "
            f"{', '.join(map(repr, mesh.axis_names))}"
        )
    computing = list(mesh.devices.flat)
    free = {i: [] for i in _processes()}
    for device in jax.devices("cpu"):
        if device not in computing:
            free[device.process_index].append(device)
    try:
        hosts = [free[d.process_index].pop(0) for d in computing]
    except IndexError:
        raise ValueError(
            "background=True needs a CPU device beside each computing one: start with "
            "JAX_NUM_CPU_DEVICES=2 times the workers of a process, and give a mesh of half of them"
        ) from None
    kind = (AxisType.Auto,) * len(mesh.axis_names)
    devices = np.array(hosts, dtype=object).reshape(mesh.devices.shape)
    return Workers(workers.axis_name, Mesh(devices, mesh.axis_names, axis_types=kind))


def _devices(workers: Workers, hosts: Workers) -> tuple[list, list]:
    """Where the workers compute, and where their transfers are made."""
    if workers.mesh is None:
        return jax.local_devices()[:1], jax.local_devices(backend="cpu")[-1:]
    assert hosts.mesh is not None
    return list(workers.mesh.devices.flat), list(hosts.mesh.devices.flat)
