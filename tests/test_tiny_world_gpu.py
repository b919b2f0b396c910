"""The plan of stages for minutes on a GPU."""

import subprocess
from pathlib import Path

import pytest

from recipes.tiny_world.gpu import PLAN
from recipes.tiny_world.loop import RunConfig
from recipes.tiny_world.stages import STAGES

SCRIPT = Path(__file__).parent.parent / "recipes" / "tiny_world" / "train_on_gpu.sh"


def test_the_plan_for_a_gpu_has_stages_that_exist_and_shares_that_sum_to_one() -> None:
    assert {part.stage for part in PLAN} <= set(STAGES)
    assert sum(part.share for part in PLAN) == pytest.approx(1.0)
    assert all(RunConfig(decay_fraction=part.decay_fraction) for part in PLAN)


def test_the_script_is_bash_and_refuses_to_start_without_its_folders() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    refused = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
