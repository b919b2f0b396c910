"""Random transforms of growing strength: what they are, how far they reach, and that they leave no trace."""

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from oracles import dense_blocks
from torch import nn

from ether_diffusion.reflections import Vectors, rows
from research import study_transforms as rt
from research.distances import distance_to_identity
from research.study_transforms import METHODS, STRENGTHS, main

WIDTH, HEIGHT = 32, 48


def transform(method: str, strength: float, seed: int = 0) -> tuple[torch.Tensor, float]:
    """W' of the identity: T itself for one-sided methods."""
    return rt.random_transform(torch.eye(WIDTH), method, strength, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ether"])
def test_no_strength_is_the_identity(method: str) -> None:
    weight = torch.randn(HEIGHT, WIDTH)
    made, distance = rt.random_transform(weight, method, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, weight, atol=1e-6, rtol=1e-5)
    assert distance < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_the_distance_is_that_of_the_matrix(method: str) -> None:
    made, distance = transform(method, 0.6)
    if method != "ether_plus":  # which stands on both sides
        assert distance == pytest.approx(float((made - torch.eye(WIDTH)).norm()), rel=1e-5)


def test_ether_is_always_two_for_each_block_in_quadrature() -> None:
    distances = [transform("ether", strength)[1] for strength in STRENGTHS]
    assert distances == pytest.approx([2 * math.sqrt(rt.NUM_BLOCKS)] * len(STRENGTHS), rel=1e-6)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_ether_plus_reaches_the_sine_of_its_angle(strength: float) -> None:
    expected = math.sqrt(2 * rt.NUM_BLOCKS) * strength
    assert transform("ether_plus_one_sided", strength)[1] == pytest.approx(expected, rel=1e-4)
    assert transform("ether_plus", strength)[1] == pytest.approx(math.sqrt(2) * expected, rel=1e-4)


@pytest.mark.parametrize("strength", [0.5, 0.97])
def test_oft_is_orthogonal_in_blocks(strength: float) -> None:
    made, _ = transform("oft", strength)
    torch.testing.assert_close(made @ made.T, torch.eye(WIDTH), atol=1e-5, rtol=0)
    side = WIDTH // rt.NUM_BLOCKS
    assert made[:side, side:].abs().max() == 0


def test_naive_has_the_norm_that_its_strength_says() -> None:
    made, _ = transform("naive", 0.75)
    assert float(torch.linalg.matrix_norm(made - torch.eye(WIDTH), ord=2)) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("plus", [False, True])
def test_the_distance_from_rows_is_that_of_the_dense_matrix(plus: bool) -> None:
    side = Vectors(torch.randn(4, 8), torch.randn(4, 8) if plus else None)
    expected = float((dense_blocks(side) - torch.eye(32)).norm())
    assert distance_to_identity(rows([side], torch.float32)[0]) == pytest.approx(expected, rel=1e-5)


def test_weights_are_the_very_tensors_again_also_after_an_error() -> None:
    layer = nn.Linear(WIDTH, HEIGHT)
    before = layer.weight
    for error in (None, RuntimeError("broken")):
        with suppress(RuntimeError), rt.transformed([layer], "oft", 0.5, seed=0) as distances:
            assert layer.weight is not before
            assert distances["weight_distance"] > 0.1
            if error is not None:
                raise error
        assert layer.weight is before


def test_the_study_writes_numbers_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--strengths", "1", "--output_dir", str(tmp_path / "study")]) == 2
    assert "found 1" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
    arguments = ["--methods", "ether", "oft", "--strengths", "0.25", "--inference_steps", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "study")]) == 0
    found = json.loads((tmp_path / "study/transforms.json").read_text())
    assert set(found["methods"]) == {"ether", "oft"}
    assert found["methods"]["oft"]["0.25"]["weight_distance"] > 0.1
    assert found["base"]["likeness_to_base"]["mean"] == pytest.approx(1)
    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        "transforms.json",
        "transforms.png",
        "transforms_sheet.png",
    }
