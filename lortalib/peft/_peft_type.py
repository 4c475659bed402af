"""Adds the method to PEFT's enumeration of methods."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

NAME = "LORTA"


def peft_type() -> PeftType:
    """Return ``PeftType.LORTA``; add the member first if it is missing.

    PEFT looks methods up by the members of a closed enumeration, so the member is made in the same way as
    `enum` makes members.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)
