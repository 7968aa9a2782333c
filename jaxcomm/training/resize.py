"""The state of n workers as a state of m: hosts come and go, a run goes on.

Which leaves are per worker, and which have a shape that depends on the number of workers, is asked
of the step that made the state (`TrainState.layout`): its `init` is traced abstractly for n, for m
and for one worker. The arrays themselves are changed on the host.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.collectives.means import chunk_size
from jaxcomm.training import _storage
from jaxcomm.training.placement import CHUNKS, Layout, global_state
from jaxcomm.training.workers import Place, Workers
from jaxcomm.transforms._ef21 import EF21State
from jaxcomm.transforms._error_feedback import ErrorFeedbackState


def resize_workers(state, n: int | tuple[int, ...]):
    r"""The state for n workers, to go on with a step that was made for n.

    What n' old workers hold becomes what n new ones hold. All new workers start equal but for what
    is theirs by position:

    ==========================  ===================================================================
    leaf                        for each of the n new workers
    ==========================  ===================================================================
    replicated                  as it is
    per worker, floating point  the mean over the old workers, taken in float64. So the mean
                                contribution :math:`\tfrac1n\sum_i e_i` of error memories is
                                kept, of momenta and accumulated gradients, of the :math:`h_i` of
                                EControl and of the clients' controls :math:`c_i`; local parameters
                                are averaged: at a sync boundary they are equal and stay as they
                                are to the last bit, within a round this is a meeting without the
                                outer optimizer: the anchor stays where it is, the round goes on
    EF21's :math:`g_i`          :math:`g`, what all have agreed on: the mean of the :math:`g_i`, or
                                with weights :math:`\sum_i w_i g_i`; :math:`\sum_i w_i g_i = g`
                                holds for any new weights
    second error memories       (two-phase: ceil(d/n) elements a worker) belong to positions of the
                                vector: joined, and cut anew. If exchange='auto' does without at n
                                workers, added to every worker's first memory
    replicated, a row a worker  (EF21+) every row the mean of the old rows
    integers, booleans, keys    as they are if all agree, else the largest
    `skipped`                   the total is kept, spread over the workers
    ==========================  ===================================================================

    The next meeting takes place when it would have, what is in flight (`pending`) arrives when it
    would have. Random choices that depend on a worker's index (keys of messages, participation) are
    those of a run with n workers. The batch is global, so that the next samples are the same
    whatever n is; hyper-parameters that were chosen for n' workers (weights, rates) are the new
    step's.

    Args:
      state: a TrainState from a step, its `init`, or `Checkpointer.restore`. It stays as it is.
        With several processes all call this.
      n: number of workers, at least 1; for a tuple of axes a tuple of sizes, or the total if all
        that is communicated goes along all of them.

    Returns:
      A TrainState of host-made arrays; the first step places them. The same number gives the state
      itself.

    Raises:
      ValueError: n is no whole number of at least 1, the state does not come from a step, or a leaf
        depends on the number of workers in a way that is not in the table.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm, optax
      >>> tx = optax.chain(jaxcomm.ef21(jaxcomm.top_k(k=1), "workers"), optax.sgd(0.1))
      >>> loss_fn = lambda params, batch, key: jnp.mean((batch - params) ** 2)
      >>> make = lambda n: jaxcomm.make_train_step(loss_fn, tx, axis_name="workers", simulate=n)
      >>> two, four = make(2), make(4)
      >>> state, _ = two(two.init(jnp.zeros(3), jax.random.key(0)), jnp.ones((8, 3)))
      >>> state, _ = four(jaxcomm.resize_workers(state, 4), jnp.ones((8, 3)))
      >>> state.opt_state[0].local.shape
      (4, 3)
    """
    layout = layout_of(state)
    workers = _workers(n, layout)
    if workers.sizes == layout.workers.sizes:
        return state
    like = abstract_state(state, workers)
    return jax.tree.map(_storage.unpack, resized(jax.tree.map(_on_host, state), state, like), like)


def layout_of(state) -> Layout:
    """The state's layout, if it has one.

    Raises:
      ValueError: it does not come from a step.
    """
    layout = getattr(state, "layout", None)
    if layout is None or layout.init is None or layout.places is None:
        raise ValueError(
            "the state does not say what it holds for each worker: resize_workers needs a "
            "TrainState that came from a TrainStep (its init or a step) or a Checkpointer"
        )
    return layout


def with_workers(state, n: int | tuple[int, ...]):
    """The abstract state of n workers, of the same step; like `resize_workers(state, n)`."""
    return abstract_state(state, _workers(n, layout_of(state)))


def abstract_state(state, workers: Workers):
    """The abstract state of these workers, with a layout, from any state of the step."""
    layout = layout_of(state)
    view = layout.view(state, workers)
    known = _storage.flatten(layout.places)
    paths = _storage.flatten(view)
    places = [known.get(path, Place.PER_WORKER) for path in paths]
    places = jax.tree.unflatten(jax.tree.structure(view), places)
    new = Layout(layout.init, workers, places, placed=False)
    return global_state(places, view, workers)._replace(layout=new)


def resized(stored, old, new):
    """The stored leaves (NumPy) of the state `old` as those of the abstract state `new`."""
    before, after = layout_of(old), layout_of(new)
    if jax.tree.structure(old) != jax.tree.structure(before.places):
        raise ValueError("the state is not that of its step: its tree differs, so it cannot resize")
    flat, name, sizes = _storage.flatten, before.workers.axis_name, before.workers.sizes
    view = functools.cache(lambda n: flat(before.view(old, Workers(name, simulate=n))))
    shapes, leaves, one = flat(old), flat(stored), view((1,) * len(sizes))
    places, kept = flat(after.places), flat(before.places)
    along = lambda path: _axes_of(path, view, sizes, after.workers.sizes)
    for path, x in leaves.items():
        if path.endswith(CHUNKS) and kept[path] is Place.PER_WORKER and x.ndim > 1:
            leaves[path] = _joined(x, sizes, along(path))
    result = []
    for path, spec in flat(new).items():
        chunks = path.endswith(CHUNKS)  # which exchange='auto' has for some numbers of workers
        if path not in kept and chunks:
            result.append(np.zeros(spec.shape, np.float32))
            continue
        if path not in kept or (path not in one and not chunks):
            raise ValueError(f"resize_workers: not every number of workers has state leaf {path}")
        views = [x.shape[places[path] is Place.PER_WORKER :] for x in (shapes[path], spec)]
        views = [one[path].shape if path in one else None, *views]
        leaf = leaves[path], places[path], views
        result.append(_leaf(path, *leaf, sizes, after.workers.sizes, along(path)))
    joined = jax.tree.unflatten(jax.tree.structure(stored), list(leaves.values()))
    return _refined(joined, jax.tree.unflatten(jax.tree.structure(new), result))


def _leaf(path: str, x: np.ndarray, place: Place, shapes, old, new, along) -> np.ndarray:
    """One leaf by the table, of chunks their vector, for axes of sizes `new` instead of `old`.

    `shapes` are those of the view of one worker (None without it), an old one and a new one; what
    is shared out is so along the axes `along`.
    """
    (one, here, there), count = shapes, math.prod(new)
    parts = [math.prod(sizes[i] for i in along) for sizes in (old, new)]
    if place is Place.REPLICATED:
        if here == there:
            return x
        if [here, there] == [(part, *here[1:]) for part in parts]:
            return _everyone(x, parts[1])
    elif path.endswith(CHUNKS):
        chunks = [(chunk_size(one[0], part), *one[1:]) for part in parts] if one else None
        if one is None or [here, there] == chunks:
            return _cut_anew(x, new, along, there)
    elif one != here or here != there:
        pass
    elif path == ".skipped":
        return _spread(int(x.sum()), count, x.dtype)
    else:
        return _everyone(x, count)
    raise ValueError(
        f"resize_workers: state leaf {path} has shape {list(here)} with {math.prod(old)} workers "
        f"and {list(there)} with {count}, for which there is no rule"
    )


def _axes_of(path: str, view: Callable, old: tuple, new: tuple) -> Sequence[int]:
    """The axes along which a leaf is shared out: its shape depends on their sizes."""
    ones, many = (1,) * len(old), max(2, math.prod(old), math.prod(new))
    if len(old) == 1:
        return (0,)
    shape = lambda sizes: view(sizes)[path].shape if path in view(sizes) else None
    sizes = [(*ones[:i], many, *ones[i + 1 :]) for i in range(len(old))]
    return [i for i in range(len(old)) if shape(sizes[i]) != shape(ones)] or range(len(old))


def _everyone(rows: np.ndarray, n: int) -> np.ndarray:
    """n rows, each the mean (of integers and keys the largest) of the rows."""
    row = rows[0]
    if not (rows == row).all():
        floats = jnp.issubdtype(rows.dtype, jnp.floating)
        row = rows.astype(np.float64).mean(0).astype(rows.dtype) if floats else rows.max(0)
    return np.broadcast_to(row, (n, *rows.shape[1:]))


def _joined(rows: np.ndarray, sizes: tuple[int, ...], along: Sequence[int]) -> np.ndarray:
    """The vector whose chunks lie along these axes; its mean over the others."""
    last = range(len(sizes) - len(along), len(sizes))
    grid = np.moveaxis(rows.reshape(*sizes, *rows.shape[1:]), along, last)
    parts = math.prod(sizes[i] for i in along)
    shape = len(rows) // parts, parts * rows.shape[1], *rows.shape[2:]
    return _everyone(grid.reshape(shape), 1)[0]


def _cut_anew(vector: np.ndarray, sizes, along, shape: tuple[int, ...]) -> np.ndarray:
    """The vector cut into chunks along these axes, the same ones along the others."""
    parts = [size if i in along else 1 for i, size in enumerate(sizes)]
    cut = np.zeros((math.prod(parts) * shape[0], *shape[1:]), vector.dtype)  # beyond its end: zero
    held = min(len(vector), len(cut))
    cut[:held] = vector[:held]
    every = np.broadcast_to(cut.reshape(*parts, *shape), (*sizes, *shape))
    return every.reshape(math.prod(sizes), *shape)


def _spread(total: int, n: int, dtype) -> np.ndarray:
    share, rest = divmod(total, n)
    return (share + (np.arange(n) < rest)).astype(dtype)


def _refined(old, new):
    """Where the definition of a method asks for more than a leaf by itself can tell.

    In `old` second error memories are joined.
    """
    methods = (EF21State, ErrorFeedbackState)
    is_method = lambda node: isinstance(node, methods)
    befores = iter([x for x in jax.tree.leaves(old, is_leaf=is_method) if is_method(x)])

    def refine(node):
        if not is_method(node):
            return node
        before = next(befores)
        if isinstance(node, EF21State):
            wide = lambda mean, local: np.broadcast_to(mean, local.shape)
            return node._replace(local=jax.tree.map(wide, node.mean, node.local))
        if before.server_error is not None and node.server_error is None:
            return node._replace(error=_taken_in(node.error, before.server_error))
        return node

    return jax.tree.map(refine, new, is_leaf=is_method)


def _taken_in(error, vector: np.ndarray):
    """Every worker's error memory plus a vector that no worker is in charge of any more."""
    leaves, treedef = jax.tree.flatten(error)
    ends = np.cumsum([math.prod(x.shape[1:]) for x in leaves])
    parts = np.split(vector[: ends[-1]], ends[:-1])
    added = [x + part.reshape(x.shape[1:]) for x, part in zip(leaves, parts)]
    return jax.tree.unflatten(treedef, added)


def _on_host(x) -> np.ndarray:
    return np.asarray(_storage.gathered(_storage.pack(x)))


def _workers(n, layout: Layout) -> Workers:
    """So many workers along the layout's axes; only their number counts."""
    names = layout.workers.names
    sizes = n if isinstance(n, tuple) else (n,)
    whole = lambda size: isinstance(size, (int, np.integer)) and not isinstance(size, bool)
    if not all(whole(size) and size >= 1 for size in sizes) or len(sizes) not in (1, len(names)):
        wanted = "" if len(names) == 1 else f", or {len(names)} of them"
        raise ValueError(
            f"resize_workers: n must be a whole number of at least 1{wanted}, got {n!r}"
        )
    if sizes == (layout.workers.count,):
        sizes = layout.workers.sizes
    sizes = (1,) * (len(names) - len(sizes)) + tuple(int(size) for size in sizes)
    return Workers(layout.workers.axis_name, simulate=sizes)
