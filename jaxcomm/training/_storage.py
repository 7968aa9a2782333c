"""What a checkpoint is made of: leaves as storable arrays, JSON texts, checksums.

A state is stored flat, one array for each leaf under its path, so any pytree can be stored. Orbax
refuses empty arrays and 4-bit dtypes and, with several processes, arrays that live on one of them:
empty leaves are only described, narrow ones widened to 8 bits (or float32), local and replicated
ones read through the host. Typed keys are stored as their data; the key type is in the layout.
"""

import base64
import functools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_ABSENT = "absent"


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, in order; None is no leaf."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path) or "root": leaf for path, leaf in paths}


def layout(flat: dict[str, Any]) -> dict[str, str]:
    """'float32[8,4]' for every leaf; 'key<threefry2x32>[]' for a typed key."""
    return {path: _describe(leaf) for path, leaf in flat.items()}


def data_spec(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what is stored for a leaf."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    spec = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        spec = jax.eval_shape(jax.random.key_data, spec)
    return jax.ShapeDtypeStruct(spec.shape, _wide(spec.dtype))


def pack(leaf: Any) -> Any:
    """A leaf as an array that Orbax can store."""
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
    elif _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype != _wide(leaf.dtype):
        leaf = leaf.astype(_wide(leaf.dtype))
    local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return np.asarray(leaf) if local and jax.process_count() > 1 else leaf


def abstract(leaf: Any) -> Any:
    """How Orbax shall read what was stored for a leaf: by shard, or whole into host memory."""
    spec, sharding = data_spec(leaf), getattr(leaf, "sharding", None)
    if sharding is None or sharding.is_fully_replicated:
        return on_host(leaf)
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)


def on_host(leaf: Any) -> np.ndarray:
    """How Orbax shall read it whole into host memory."""
    spec = data_spec(leaf)
    return np.empty(spec.shape, spec.dtype)


def unpack(value: Any, leaf: Any) -> Any:
    """What was read (None for an empty leaf) as a leaf like `leaf`: type, dtype, devices."""
    spec = data_spec(leaf)
    if value is None:
        value = np.zeros(spec.shape, spec.dtype)
    if not hasattr(leaf, "sharding"):
        value = np.asarray(value)
        return value if isinstance(leaf, np.ndarray) else type(leaf)(value.item())
    if not _is_key(leaf) and value.dtype != leaf.dtype:
        value = value.astype(leaf.dtype)
    if not isinstance(value, jax.Array):
        value = _on_devices(value, leaf)
    return jax.random.wrap_key_data(value, impl=_impl(leaf)) if _is_key(leaf) else value


def _on_devices(value: np.ndarray, leaf: Any) -> jax.Array:
    # An uncommitted array follows the others of a computation; a committed one would clash.
    if leaf.sharding is None or not getattr(leaf, "committed", True):
        weak = getattr(leaf, "weak_type", False) and value.ndim == 0
        return jnp.asarray(value.item()) if weak else jnp.array(value)
    return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(leaf: Any) -> Any:
    """Name of the key type, also of an abstract key."""
    found = []
    spec = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), spec)
    return found[0]


def _wide(dtype: Any) -> np.dtype:
    """The dtype in which a dtype is stored."""
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8:
        return np.dtype(np.int8 if jnp.issubdtype(dtype, jnp.signedinteger) else np.uint8)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 8:
        return np.dtype(np.float32)
    return np.dtype(dtype)


def _describe(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    name = f"key<{_impl(leaf)}>" if _is_key(leaf) else str(leaf.dtype)
    return f"{name}[{','.join(map(str, leaf.shape))}]"


def layout_difference(theirs: dict[str, str], ours: dict[str, str]) -> str | None:
    """The first leaf that is not the same in a checkpoint and in this run, as half a sentence."""
    for path in [*ours, *theirs]:
        there, here = theirs.get(path, _ABSENT), ours.get(path, _ABSENT)
        if there != here:
            return f"holds another state: {path} is {there} there and {here} in this run"
    return None


def config_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The settings that are not the same, as half a sentence."""
    changes = config_changes(theirs, ours)
    each = [f"{key}={was}, this run has {now}" for key, was, now in changes]
    return f"was written with {'; '.join(each)}" if each else None


def config_changes(theirs: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that are not the same: (key with dots, theirs, ours)."""
    was, now = dict(_settings(theirs)), dict(_settings(ours))
    pairs = [(key, was.get(key, _ABSENT), now.get(key, _ABSENT)) for key in was | now]
    return [(key, old, new) for key, old, new in pairs if old != new]


def _settings(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('model.width', 32) for {'model': {'width': 32}}."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _settings(value, f"{prefix}.{key}" if prefix else str(key))


def dumps(value: Any) -> str:
    """JSON; bytes and NumPy scalars are allowed, tuples become lists."""
    return json.dumps(value, default=_encode)


def loads(text: str) -> Any:
    """The inverse of `dumps`."""
    return json.loads(text, object_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"must be JSON values or bytes, got {type(value).__name__}")


def _decode(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["__bytes__"]) if set(value) == {"__bytes__"} else value


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path begins like gs://, which is gs:/ once it is a `Path`."""
    return re.match(r"\w{2,}:/", str(path)) is not None


def crc32(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def is_split(leaf: Any) -> bool:
    """Whether this process holds only some of a leaf's rows."""
    return _is_remote(leaf) and not leaf.is_fully_replicated


def own_rows(leaf: Any) -> np.ndarray:
    """A copy of the rows that this process holds, in order; of a leaf that is not split, all."""
    if not is_split(leaf):
        return np.array(leaf.addressable_data(0) if _is_remote(leaf) else leaf)
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _is_remote(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def gathered(tree: Any) -> Any:
    """A tree with all rows of its leaves on this process, which are there when it returns.

    All processes of its devices must call it.
    """
    leaves, treedef = jax.tree.flatten(tree)
    split = [i for i, leaf in enumerate(leaves) if is_split(leaf)]
    if split:
        mesh = leaves[split[0]].sharding.mesh
        for i, whole in zip(split, _replicate(mesh)([leaves[i] for i in split])):
            leaves[i] = whole
    leaves = [leaf.addressable_data(0) if _is_remote(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, jax.block_until_ready(leaves))


@functools.cache
def _replicate(mesh: Any) -> Any:
    return jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, P()))


def from_this(value: Any) -> list[Any]:
    """The JSON value of this process alone."""
    return [json.loads(dumps(value))]


def from_all(value: Any) -> list[Any]:
    """The JSON value of every process, in order; all of them must call it."""
    if jax.process_count() == 1:
        return from_this(value)
    text = np.frombuffer(dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]
