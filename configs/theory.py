"""What the theory configs share: every field, with its default."""

import ml_collections


def base(problem: str, argument: str | None, **arguments) -> ml_collections.ConfigDict:
    """A config for `experiments.theory`; `argument` is '' or 'smoke' (a few rounds)."""
    if argument not in (None, "", "smoke"):
        raise ValueError(f"the only config argument is 'smoke', got {argument!r}")
    config = ml_collections.ConfigDict()
    config.problem = ml_collections.ConfigDict({"name": problem, **arguments})
    config.methods = ()  # (label, expression); its scope: experiments/theory_runs.py
    config.title = ""
    config.error = "gradient"  # gradient (squared norm), distance (relative) or loss
    config.factor = 1e6  # the table gives the rounds until the error is down by this factor
    config.rounds = 20 if argument == "smoke" else 0  # 0: the config's own
    config.record_every = 1  # rounds between two points of a curve
    config.seeds = 1
    config.dense_start = False  # EF21 and EControl know the gradients at the start (32 d bits)
    return config
