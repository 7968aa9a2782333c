r"""signSGD with majority vote, and Signum: one bit a coordinate each way.

    s_i = sgn(m_i),  u = sgn(sum_i s_i),  m_i = g_i (signSGD) or beta m_i + (1 - beta) g_i (Signum)

Two phases: each worker sends the i-th part of its packed signs to worker i, which counts the
votes of its part and sends the packed result to all: 2 (n-1)/n * d/8 bytes a worker, whatever n.

One bit cannot say zero. A zero gradient and a tied vote both give +1 on even and -1 on odd steps,
so that a parameter nobody uses goes to and fro instead of away. The result does not see the
gradient's size, and has no error memory: on one-dimensional problems with skewed noise, or on
f = eps |x + y| + |x - y|, it does not find the optimum, and `error_feedback(sign(), ...)` does.

Sources: Bernstein et al. 2018, "signSGD" (ICML, arXiv 1802.04434); Bernstein et al. 2019, "signSGD
with Majority Vote" (ICLR, arXiv 1810.05291); counter-examples: Karimireddy et al. 2019 (arXiv
1901.09847).
"""

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import AxisName, all_gather, all_to_all, flatten, size
from jaxcomm.collectives.primitives import sum_rows
from jaxcomm.compressors import packing
from jaxcomm.transforms.common import Communication, CountState, zero_count


def majority_vote(axis_name: AxisName) -> Communication:
    r"""The sign that most workers' updates have, coordinate by coordinate: +1 or -1.

    .. math:: u = \mathrm{sgn}\Big(\sum_i \mathrm{sgn}(g_i)\Big)

    where zeros and ties count as +1 on even and -1 on odd steps.

    Args:
      axis_name: name of the worker axis.

    Returns:
      An Optax transform; one bit a coordinate to the voters and one back.

    Example:
      >>> import jax, jax.numpy as jnp, jaxcomm
      >>> tx = jaxcomm.majority_vote("workers")
      >>> vote = lambda g: tx.update(g, tx.init(g))[0]
      >>> g = jnp.array([[1.0, -2.0], [0.1, -3.0], [-9.0, 4.0]])
      >>> jax.vmap(vote, axis_name="workers")(g)[0].tolist()
      [1.0, -1.0]

    References:
      Bernstein et al., signSGD with Majority Vote, arXiv 1810.05291.
    """

    def init_fn(params):
        del params
        return CountState(zero_count())

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        vector, unflatten = flatten(updates)
        odd = state.count % 2 == 1
        negative = _vote((vector < 0) | ((vector == 0) & odd), odd, axis_name)
        return unflatten(jnp.where(negative, -1.0, 1.0)), CountState(state.count + 1)

    return Communication(init_fn, update_fn)


def _vote(negative: jax.Array, tie: jax.Array, axis_name: AxisName) -> jax.Array:
    """Which coordinates most workers call negative; `tie` where they are even. bool, (d,)."""
    n, length = size(axis_name), negative.shape[0]
    if not length:
        return negative
    # whole bytes a part, so that parts of packed signs are parts of the vector
    part = packing.packed_bytes(-(-length // n), 1) * 8
    padded = jnp.pad(negative, (0, n * part - length)).reshape(n, part)
    packed = jax.vmap(lambda row: packing.pack(row, 1))(padded)
    received = all_to_all(packed, axis_name, "votes")
    votes = sum_rows(jax.vmap(lambda row: packing.unpack(row, 1, part))(received))
    result = jnp.where(2 * votes == n, tie, 2 * votes > n)
    everyone = all_gather(packing.pack(result, 1), axis_name, "votes")
    whole = jax.vmap(lambda row: packing.unpack(row, 1, part))(everyone)
    return whole.reshape(-1)[:length] == 1


def sign_sgd(
    learning_rate: optax.ScalarOrSchedule, axis_name: AxisName, *, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """signSGD with majority vote: every coordinate moves by the learning rate.

    Args:
      learning_rate: a number or an Optax schedule; with signs, the size of each coordinate's move.
      axis_name: name of the worker axis.
      weight_decay: decoupled; the move is -learning_rate (vote + weight_decay x).

    Returns:
      An Optax optimizer; one bit a coordinate each way.

    References:
      Bernstein et al., signSGD, arXiv 1802.04434.
    """
    return optax.chain(
        majority_vote(axis_name),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: AxisName,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Signum: each worker votes with the sign of its momentum.

    .. math:: m_i \leftarrow \beta m_i + (1 - \beta) g_i

    Args:
      learning_rate: a number or an Optax schedule; some 1e-4 in the paper.
      axis_name: name of the worker axis.
      momentum: beta in [0, 1); 0 is `sign_sgd`.
      weight_decay: decoupled; the move is -learning_rate (vote + weight_decay x).

    Returns:
      An Optax optimizer; its momentum is float32 and stays on its worker.

    Raises:
      ValueError: momentum outside [0, 1).

    References:
      Bernstein et al., signSGD, arXiv 1802.04434 (Algorithm 2).
    """
    if isinstance(momentum, (int, float)) and not 0 <= momentum < 1:
        raise ValueError(f"signum: momentum must be in [0, 1), got {momentum}")
    tx = optax.chain(
        # signs do not care about bias correction
        optax.ema(momentum, debias=False, accumulator_dtype=jnp.float32),
        sign_sgd(learning_rate, axis_name, weight_decay=weight_decay),
    )

    def update_fn(updates, state, params=None, **extra):
        step, state = tx.update(updates, state, params, **extra)
        return jax.tree.map(lambda s, g: s.astype(g.dtype), step, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
