"""One check of every transform: does it work where Optax users put it? (a helper of tests)"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

import jaxcomm
from jaxcomm.training.workers import Place

AXIS = "workers"
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32),
    "b": jnp.zeros((5,)),
    "scale": jnp.ones(()),
}


def loss_fn(params, batch, key):
    del key
    x, y = batch
    out = (x @ params["w"] + params["b"]) * params["scale"]
    return jnp.mean((out - y) ** 2)


def batch(seed, rows=8):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6)).astype(np.float32)
    return x, (x @ np.ones((6, 5)) + rng.normal(size=(rows, 5))).astype(np.float32)


def wire(tx, params=PARAMS, workers=4):
    """What the program of a step sends: (primitive, part, operand's shape and dtype)."""
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, simulate=workers)
    jaxpr = step.trace(step.init(params, jax.random.key(0)), batch(0))
    return list(_collectives(jaxpr.jaxpr, ""))


def _collectives(jaxpr, stack):
    for eqn in jaxpr.eqns:
        names = f"{stack}/{eqn.source_info.name_stack}"
        part = names.rsplit("jaxcomm.wire.", 1)[-1].split("/")[0]
        if eqn.primitive.name.startswith(("all_", "psum", "ppermute")) and "jaxcomm.wire" in names:
            aval = eqn.invars[0].aval
            yield eqn.primitive.name, part, aval.shape, str(aval.dtype)
        for inner in jaxprs_in_params(eqn.params):
            yield from _collectives(inner, names)


def train(tx, *, params=PARAMS, steps=4, **way):
    """Final state and losses of a few steps; the same batches whatever the number of workers."""
    step = jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, donate=False, **way)
    state, losses = step.init(params, jax.random.key(0)), []
    for i in range(steps):
        state, metrics = step(state, batch(i))
        losses.append(float(metrics["loss"]))
    return step, state, losses


def check(tx, **options):
    """Trains, and checks what must hold for any chain that ends in an optimizer."""
    params = options.get("params", PARAMS)
    step, state, losses = train(tx, **options)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(state.params) == kinds(params)
    assert all(np.isfinite(losses)), losses
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state.params))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, params)
    assert changed["w"], changed
    assert changed["b"], changed
    assert all(p is Place.REPLICATED for p in jax.tree.leaves(step.places.params))
    return state


def check_all(make, *, ends=lambda: optax.adamw(1e-2)):
    """Every usual place of a transform.

    Args:
      make: makes the transform (or an optimizer, with `ends=optax.identity`).
      ends: makes the optimizer that follows it in the chain.
    """
    chain = lambda: optax.chain(optax.clip_by_global_norm(1.0), make(), ends())
    simulated = check(chain(), simulate=4)
    mesh = jax.make_mesh((4,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded = check(chain(), mesh=mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        simulated.params,
        sharded.params,
    )
    dense = optax.chain(jaxcomm.average(AXIS), optax.sgd(0.1))
    groups = optax.multi_transform(
        {"own": chain(), "dense": dense}, {"w": "own", "b": "dense", "scale": "dense"}
    )
    check(groups, simulate=2, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))
    masked = optax.masked(optax.chain(make(), ends()), {"w": True, "b": False, "scale": False})
    rest = optax.masked(dense, {"w": False, "b": True, "scale": True})
    check(optax.chain(masked, rest), simulate=1)
