"""Every example in a docstring and in the README runs."""

import contextlib
import doctest
import importlib.util
import io
import pkgutil
import re
from pathlib import Path

import pytest

import configs
import experiments
import jaxcomm

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def modules():
    """Every module of the three packages that can be imported here.

    `__main__` modules would start something; PyTorch is an extra.
    """
    without_torch = importlib.util.find_spec("torch") is None
    for package in (jaxcomm, experiments, configs):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            skipped = found.name.endswith("__main__") or (without_torch and "torch" in found.name)
            if not skipped:
                yield found.name


@pytest.mark.parametrize("name", list(modules()))
def test_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what an example writes is not left behind
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [t for name in modules() for t in finder.find(importlib.import_module(name))]
    assert sum(len(t.examples) for t in tests) > 50


def readme_blocks():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="no README")
def test_readme(tmp_path, monkeypatch):
    """The python blocks run one after the other, in one namespace, as a reader would type them."""
    blocks = readme_blocks()
    assert blocks, "README.md has no ```python block: its examples cannot be tested"
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for i, block in enumerate(blocks, 1):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, f"README.md, python block {i}", "exec"), names)


@pytest.mark.skipif(not README.exists(), reason="no README")
def test_readme_commands_name_files_that_exist():
    text = README.read_text()
    for path in re.findall(r"--config=(configs/\w+\.py)", text):
        assert path == "configs/NAME.py" or (ROOT / path).exists(), path
    for module in re.findall(r"python -m (experiments\.\w+)", text):
        assert importlib.util.find_spec(module), module
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
