"""The README's table of methods is the one that the configs give."""

import pytest

from experiments import methods


def test_every_method_has_two_configs_and_a_row():
    names = methods.names("digits")
    readme = methods.readme_table()
    assert [n.replace("digits_", "lm_") for n in names] == methods.names("lm")
    for name in names:
        assert f"[{name}](configs/{name}.py)" in readme


@pytest.mark.parametrize("name", ["digits_dense", "digits_ef21", "digits_one_bit_adam"])
def test_row(name):
    m = methods.describe(name)
    row = next(line for line in methods.readme_table().splitlines() if f"configs/{name}.py" in line)
    assert f"| {m.bits} |" in row
    assert f"| {m.collectives} |" in row
    assert f"| {m.state:.1f} d " in row


@pytest.mark.slow
def test_readme_is_up_to_date():
    assert methods.readme_table() == methods.table().strip()
