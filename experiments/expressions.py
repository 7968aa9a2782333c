"""Configs name methods as the Python expressions of the library, kept as strings.

`config.tx = "optax.chain(ef21(top_k(0.01), axis_name), optax.adamw(learning_rate))"` can be
printed, stored beside a checkpoint and changed on the command line. Only calls of jaxcomm's and
Optax's public functions, names in scope, literals and arithmetic are understood: nothing else runs.
"""

import ast
import operator
from typing import Any

import jax.numpy as jnp
import optax

import jaxcomm

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
# what functions raise that are given something else than they want
_REFUSED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_MODULES = {"optax": optax, "jnp": jnp}


def evaluate(text: str, field: str, **scope: Any) -> Any:
    """The value of an expression over jaxcomm's names, `optax.*`, `jnp.*` and `scope`.

    Args:
      text: the expression.
      field: the config field it came from, for errors.
      **scope: further names, such as axis_name and learning_rate.

    Raises:
      ValueError: it does not parse, uses a name that is not there, or its call fails.

    Example:
      >>> evaluate("top_k(k=2 * n)", "config.compressor", n=3).k
      6
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, scope)
    except SyntaxError as error:
        raise ValueError(f"{field} is not an expression: {text!r} ({error.msg})") from error
    except _REFUSED as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{field} = {text!r}: {reason}") from error


def _value(node: ast.expr, scope: dict[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return _name(node.id, scope)
        case ast.Attribute():
            return _attribute(node, scope)
        case ast.Tuple() | ast.List():
            return tuple(_value(item, scope) for item in node.elts)
        case ast.Dict():
            keys = [None if key is None else _value(key, scope) for key in node.keys]
            return dict(zip(keys, (_value(value, scope) for value in node.values)))
        case ast.UnaryOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.operand, scope))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_value(node.left, scope), _value(node.right, scope))
        case ast.Call() if all(keyword.arg for keyword in node.keywords):
            args = [_value(arg, scope) for arg in node.args]
            kwargs = {str(k.arg): _value(k.value, scope) for k in node.keywords}
            return _value(node.func, scope)(*args, **kwargs)
    raise ValueError(f"{ast.unparse(node)} is not allowed in a config expression")


def _name(name: str, scope: dict[str, Any]) -> Any:
    if name in scope:
        return scope[name]
    if name in _MODULES:
        return _MODULES[name]
    if not name.startswith("_") and callable(getattr(jaxcomm, name, None)):
        return getattr(jaxcomm, name)
    raise ValueError(
        f"there is no {name!r}: use jaxcomm's public names, optax.*, or {', '.join(sorted(scope))}"
    )


def _attribute(node: ast.Attribute, scope: dict[str, Any]) -> Any:
    owner = _value(node.value, scope)
    if owner not in (optax, optax.contrib, jnp) or node.attr.startswith("_"):
        raise ValueError(f"{ast.unparse(node)} is not allowed in a config expression")
    if not hasattr(owner, node.attr):
        raise ValueError(f"there is no {ast.unparse(node)}")
    return getattr(owner, node.attr)
