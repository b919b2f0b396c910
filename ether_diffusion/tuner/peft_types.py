"""ETHER and full fine-tuning as members of PEFT's own enum of methods."""

from peft.utils import PeftType


def peft_type(name: str) -> PeftType:
    """Return the member of PEFT's `PeftType` of this name, made if PEFT has none.

    PEFT and transformers read `.value` of a method's type, look it up in `PeftType` and in PEFT's mappings.
    An enum is closed, so a new member is entered where `enum` itself enters one: as an attribute, by name and
    by value.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member
