"""A traced program run anew, some of its equations by another rule."""

from collections.abc import Callable, Sequence

from jax import lax

Rule = Callable[[object, list], Sequence | None]  # (equation, values): its outputs; None: as it is
REDUCERS = ("reduce", "reduce_window")  # their program combines two elements


def evaluate(program, args: Sequence, rule: Rule) -> list:
    """The outputs of a program; equations inside conditionals, loops and calls follow the rule too.

    Args:
      program: a closed jaxpr; or an open one without constants, as some calls hold.
      args: its inputs.
      rule: gives an equation's outputs, or None where it is to run as it is.

    Raises:
      ValueError: not as many inputs as the program takes.
    """
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    if len(args) != len(jaxpr.invars):
        raise ValueError(f"the program takes {len(jaxpr.invars)} arrays, got {len(args)}")
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, outputs(eqn, [read(atom) for atom in eqn.invars], rule)))
    return [read(atom) for atom in jaxpr.outvars]


def outputs(eqn, args: list, rule: Rule) -> Sequence:
    """What one equation gives."""
    name, params = eqn.primitive.name, eqn.params
    if (found := rule(eqn, args)) is not None:
        return found
    if name == "cond":
        runs = [lambda *ops, b=b: evaluate(b, ops, rule) for b in params["branches"]]
        return lax.switch(args[0], runs, *args[1:])
    if name == "scan":
        return _scan(eqn, args, rule)
    if name == "while":
        return _while(params, args, rule)
    if (inner := _inlined(eqn)) is not None:
        return evaluate(inner, args, rule)
    return bind(eqn, args)


def bind(eqn, args: list) -> list:
    """What an equation gives as it is."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _inlined(eqn):
    """The one sub-program of a call (jit, shard_map, remat, custom derivatives), if it is one."""
    if eqn.primitive.name in REDUCERS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if inner is not None and hasattr(getattr(inner, "jaxpr", inner), "eqns"):
            return inner
    return None


def _scan(eqn, args: list, rule: Rule) -> list:
    params, inner = eqn.params, eqn.params["jaxpr"].jaxpr
    # what is scanned over or stacked has one axis more outside; JAX's own names for it change
    same = lambda outside, inside: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside))
    n_carry = same(eqn.outvars, inner.outvars)
    n_consts = same(eqn.invars, inner.invars) - n_carry
    consts, carry, xs = args[:n_consts], args[n_consts:][:n_carry], args[n_consts + n_carry :]

    def body(carry, x):
        out = evaluate(params["jaxpr"], (*consts, *carry, *x), rule)
        return out[:n_carry], out[n_carry:]

    options = {"length": params["length"], "reverse": params["reverse"]}
    carry, ys = lax.scan(body, carry, xs, unroll=params["unroll"], **options)
    return [*carry, *ys]


def _while(params, args: list, rule: Rule) -> list:
    a, b = params["cond_nconsts"], params["body_nconsts"]
    test, consts, carry = args[:a], args[a : a + b], args[a + b :]
    return lax.while_loop(
        lambda carry: evaluate(params["cond_jaxpr"], (*test, *carry), rule)[0],
        lambda carry: evaluate(params["body_jaxpr"], (*consts, *carry), rule),
        carry,
    )
