"""The table of methods in the README, made from the configs; prints it as markdown.

    python -m experiments.methods [--update]

With --update it also replaces the table in README.md. Name and source come from a config's
docstring, the figures from the traced step of its digits config: what a worker puts into messages
(bits a coordinate, in a step or at a meeting; `or` between a method's stages), the collectives,
and the state that differs between workers (in units of the d parameters, local copies included).
"""

import importlib
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import jax

import jaxcomm
from experiments.tasks import make_task
from experiments.train import make_step
from jaxcomm.training.workers import Place

CONFIGS = Path(__file__).parent.parent / "configs"
README = CONFIGS.parent / "README.md"
BEGIN, END = "<!-- methods -->", "<!-- end of methods -->"


class Method(NamedTuple):
    """A row of the table."""

    name: str
    paper: str
    bits: str
    collectives: str
    state: float
    config: str


def names(task: str = "digits") -> list[str]:
    """Names of the configs of a task."""
    return sorted(p.stem for p in CONFIGS.glob(f"{task}_*.py"))


def describe(name: str) -> Method:
    """The row of a config, traced with simulated workers."""
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    config.mode = "simulate"
    task = make_task(config)
    step = make_step(config, task.loss_fn)
    params = jax.eval_shape(task.init, jax.random.key(0))
    state = step.abstract_state(params, jax.random.key(0))
    batch = next(task.train_iterator(config.batch_size, 0))
    report = jaxcomm.traffic(step, state, batch)
    title, paper = _docstring(module.__doc__ or "")
    ops = dict.fromkeys(c.op for c in report.collectives if c.part != "metrics")
    return Method(
        name=title,
        paper=paper,
        bits=_message_bits(report),
        collectives=" + ".join(ops),
        state=_worker_floats(step.places, state, config.workers) / report.elements,
        config=f"configs/{name}.py",
    )


def _docstring(text: str) -> tuple[str, str]:
    """The method's name (up to the first `;`), and 'authors year (arXiv number)' of its source."""
    title, source = text.split(";")[0].strip(), " ".join(text.partition("Source:")[2].split())
    authors = re.match(r".+? \d{4}", source)
    number = re.search(r"arXiv [\d.]+\d", source)
    paper = f"{authors[0]} ({number[0]})" if authors and number else authors[0] if authors else ""
    return title, paper


def _message_bits(report: jaxcomm.Traffic) -> str:
    """Bits a coordinate that a worker puts into messages; `or` between branches."""
    every, branches = 0, {}
    for c in report.collectives:
        if c.part == "metrics":
            continue
        if c.when:
            branches[c.when] = branches.get(c.when, 0) + c.operand_bytes
        else:
            every += c.operand_bytes
    bits = lambda count: f"{8 * count / report.elements:.2f}".rstrip("0").rstrip(".")
    shown = [bits(every)] if every else []
    choices = dict.fromkeys(map(bits, branches.values()))  # pairings, say, that cost the same
    shown += [" or ".join(choices)] if branches else []
    return " + ".join(shown)


def _worker_floats(places, state, workers: int) -> float:
    pairs = zip(jax.tree.leaves(places), jax.tree.leaves(state))
    return sum(math.prod(x.shape) / workers for p, x in pairs if p is Place.PER_WORKER)


def table() -> str:
    """The markdown table of all methods."""
    lines = [
        "| method | source | bits a coordinate | collectives | state a worker | config |",
        "|---|---|---|---|---|---|",
    ]
    for name in names():
        m = describe(name)
        lines.append(
            f"| {m.name} | {m.paper} | {m.bits} | {m.collectives} | {m.state:.1f} d "
            f"| [{Path(m.config).stem}]({m.config}) |"
        )
    return "\n".join(lines)


def readme_table() -> str:
    """The table as README.md has it."""
    return README.read_text().split(BEGIN)[1].split(END)[0].strip()


def main(arguments: list[str]) -> None:
    new = table()
    print(new)
    if "--update" in arguments:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(sys.argv[1:])
