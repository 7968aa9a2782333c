"""A task: a model, its data and its fixed validation set, as plain functions on pytrees.

A task is everything about an experiment that has nothing to do with communication. The training
library never imports one; the binaries join the two. Every task is built by `build_task` from one
function that gives per-example metrics, so that the training loss and the validation loss are the
same formula:

    loss(params)            = mean over the examples of a batch of  metrics(params, example)['loss']
    validation_loss(params) = the same mean over the whole, fixed validation set
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.tasks import pipeline

Params = Any
Batch = Mapping[str, Any]


class Task(NamedTuple):
    """What `experiments.train` needs to know about a task.

    Attributes:
      name: the name it was made by.
      init: `init(key) -> params`, a plain nested dict of arrays.
      loss_fn: `loss_fn(params, batch, key) -> (loss, aux)`; `aux` maps names to scalar means.
      evaluate: `evaluate(params) -> dict` of floats with at least `validation_loss` over the fixed
        validation set (and `validation_accuracy`). `params` is one tree, without a worker axis.
      train_iterator: `train_iterator(batch_size, seed, process_index=0, process_count=1)`, an
        endless Grain iterator over dicts of NumPy arrays; see `experiments.tasks.pipeline`.
      metadata: facts for the log and the summary: `parameters`, `train_examples`,
        `validation_examples`, `split` and what the task adds (`unigram_entropy`, ...). JSON-able.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss_fn: Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]
    evaluate: Callable[[Params], dict[str, float]]
    train_iterator: Callable[..., Iterator[dict[str, np.ndarray]]]
    metadata: dict[str, Any]


class Data(NamedTuple):
    """The data side of a task.

    Attributes:
      num_train: number of training examples.
      fetch: `fetch(indices) -> dict of arrays`, the training examples at these positions.
      validation: the validation examples, a dict of arrays with the example in axis 0.
      metadata: what to tell about the data; `split` says how it was divided.
    """

    num_train: int
    fetch: Callable[[np.ndarray], dict[str, np.ndarray]]
    validation: dict[str, np.ndarray]
    metadata: dict[str, Any]


def build_task(
    name: str,
    make_model: Callable[[nnx.Rngs], nnx.Module],
    example_metrics: Callable[[Any, Batch], dict[str, jax.Array]],
    data: Data,
    *,
    eval_batch: int,
) -> Task:
    """Joins a Flax NNX model and data to a `Task` over plain pytrees.

    Args:
      name: the task's name.
      make_model: builds the module from its random streams; all its state must be `nnx.Param`.
      example_metrics: `(model, batch) -> {'loss': (B,), ...}`, float32, one number an example.
      data: the training examples and the validation set.
      eval_batch: how many validation examples go through the model at once.
    """
    abstract = nnx.eval_shape(lambda: make_model(nnx.Rngs(params=0)))
    graphdef, shapes = nnx.split(abstract, nnx.Param)

    @jax.jit
    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.split(make_model(nnx.Rngs(params=key)), nnx.Param)[1])

    def metrics(params: Params, batch: Batch) -> dict[str, jax.Array]:
        return example_metrics(nnx.merge(graphdef, params), batch)

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None):
        del key  # no task draws random numbers in its loss; the argument is the library's contract
        aux = {k: jnp.mean(v) for k, v in metrics(params, batch).items()}
        return aux.pop("loss"), aux

    def train_iterator(batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
        return pipeline.train_iterator(
            data.num_train, data.fetch, batch_size, seed, process_index, process_count
        )

    facts = {
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)),
        "train_examples": data.num_train,
        "validation_examples": len(next(iter(data.validation.values()))),
    }
    evaluate = _make_evaluate(metrics, data.validation, eval_batch)
    return Task(name, init, loss_fn, evaluate, train_iterator, data.metadata | facts)


def _make_evaluate(metrics, validation: dict[str, np.ndarray], batch: int):
    """The mean of `metrics` over `validation`, `batch` examples at a time, compiled once."""
    total = len(next(iter(validation.values())))
    batch = min(batch, total)

    @jax.jit
    def weighted_sums(params, examples, weights):
        return {k: jnp.sum(v * weights) for k, v in metrics(params, examples).items()}

    def evaluate(params: Params) -> dict[str, float]:
        params = jax.tree.map(_on_one_device, params)
        sums: dict[str, float] = {}
        for start in range(0, total, batch):
            # Filled up with the first examples at weight 0: one shape, one program.
            rows = np.arange(start, start + batch)
            chunk = {k: v[rows % total] for k, v in validation.items()}
            for k, v in weighted_sums(params, chunk, (rows < total).astype(np.float32)).items():
                sums[k] = sums.get(k, 0.0) + float(v)
        return {f"validation_{k}": v / total for k, v in sums.items()}

    return evaluate


def _on_one_device(x):
    """This process's first copy of a replicated array: eight devices need not all evaluate."""
    if isinstance(x, jax.Array) and x.is_fully_replicated:
        return x.addressable_data(0)
    return x


def as_dtype(field: str, value: str) -> jnp.dtype:
    """The floating-point type named `value`; `field` is the configuration field it came from."""
    if value not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{field} must be 'float32', 'bfloat16' or 'float16', got {value!r}.")
    return jnp.dtype(value)
