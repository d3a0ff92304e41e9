"""What the operator, every score, the sampler and the counts gave at an earlier commit is what they give now."""

import json

import pytest

from tests.pins.cases import CASES
from tests.pins.stored import FILE, compare, machine

STORED = json.loads(FILE.read_text())
NAMES = [(group, name) for group, names in CASES.items() for name in names]


def test_every_case_is_stored():
    assert {f"{group}: {name}" for group, name in NAMES} == set(STORED["cases"])


@pytest.mark.parametrize(("group", "name"), NAMES, ids=[f"{group}: {name}" for group, name in NAMES])
def test_equals_what_it_was(group, name):
    expected = STORED["cases"][f"{group}: {name}"]
    observed = CASES[group][name](expected["seed"], 0.0)
    assert set(observed) == set(expected["observed"])
    same_machine = machine() == STORED["machine"]
    wrong = {
        key: found
        for key, x in observed.items()
        if (found := compare(expected["observed"][key], x, same_machine=same_machine)) is not None
    }
    assert not wrong
