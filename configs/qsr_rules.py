"""The rules of the QSR comparison, for `qsr_digits_cosine.py` and `qsr_quadratic_lm.py`.

With the peak rate P: H = 4 (constant), max(4, floor((c / lr)^p)) for p = 1, 2, 3 (linear, quadratic
and cubic), 1 in the first half and then 8 (post_local), gradients averaged in every step (dense).
c / P is that of the paper's ViT runs: 3.75, 2.19 and 1.875.
"""

from experiments.config import Config

AVERAGE = "local_sgd(axis_name, {}, total_steps=steps)"
POWER = "power_rule(learning_rate, {}, 4, {}, warmup_steps)"


def split(argument: str | None) -> tuple[str, str]:
    """The rule and the size ('' or 'smoke') of 'cubic', 'cubic-smoke', 'smoke' or nothing."""
    rule, _, size = (argument or "").partition("-")
    return ("quadratic", rule) if rule in ("", "smoke") else (rule, size)


def apply(config: Config, rule: str) -> Config:
    """Local AdamW that meets by the rule, in place."""
    peak = config.learning_rate.peak
    schedules = {
        "constant": "every(4)",
        "linear": POWER.format(round(3.75 * peak, 6), 1),
        "quadratic": f"qsr(learning_rate, {round(2.1875 * peak, 6)}, 4, warmup_steps)",
        "cubic": POWER.format(round(1.875 * peak, 6), 3),
        "post_local": "post_local(steps // 2, 8)",
    }
    config.tx = "optax.adamw(learning_rate)"
    if rule == "dense":
        config.tx = "optax.chain(average(axis_name), optax.adamw(learning_rate))"
    elif rule in schedules:
        config.sync = AVERAGE.format(schedules[rule])
    else:
        names = ", ".join(["dense", *schedules])
        raise ValueError(f"the config's argument picks one of {names}, got {rule!r}")
    return config
