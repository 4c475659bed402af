"""The laws hold over every door: one that lacks a verb says so, and has all others."""

import pytest
from adapted import FORMATS
from doors import DOORS, cases
from models import LAW_FAMILIES

VERBS = ("delta", "merge", "save", "export_lora", "rows")
#: What is no method: that parameters train, that names of the base stay, families and formats.
OTHERS = {"gradients", "names", *LAW_FAMILIES, *FORMATS}


@pytest.mark.parametrize("name", DOORS)
def test_a_door_has_a_verb_or_says_why_not(name):
    door = DOORS[name]
    assert door.lacks.keys() <= {*VERBS} | OTHERS
    for verb in VERBS:
        assert hasattr(door, verb) != (verb in door.lacks), verb
    assert all(" " in reason for reason in door.lacks.values())


@pytest.mark.parametrize("name", DOORS)
def test_every_door_has_laws_for_every_family_that_it_takes(name):
    families = {family for door, _, family in cases() if door == name}
    assert families == LAW_FAMILIES.keys() - DOORS[name].lacks.keys()
