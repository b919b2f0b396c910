"""The shipped control adapter: what it draws follows shapes no concept has, for concepts it never saw."""

import pytest

from ether_diffusion.control import read_control
from ether_diffusion.tiny_world import control_adapter_path
from recipes.tiny_world.control_pairs import training_concepts
from recipes.tiny_world.drawn_shapes import CASES, draw_cases


def test_it_is_read_as_every_control_adapter() -> None:
    assert read_control(control_adapter_path()).config.control_type == "silhouette"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in control_adapter_path().iterdir()) < 1_000_000


@pytest.mark.slow
def test_objects_fill_drawn_shapes_far_better_than_the_base_s() -> None:
    assert not {case.concept for case in CASES} & set(training_concepts())
    ious = {
        name: sum(found) / len(found) for name, found in draw_cases(control_adapter_path()).ious().items()
    }
    assert ious["result"] > 0.8
    assert ious["result"] > ious["base"] + 0.3
