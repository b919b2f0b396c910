"""Reports say all numbers and all that is not among them, as JSON, as a table and as a plot."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.report import Report, Yardsticks, draw_report, report_subject
from ether_diffusion.metrics.scores import (
    OTHER_PROMPTS,
    Sample,
    SortedSamples,
    other_tiny_prompts,
    sort_samples,
)
from ether_diffusion.tiny_world.concepts import load_concepts

PROMPTS = ("a $5 fox", "a 狐", "an owl")
OTHERS = ("a car", "a house")


def row(start: int, prompts: tuple[str, ...] = PROMPTS, *, black: int | None = None) -> list[Sample]:
    """Two pictures of each prompt, one of them black."""
    rng, samples = np.random.default_rng(start), []
    for place in range(2 * len(prompts)):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) * (place != black)
        name = f"prompt{place // 2 + 1}_seed{place % 2}"
        samples.append(Sample(name, Image.fromarray(pixels), prompts[place // 2], place % 2))
    return samples


@pytest.fixture(scope="module")
def yardsticks() -> Yardsticks:
    return Yardsticks([load_encoder("tiny_world")], None, None, {"lpips": "no weights"})


@pytest.fixture(scope="module")
def photos() -> SortedSamples:
    return SortedSamples(tuple(row(500)), {"dark.png": "is black"})


@pytest.fixture(scope="module")
def report(yardsticks: Yardsticks, photos: SortedSamples) -> Report:
    rows = {"base": sort_samples(row(0)), "adapter": sort_samples(row(100, black=1))}
    other = {"base": row(200, OTHERS), "adapter": row(200, OTHERS, black=2)}
    return report_subject(photos, rows, yardsticks, {"seeds": [0, 1]}, other=other)


def test_black_pictures_are_named_and_not_averaged_in(report: Report) -> None:
    assert report.rows["adapter"].columns["tiny_i"].num_values == 5
    assert report.rows["base"].columns["tiny_i"].num_values == 6
    assert report.to_json()["set_aside"] == {
        "photos": {"dark.png": "is black"},
        "adapter": {"prompt1_seed1": "is black"},
        "other": {"prompt2_seed0 (adapter)": "is black"},
    }
    assert "not scored of adapter: prompt1_seed1 is black" in report.table()


def test_an_adapter_that_changes_nothing_has_no_drift_and_a_black_picture_leaves_its_pair_out(
    report: Report,
) -> None:
    assert report.drift["tiny"].mean == pytest.approx(0, abs=1e-6)
    assert (report.drift["pixels"].mean, report.drift["pixels"].num_values) == (0, 3)


def test_the_json_is_strict_and_says_what_is_left_out(report: Report) -> None:
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["encoders"] == {"tiny": "tiny_world"}
    assert found["left_out"]["lpips"] == "no weights"
    assert "needs more than" in found["left_out"]["fid_tiny"]
    assert set(found["scores"]) == {"photos", "base", "adapter"}
    assert set(found["by_prompt"]["adapter"]) == set(PROMPTS)
    error = found["scores"]["base"]["tiny_i"]
    assert (error["num_values"], error["num_groups"]) == (6, 2)
    assert error["standard_error"] > 0


def test_the_table_has_the_numbers_of_the_json(report: Report) -> None:
    lines = report.table().splitlines()
    assert lines[0].split() == ["tiny_i", "tiny_t", "diversity"]
    found = report.rows["base"].columns["tiny_i"]
    assert lines[2].startswith(f"base     {found.mean:.3f} ± {found.standard_error:.3f}")
    assert lines[1].split()[-1] == "-"


def test_the_plot_is_a_png_of_any_prompts_or_of_none(
    report: Report, yardsticks: Yardsticks, photos: SortedSamples
) -> None:
    generated = SortedSamples(tuple(Sample(each.name, each.image) for each in row(0)), {})
    without = report_subject(photos, {"generated": generated}, yardsticks, {})
    assert without.reasons()["tiny_t"] == "the prompts of the pictures are not known"
    for made, is_wide in ((report, True), (without, False)):
        data = draw_report(made)
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.format == "PNG"
            assert (picture.width > 1000) == is_wide
        assert draw_report(made) == data


def test_the_prompts_without_the_subject_are_distinct_and_of_things_that_the_base_knows() -> None:
    assert len(set(OTHER_PROMPTS)) == len(OTHER_PROMPTS)
    tiny = other_tiny_prompts()
    assert len(set(tiny)) == len(tiny) == 8
    trained, held_out = ([each.phrase for each in load_concepts(split)] for split in ("trained", "held_out"))
    assert all(any(prompt.startswith(f"{phrase} ") for phrase in trained) for prompt in tiny)
    assert not any(prompt.startswith(f"{phrase} ") for phrase in held_out for prompt in tiny)
