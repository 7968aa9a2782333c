"""The learning-rate schedule of `config.learning_rate`."""

import optax

from experiments.config import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warm-up to `peak`, then `decay` ('cosine' or 'constant') to `end` at `config.steps`.

    Raises:
      ValueError: an unknown decay, a peak that is not positive, or a warm-up longer than the
        training.
    """
    rate = config.learning_rate
    if rate.decay not in ("cosine", "constant"):
        raise ValueError(
            f"config.learning_rate.decay must be 'cosine' or 'constant', got {rate.decay!r}"
        )
    if not rate.peak > 0:
        raise ValueError(f"config.learning_rate.peak must be positive, got {rate.peak:g}")
    if not 0 <= rate.warmup_steps < config.steps:
        raise ValueError(
            f"config.learning_rate.warmup_steps must be in [0, config.steps={config.steps}), "
            f"got {rate.warmup_steps}"
        )
    warmup = optax.linear_schedule(rate.init, rate.peak, max(rate.warmup_steps, 1))
    if rate.decay == "constant":
        main = optax.constant_schedule(rate.peak)
    else:
        length = config.steps - rate.warmup_steps
        main = optax.cosine_decay_schedule(rate.peak, length, rate.end / rate.peak)
    return optax.join_schedules([warmup, main], [rate.warmup_steps])
