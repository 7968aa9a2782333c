"""Cutting a parameter tree into fragments that meet at different times.

The tree is seen as a list of units: a layer where a path shows one (the first part that is a number
or ends in one, such as `blocks/block_03` or `2`), else the module that holds the leaf. Units keep
the tree's order, layers of one kind that of their numbers; U units go to P fragments by pattern:

    strided     unit j to fragment j mod P
    sequential  unit j to fragment floor(j P / U)
    balanced    the largest unit left to the fragment that has the fewest elements
"""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

PATTERNS = ("strided", "sequential", "balanced")
Fragments = int | Sequence[Sequence[str]]


def owners(params, fragments: Fragments, pattern: str, where: str) -> tuple[int, ...]:
    """The fragment of every leaf, in tree order.

    Args:
      params: the tree; only paths, shapes and dtypes are read.
      fragments: how many, or for each the paths of its leaves or of the modules that hold them.
      pattern: one of PATTERNS; only used with a number.
      where: the rule's name, for errors.

    Raises:
      ValueError: there are fewer units than fragments; or given paths do not cover the tree, name
        a leaf twice, or name nothing.
    """
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(params)
    ]
    if not isinstance(fragments, int):
        return _named(paths, fragments, where)
    units = _units(paths)
    order = _in_order(list(dict.fromkeys(units)))
    if len(order) < fragments:
        raise ValueError(
            f"{where}: the tree has only {len(order)} layers or modules ({', '.join(order)}) for "
            f"fragments={fragments}"
        )
    if pattern == "balanced":
        fragment_of = _balanced(order, units, jax.tree.leaves(params), fragments)
    elif pattern == "strided":
        fragment_of = {unit: j % fragments for j, unit in enumerate(order)}
    else:
        fragment_of = {unit: j * fragments // len(order) for j, unit in enumerate(order)}
    return tuple(fragment_of[unit] for unit in units)


def split(tree, owner: tuple[int, ...], count: int) -> list:
    """The fragments: trees of the same structure, with optax.MaskedNode for the others' leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    masked = optax.MaskedNode()
    return [
        jax.tree.unflatten(treedef, [x if p == q else masked for x, p in zip(leaves, owner)])
        for q in range(count)
    ]


def join(parts: Sequence, owner: tuple[int, ...], like):
    """The tree that `split` took apart; `like` has its structure."""
    leaves = [iter(jax.tree.leaves(part)) for part in parts]
    return jax.tree.unflatten(jax.tree.structure(like), [next(leaves[p]) for p in owner])


def _units(paths: Sequence[str]) -> list[str]:
    units = []
    for path in paths:
        parts = path.split("/")
        numbered = [i for i, part in enumerate(parts) if part[-1:].isdigit()]
        depth = numbered[0] + 1 if numbered else max(len(parts) - 1, 1)
        units.append("/".join(parts[:depth]))
    return units


def _in_order(units: list[str]) -> list[str]:
    """Tree order, but block_2 before block_10."""
    stem = lambda unit: re.sub(r"\d+", "#", unit)
    first = {stem(unit): j for j, unit in reversed(list(enumerate(units)))}
    numbers = lambda unit: [int(digits) for digits in re.findall(r"\d+", unit)]
    return sorted(units, key=lambda unit: (first[stem(unit)], numbers(unit)))


def _balanced(order, units, leaves, fragments: int) -> dict[str, int]:
    size = dict.fromkeys(order, 0)
    for unit, leaf in zip(units, leaves):
        size[unit] += math.prod(jnp.shape(leaf))  # messages are coded from float32
    total, fragment_of = [0] * fragments, {}
    for unit in sorted(order, key=lambda unit: -size[unit]):
        lightest = total.index(min(total))
        fragment_of[unit] = lightest
        total[lightest] += size[unit]
    return fragment_of


def _named(paths: Sequence[str], groups: Sequence[Sequence[str]], where: str) -> tuple[int, ...]:
    holds = lambda prefix, path: path == prefix or path.startswith(prefix + "/")
    for prefix in (prefix for group in groups for prefix in group):
        if not any(holds(prefix, path) for path in paths):
            raise ValueError(f"{where}: fragments name {prefix!r}, which the tree does not have")
    owner = []
    for path in paths:
        found = [p for p, group in enumerate(groups) if any(holds(q, path) for q in group)]
        if not found:
            raise ValueError(
                f"{where}: the fragments do not cover the tree: add {path!r} to one of them"
            )
        if len(found) > 1:
            raise ValueError(f"{where}: {path!r} is in fragments {found}; leave it in one of them")
        owner.append(found[0])
    return tuple(owner)
