"""Small trees, batches and trajectories that several tests share (a helper of tests)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

AXIS = "workers"


def tree(dtype=jnp.float32, seed=0):
    """Parameters with a scalar, odd shapes and an empty leaf; 24 elements."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), dtype)
    return {
        "w": draw(5, 3),
        "odd": [draw(7), draw(0, 2)],
        "scale": jnp.ones((), dtype),
        "shift": (draw(1, 1, 1),),
    }


def batch(step, rows=16):
    """Inputs and targets; every worker's rows differ."""
    rng = np.random.default_rng(100 + step)
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    return {"x": x, "y": (x[:, :3] * [1.0, -2.0, 0.5] + 0.3).astype(np.float32)}


def loss_fn(params, batch, key):
    """A regression in which every element of `tree()` counts."""
    del key
    out = batch["x"] @ params["w"] * params["scale"] + params["shift"][0][0]
    odd, empty = params["odd"]
    bend = jnp.mean((odd[:5] * batch["x"]) ** 2) + jnp.sum((odd - 1) ** 2) + jnp.sum(empty)
    return (jnp.mean((out - batch["y"]) ** 2) + 0.1 * bend).astype(jnp.float32)


def mesh(n, names=(AXIS,)):
    """A mesh of the first devices; `n` is a number or a shape."""
    shape = n if isinstance(n, tuple) else (n,)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def host(tree):
    """NumPy leaves; keys as their data."""
    typed = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if typed(x) else x), tree)


def run(step, steps=4, params=None, rows=16, start=None, key=None):
    """States (host trees, the first included) and metrics of a run on `batch(0), batch(1), ...`."""
    key = jax.random.key(0) if key is None else key
    state = start if start is not None else step.init(params if params is not None else tree(), key)
    states, metrics = [host(state)], []
    for i in range(steps):
        state, seen = step(state, batch(i, rows))
        states.append(host(state))
        metrics.append(host(seen))
    return states, metrics


def kinds(tree):
    """Shape and dtype of every leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def distance(a, b):
    """Largest |a - b| / (1 + |b|) over all floating-point leaves; the others must be equal."""
    worst = 0.0
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert kinds(x) == kinds(y), (kinds(x), kinds(y))
        if x.size and jnp.issubdtype(x.dtype, jnp.floating):
            x, y = x.astype(np.float64), y.astype(np.float64)
            assert np.isfinite(x).all()
            worst = max(worst, float(np.max(np.abs(x - y) / (1 + np.abs(y)))))
        else:
            assert (x == y).all()
    return worst


def same(a, b):
    """Are two host trees equal bit for bit?"""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return all(kinds(x) == kinds(y) and x.tobytes() == y.tobytes() for x, y in pairs)
