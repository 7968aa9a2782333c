"""What `experiments.bench scale` measures: methods, workers, parameters, leaves, links."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomm
from jaxcomm.collectives import flatten
from jaxcomm.training.step import TrainStep

AXIS = "workers"
RAW = "raw"  # the rate of plain loopback
METHODS = ("none", "dense", "sign two-phase", "ef21 block top-k", "local")
FLAT = ", flattened"  # what the names of these end in: the whole chain sees one vector
MANY_LEAVES = (*METHODS[:4], *(name + FLAT for name in METHODS[2:4]))
ROUND = 8  # steps of a local method between two meetings
ROWS = 32  # examples of a worker, on hosts
EXAMPLES, LAYERS = 1024, 10  # of a worker, and of the model, where a step computes
BYTES = 4 * 12  # of memory for each parameter of each worker: copies that a step needs at most


@dataclasses.dataclass(frozen=True)
class Case:
    """One step on one device. `grows` says what the case is part of a series of."""

    grows: str  # workers, parameters or leaves
    method: str
    workers: int
    parameters: int
    leaves: int
    examples: int = 0  # of a worker that every parameter is multiplied by

    @property
    def bytes(self) -> int:
        """Memory it may need."""
        return BYTES * self.parameters * self.workers


@dataclasses.dataclass(frozen=True)
class Link:
    """One method between throttled hosts."""

    method: str
    hosts: int
    rate: str


def make_step(method: str, loss_fn, **where) -> TrainStep:
    """The step of a method; `where` is simulate= or mesh=."""
    communication = {
        "dense": lambda: jaxcomm.average(AXIS),
        "sign two-phase": lambda: jaxcomm.error_feedback(
            jaxcomm.sign(), AXIS, exchange="two_phase"
        ),
        "ef21 block top-k": lambda: jaxcomm.ef21(jaxcomm.block_top_k(0.01), AXIS),
    }
    sgd, sync, name = optax.sgd(1e-3), None, method.removesuffix(FLAT)
    tx = optax.chain(communication[name](), sgd) if name in communication else sgd
    tx = jaxcomm.flattened(tx) if method.endswith(FLAT) else tx
    if method == "local":
        sync = jaxcomm.periodic(outer=jaxcomm.average(AXIS), every=jaxcomm.every(ROUND))
    return jaxcomm.make_train_step(loss_fn, tx, axis_name=AXIS, sync=sync, **where)


def bare_step(loss_fn, params, batch):
    """What 'none' is: loss, gradient, optimizer of workers who never hear of each other."""
    losses, grads = jax.vmap(jax.value_and_grad(loss_fn), (0, 0, None))(params, batch, None)
    return optax.apply_updates(params, jax.tree.map(lambda g: -1e-3 * g, grads)), losses


def tree(parameters: int, leaves: int) -> dict:
    """Parameters in so many leaves, in a pattern of four sizes as the layers of a model have."""
    weights = np.resize([1, 4, 4, 1], leaves).tolist()
    sizes = [parameters * weight // sum(weights) for weight in weights]
    sizes[-1] += parameters - sum(sizes)
    return {f"leaf{i:05d}": np.full(size, 0.5, np.float32) for i, size in enumerate(sizes)}


def tree_loss(params, batch, key):
    """Next to no computation: what is left is what the step itself costs.

    The terms are joined as leaves are: XLA on CPU fuses the sum of n scalars in a time that grows
    with n squared, so that 10,000 would be all there is to compile.
    """
    del key
    target = jnp.mean(batch)
    terms = [jnp.sum((x - target) ** 2) for x in jax.tree.leaves(params)]
    return jnp.sum(flatten(terms)[0])


def layers_loss(params, batch, key):
    """Every parameter is multiplied by every example: the leaves, joined, are the same ten nearly
    square layers, however many leaves they are cut into.
    """
    del key
    vector, _ = flatten(params)
    cut = flatten(tree(vector.size, LAYERS))[1]
    layers = [x.reshape(_rows(x.size), -1) for x in jax.tree.leaves(cut(vector))]
    return sum(jnp.mean((batch[:, : len(layer)] @ layer) ** 2) for layer in layers)


def layers_batch(case: Case) -> np.ndarray:
    """As many examples for each worker as the case has."""
    width = max(_rows(x.size) for x in tree(case.parameters, LAYERS).values())
    shape = case.workers * case.examples, width
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _rows(size: int) -> int:
    """The largest divisor of a size that is not above its square root."""
    return next(k for k in range(math.isqrt(size), 0, -1) if size % k == 0)


WIDTHS = (256, 768, 768, 256, 10)  # 1.0 million parameters


def mlp(seed: int = 0) -> list:
    """The model that is trained on hosts."""
    rng = np.random.default_rng(seed)
    layer = lambda m, n: {
        "w": (rng.standard_normal((m, n)) / math.sqrt(m)).astype(np.float32),
        "b": np.zeros(n, np.float32),
    }
    return [layer(m, n) for m, n in itertools.pairwise(WIDTHS)]


def mlp_loss(params, batch, key):
    """Squared error on random targets."""
    del key
    x, y = batch
    for i, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return jnp.mean((x - y) ** 2)


def mlp_batch(workers: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A global batch."""
    rng = np.random.default_rng(seed)
    draw = lambda width: rng.standard_normal((workers * ROWS, width)).astype(np.float32)
    return draw(WIDTHS[0]), draw(WIDTHS[-1])


def alone_cases(largest: int = 10**8) -> list[Case]:
    """The series on one device."""
    powers = lambda low, high: [10**k for k in range(low, high + 1)]
    cases = [
        Case("workers", method, 2**k, 10**5, 10) for method in METHODS[:4] for k in range(3, 11)
    ]
    cases += [
        Case("parameters", method, 4, d, 10)
        for method in METHODS[:4]
        for d in powers(5, 8)
        if d <= largest
    ]
    cases += [
        Case("leaves", method, 3, d, n)
        for d in (10**6, 10**8)
        for method in MANY_LEAVES
        for n in powers(1, 4)
    ]
    cases += [
        Case("leaves", method, 3, 10**8, n, EXAMPLES) for method in MANY_LEAVES for n in (10, 10**4)
    ]
    return [case for case in cases if case.parameters <= largest]


def link_cases(hosts: list[int], rates: list[str]) -> list[Link]:
    """The methods on real hosts."""
    return [Link(m, n, rate) for n in hosts for rate in rates for m in METHODS[1:]]
