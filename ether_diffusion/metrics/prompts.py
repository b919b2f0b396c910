"""Prompts without the subject: what an adapter should leave as the base draws it."""

from ether_diffusion.tiny_world.backgrounds import Background
from ether_diffusion.tiny_world.concepts import load_concepts
from ether_diffusion.tiny_world.world import Scene

OTHER_PROMPTS = (
    "a photo of a dog on a beach",
    "a cat asleep on a sofa",
    "a portrait of an old woman, natural light",
    "a bowl of fruit on a wooden table",
    "a red car parked in a narrow street",
    "a mountain lake at sunrise",
    "a city skyline at night",
    "a watercolor painting of a sailing boat",
    "a child's backpack on a chair",
    "an oil painting of a forest in autumn",
)
"""For bases of photographs: animals, things, people, places and styles."""

_BACKGROUNDS = ("red", "blue", "white", "green", "yellow", "gray", "teal", "pink")


def other_tiny_prompts() -> tuple[str, ...]:
    """Return captions of concepts that Tiny World was trained on, spread over its kinds."""
    concepts = load_concepts("trained")
    stride = len(concepts) // len(_BACKGROUNDS)
    return tuple(
        Scene(concepts[number * stride], Background("plain", colour)).caption()
        for number, colour in enumerate(_BACKGROUNDS)
    )
