"""Reports say all numbers and all that is not among them, as JSON, as a table and as a plot."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.plots import draw_report
from ether_diffusion.metrics.report import DrawnSamples, Report, Yardsticks, report_drawn, report_generated
from ether_diffusion.metrics.scores import OTHER_PROMPTS, Sample, SortedSamples, other_tiny_prompts
from ether_diffusion.tiny_world.concepts import load_concepts

PROMPTS = ("a $5 fox", "a 狐", "an owl")


def noise(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))


def row(start: int, prompts: tuple[str, ...] = PROMPTS) -> list[Sample]:
    """Two pictures of each prompt."""
    return [
        Sample(f"prompt{number + 1}_seed{seed}", noise(start + 10 * number + seed), prompt, seed)
        for number, prompt in enumerate(prompts)
        for seed in range(2)
    ]


def blackened(samples: list[Sample], place: int) -> list[Sample]:
    sample = samples[place]
    black = Sample(sample.name, Image.new("RGB", (64, 64)), sample.prompt, sample.seed)
    return [black if each is sample else each for each in samples]


@pytest.fixture(scope="module")
def yardsticks() -> Yardsticks:
    return Yardsticks([load_encoder("tiny_world")], None, None, {"lpips": "no weights"})


@pytest.fixture(scope="module")
def photos() -> SortedSamples:
    return SortedSamples(tuple(row(500)), {"dark.png": "is black"})


@pytest.fixture(scope="module")
def report(yardsticks: Yardsticks, photos: SortedSamples) -> Report:
    drawn = DrawnSamples(
        {"base": row(0), "adapter": blackened(row(100), 1)},
        {"base": row(200, ("a car",) * 1), "adapter": row(200, ("a car",) * 1)},
    )
    return report_drawn(photos, drawn, yardsticks, {"seeds": [0, 1]})


def test_a_black_picture_is_named_and_not_averaged_in(report: Report, photos: SortedSamples) -> None:
    assert report.rows["adapter"].columns["tiny_i"].num_values == 5
    assert report.rows["base"].columns["tiny_i"].num_values == 6
    found = report.to_json()["set_aside"]
    assert found == {"photos": {"dark.png": "is black"}, "adapter": {"prompt1_seed1": "is black"}}
    table = report.table()
    assert "not scored of adapter: prompt1_seed1 is black" in table
    assert "not scored of photos: dark.png is black" in table


def test_an_adapter_that_changes_nothing_has_no_drift(report: Report) -> None:
    assert report.drift["tiny"].mean == pytest.approx(0, abs=1e-6)
    assert report.drift["pixels"].mean == 0


def test_a_black_picture_leaves_its_pair_out_of_the_drift(
    yardsticks: Yardsticks, photos: SortedSamples
) -> None:
    prompts = ("a car", "a house")
    base = row(200, prompts)
    drawn = DrawnSamples(
        {"base": row(0), "adapter": row(0)}, {"base": base, "adapter": blackened(row(200, prompts), 2)}
    )
    found = report_drawn(photos, drawn, yardsticks, {})
    assert found.drift["pixels"].mean == 0
    assert found.drift["pixels"].num_values == 3
    assert found.to_json()["set_aside"]["other"] == {"prompt2_seed0 (adapter)": "is black"}  # type: ignore[index,call-overload]


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
    assert lines[0].split() == ["tiny_i", "tiny_t"]
    found = report.rows["base"].columns["tiny_i"]
    assert lines[2].startswith(f"base     {found.mean:.3f} ± {found.standard_error:.3f}")
    assert lines[1].split()[-1] == "-"


def test_the_plot_is_a_png_of_any_prompts(report: Report) -> None:
    data = draw_report(report)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert draw_report(report) == data


def test_pictures_without_prompts_are_plotted_without_them(
    yardsticks: Yardsticks, photos: SortedSamples
) -> None:
    generated = SortedSamples(tuple(Sample(each.name, each.image) for each in row(0)), {})
    found = report_generated(photos, generated, yardsticks, {})
    assert found.reasons()["tiny_t"] == "the prompts of the pictures are not known"
    with Image.open(io.BytesIO(draw_report(found))) as picture:
        assert picture.width < 1000


def test_the_prompts_without_the_subject_are_distinct_and_of_things_that_the_base_knows() -> None:
    assert len(set(OTHER_PROMPTS)) == len(OTHER_PROMPTS)
    tiny = other_tiny_prompts()
    assert len(set(tiny)) == len(tiny) == 8
    trained, held_out = (
        [concept.phrase for concept in load_concepts(split)] for split in ("trained", "held_out")
    )
    assert all(any(prompt.startswith(f"{phrase} ") for phrase in trained) for prompt in tiny)
    assert not any(prompt.startswith(f"{phrase} ") for phrase in held_out for prompt in tiny)
