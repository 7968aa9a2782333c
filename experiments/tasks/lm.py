"""Language modelling: a small transformer on bytes or tokens; see `experiments.tasks.corpus`.

Validation is on `validation_windows` windows, evenly spaced over all windows of the validation
blocks. `metadata['unigram_entropy']` is the cross entropy of exactly their targets under the
training unigrams: the loss of a model that has learnt nothing but how often a token occurs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks import corpus as corpora
from experiments.tasks.base import Data, Task, as_dtype, build_task
from experiments.tasks.transformer import Transformer


def make_lm(config) -> Task:
    """The task `lm` of a complete `config.task` section.

    Raises:
      ValueError: if a size is out of its range, or a file is empty, too short or of a wrong size.
      FileNotFoundError: if a file does not exist.
    """
    model = config.model
    if model.num_layers < 1 or model.width < 1:
        raise ValueError(
            "config.task.model.num_layers and width must be at least 1, "
            f"got {model.num_layers} and {model.width}."
        )
    if model.num_heads < 1 or model.width % model.num_heads:
        raise ValueError(
            "config.task.model.width must be divisible by num_heads, "
            f"got {model.width} and {model.num_heads}."
        )
    types = (
        as_dtype("config.task.model.dtype", model.dtype),
        as_dtype("config.task.model.param_dtype", model.param_dtype),
    )
    data = load_windows(config)
    sizes = (data.metadata["vocab_size"], config.seq_len, model.num_layers, model.width)

    def make_model(rngs) -> Transformer:
        return Transformer(*sizes, model.num_heads, model.tie, *types, rngs=rngs)

    return build_task(config.name, make_model, token_metrics, data, eval_batch=32)


def token_metrics(model: Transformer, batch) -> dict[str, jax.Array]:
    """Cross entropy (nats a token) and accuracy of each window of `batch` ('tokens', (B, L+1))."""
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    logits = model(inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return {"loss": jnp.mean(loss, axis=-1), "accuracy": jnp.mean(correct, axis=-1)}


def load_windows(config) -> Data:
    """The training windows, fetched when needed, and the validation windows, all in memory."""
    if config.validation_windows < 1:
        raise ValueError(
            f"config.task.validation_windows must be at least 1, got {config.validation_windows}."
        )
    corpus = corpora.load_corpus(
        config.data_path, config.token_dtype, config.vocab_size, config.max_bytes
    )
    split = corpora.split_windows(len(corpus.tokens), config.seq_len, config.split_block)
    chosen = np.linspace(
        0, len(split.validation) - 1, min(config.validation_windows, len(split.validation))
    )
    starts = split.validation[chosen.astype(np.int64)]
    validation = corpora.gather_windows(corpus, starts, config.seq_len)
    metadata = {
        "source": corpus.source,
        "tokens": len(corpus.tokens),
        "fingerprint": corpora.fingerprint(corpus),
        "vocab_size": corpus.vocab_size,
        "seq_len": config.seq_len,
        "split": f"of every {corpora.PERIOD} blocks of {split.block} tokens the last is validation",
        "unigram_entropy": corpora.unigram_entropy(corpus, split, validation),
    }

    def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
        windows = corpora.gather_windows(corpus, split.train[indices], config.seq_len)
        return {"tokens": windows}

    return Data(len(split.train), fetch, {"tokens": validation}, metadata)
