"""Layers import only those above them in the table, and nothing is imported in a circle."""

import ast
from pathlib import Path

import pytest

LAYERS = ["compressors", "collectives", "transforms", "sync", "traffic", "training"]
# training counts bytes, so traffic stands before it; traffic itself needs only collectives
MAY = {
    "compressors": [],
    "collectives": ["compressors"],
    "transforms": ["compressors", "collectives"],
    "sync": ["compressors", "collectives", "transforms"],
    "traffic": ["compressors", "collectives"],
    "training": ["compressors", "collectives", "transforms", "sync", "traffic"],
}
ROOT = Path(__file__).parent.parent / "jaxcomm"
MODULES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT)


def _module(package: str, name: str) -> str:
    """`from package import name`: the submodule of that name, if it is one."""
    path = ROOT.parent.joinpath(*package.split("."), name)
    return f"{package}.{name}" if path.is_dir() or path.with_suffix(".py").exists() else package


def imported(path: Path) -> set[str]:
    """Layers of jaxcomm (and whatever of experiments) that a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [_module(node.module, alias.name) for alias in node.names]
        ours = ("jaxcomm", "experiments", "configs")
        found |= {name for name in names if name and name.split(".")[0] in ours}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_up_only(path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] == "jaxcomm", f"the library imports {name}"
        assert len(parts) > 1, f"{path} imports the whole of jaxcomm"
        assert parts[1] == layer or parts[1] in MAY[layer], f"{layer} imports {name}"


def test_every_layer_is_in_the_table():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(LAYERS) == set(MAY)


def test_no_import_cycles():
    graph = {}
    for path in MODULES:
        name = "jaxcomm." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name.removesuffix(".__init__")] = imported(path)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]):
        assert name not in trail, " -> ".join((*trail, name))
        if name in done or name not in graph:
            return
        for other in graph[name]:
            # inside a package a module may import its siblings, not its own __init__
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())
