"""docs/results.md: regenerated from the committed files to the byte, and verdicts that follow the numbers."""

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from measured_files import LIKENESS, benchmark, estimate, learning_rates, others, photos, write_all

from ether_diffusion.benchmark.plan import TINY_LEARNING_RATES, TINY_SUBJECTS
from ether_diffusion.training.config import EvaluationConfig
from research import write_results
from research.claims import CLAIMS
from research.measured import FILES, Measured, difference_of, paired_difference
from research.study_strength import without_rate
from research.write_results import results_page

ROOT = Path(__file__).parent.parent


def verdict(results: Path, part: str) -> tuple[str, str]:
    """Return the verdict on the only claim with these words, and its numbers."""
    (claim,) = [claim for claim in CLAIMS if part in claim.statement]
    return claim.judge(Measured.read(results))


def test_the_committed_page_and_curves_are_those_of_the_committed_files(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    made = ["--docs", str(tmp_path / "docs"), "--curves", str(tmp_path / "curves.json")]
    assert write_results.main(made) == 0
    committed = ROOT / "ether_diffusion" / "benchmark" / "curves.json"
    assert (tmp_path / "docs" / "results.md").read_bytes() == (ROOT / "docs" / "results.md").read_bytes()
    assert (tmp_path / "curves.json").read_bytes() == committed.read_bytes()


def test_every_committed_file_is_one_that_the_page_reads() -> None:
    assert {path.stem for path in (ROOT / "docs" / "results").glob("*.json")} <= set(FILES)


def test_without_files_nothing_is_claimed(tmp_path: Path) -> None:
    verdicts = {claim.judge(Measured({}))[0] for claim in CLAIMS}
    assert verdicts == {"not measured yet", "not testable here"}
    page = results_page(Measured({}), tmp_path)
    assert "**reproduced**" not in page
    assert page.count("not there yet |") >= len(FILES)


def test_every_claim_that_can_be_tested_is_reproduced_by_numbers_like_the_papers(tmp_path: Path) -> None:
    likeness = {name: tuple(value + 0.001 * k for k in range(8)) for name, (value, _) in LIKENESS.items()}
    made = benchmark(likeness)
    for run in made["runs"]:
        run["scores"]["tiny_t"] = 0.6 if run["method"] == "ether" else 0.5
    results = write_all(tmp_path, benchmark=made)
    judged = {claim.statement: claim.judge(Measured.read(results))[0] for claim in CLAIMS}
    assert set(judged.values()) == {"reproduced", "not testable here"}
    assert sum(found == "reproduced" for found in judged.values()) == sum(c.rule is not None for c in CLAIMS)


@pytest.mark.parametrize(
    ("part", "file", "path", "value"),
    [
        ("120 times", "cost", ("methods", "ETHER", "parameters"), 200_000),
        ("30 times", "cost", ("methods", "ETHER+", "parameters"), 797_184),
        ("half of LoRA", "cost", ("methods", "ETHER+", "parameters"), 400_000),
        ("on both sides", "blocks", ("runs", 0, "scores", "object"), 0.1),
        ("number of blocks", "blocks", ("variants", "ETHER", "4", "object"), estimate(0.4)),
        ("survive ETHER+", "transforms", ("methods", "oft", "0.97", "recognised"), estimate(0.9)),
        ("hyperspherical", "energy", ("methods", "ether", "absolute_change"), estimate(0.005)),
        ("hyperspherical", "energy", ("methods", "lora", "absolute_change"), estimate(0.5)),
        ("an encoder alone", "control", ("rows", "none", "scores", "miou"), estimate(0.55)),
        ("follows a map best", "control", ("rows", "oft_0.0001", "scores", "miou"), estimate(0.7)),
    ],
)
def test_a_claim_is_not_reproduced_by_numbers_against_it(
    tmp_path: Path, part: str, file: str, path: tuple[Any, ...], value: Any
) -> None:
    assert verdict(write_all(tmp_path), part)[0] == "reproduced"
    changed = others()[file]
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert verdict(write_all(tmp_path, **{file: changed}), part)[0] == "not reproduced"


def test_ranges_and_distances_are_judged_by_their_numbers(tmp_path: Path) -> None:
    results = write_all(tmp_path)
    assert verdict(results, "widest range")[0] == "reproduced"
    assert verdict(results, "distance is bounded")[0] == "reproduced"
    made = learning_rates()
    made["usable_range"]["oft"]["ratio"] = 1000
    made["methods"]["ether_plus"]["0.1"]["weight_distance"] = estimate(30.0)
    results = write_all(tmp_path, learning_rates=made)
    assert verdict(results, "widest range") == (
        "not reproduced",
        "highest ÷ lowest usable rate: ether_plus 100, ether 10, oft 1000",
    )
    assert verdict(results, "distance is bounded")[0] == "not reproduced"


def test_methods_that_the_paper_has_not_are_told_and_do_not_decide(tmp_path: Path) -> None:
    made = learning_rates()
    made["usable_range"]["delora"] = {**made["usable_range"]["oft"], "ratio": 1000, "is_open": True}
    found, numbers = verdict(write_all(tmp_path, learning_rates=made), "widest range")
    assert found == "reproduced"
    assert numbers.endswith("delora ≥ 1000; these figures have no delora")


def test_the_short_benchmark_takes_the_rates_of_the_greatest_likeness_on_other_subjects() -> None:
    by_likeness = json.loads((ROOT / "docs" / "results" / "rates.json").read_bytes())
    tried: dict[str, list[tuple[float, float]]] = {}
    for row, found in by_likeness["methods"].items():
        score = found["scores"]["object"]["mean"], found["learning_rate"]
        tried.setdefault(without_rate(row), []).append(score)
    assert all(len(tried[name]) > 1 for name in TINY_LEARNING_RATES)
    best = {name: max(tried[name])[1] for name in TINY_LEARNING_RATES}
    assert best == TINY_LEARNING_RATES
    assert not {*by_likeness["subjects"]} & {*TINY_SUBJECTS}


def test_the_bounds_of_the_best_step_part_usable_rates_from_collapsed_ones() -> None:
    study, bounds = (
        json.loads((ROOT / "docs" / "results" / "learning_rates.json").read_bytes()),
        EvaluationConfig(),
    )
    least_prompt = study["base"]["tiny_t"] * (1 - bounds.eval_max_prompt_loss)
    kept: list[bool] = []
    lost: list[bool] = []
    for rates in study["methods"].values():
        limit = 0.95 * max(scores["object"]["mean"] for scores in rates.values() if "object" in scores)
        for scores in (each for each in rates.values() if "drift" in each):
            drift, prompt = scores["drift"]["mean"], scores["tiny_t"]["mean"]
            is_out = drift > bounds.eval_max_drift or prompt < least_prompt
            (kept if scores["object"]["mean"] >= limit else lost).append(is_out)
    assert not any(kept)
    assert sum(lost) >= 6


def test_a_difference_within_its_error_is_not_called_reproduced(tmp_path: Path) -> None:
    near = {**LIKENESS, "ether_plus": (0.66, 0.42), "lora": (0.62, 0.44)}
    found, numbers = verdict(write_all(tmp_path, benchmark=benchmark(near)), "truer to the subject than LoRA")
    assert found == "not reproduced"
    assert "within two standard errors of zero" in numbers


def test_differences_are_paired_over_subjects(tmp_path: Path) -> None:
    values = [0.1, 0.4, 0.25, -0.1]
    likeness = {"lora": tuple(0.1 * k for k in range(4)), "oft": (0.0,) * 4}
    likeness["oft"] = tuple(x - d for x, d in zip(likeness["lora"], values, strict=True))
    made = Measured.read(write_all(tmp_path, benchmark=benchmark(likeness)))
    found = paired_difference(made, "lora", "oft", "object")
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(4))
    assert found.is_clear == (abs(found.mean) > 2 * found.standard_error)
    assert difference_of([1.0, 1.0]).is_clear


def test_seeds_of_a_subject_are_no_further_subjects(tmp_path: Path) -> None:
    made = benchmark({"lora": (0.5, 0.6), "oft": (0.4, 0.2)})
    again = [{**run, "seed": 1, "scores": {"object": 0.3}} for run in made["runs"] if run["method"] == "lora"]
    again += [{**run, "scores": {"object": 0.2}} for run in again]
    for run, method in zip(again, ("lora", "lora", "oft", "oft"), strict=True):
        run["method"] = method
    made["runs"] += again
    found = paired_difference(Measured.read(write_all(tmp_path, benchmark=made)), "lora", "oft", "object")
    assert found.num_pairs == 2
    assert found.mean == pytest.approx(((0.1 + 0.1) / 2 + (0.4 + 0.1) / 2) / 2)


def test_a_study_without_a_method_is_not_measured_and_says_what_lacks(tmp_path: Path) -> None:
    cost = others()["cost"]
    del cost["methods"]["PEFT OFT 4 blocks"]
    assert verdict(write_all(tmp_path, cost=cost), "120 times") == (
        "not measured yet",
        "cost.json has no methods / PEFT OFT 4 blocks / parameters",
    )


def test_the_page_shows_the_tables_and_the_pictures_of_the_folder(tmp_path: Path) -> None:
    results = write_all(tmp_path)
    (results / "sheet.png").touch()
    page = results_page(Measured.read(results), results)
    assert "| ETHER+ | 600 | 0.555 ± 0.100 | 0.500 ± 0.100 | 0.006 | 4 |" in page
    assert "| LoRA r=4 | - | - | - | - |" in page  # no usable rate
    assert "![sheet](results/sheet.png)" in page
    assert "2 subjects (subject0, subject1) × 8 prompts × 2 pictures" in page


def test_the_page_tells_control_by_each_kind_of_image(tmp_path: Path) -> None:
    edges = others()["control"]
    edges["rows"]["none"]["parameters"] = None
    results = write_all(tmp_path, control_edges=edges)
    page = results_page(Measured.read(results), results)
    told = "0.400 ± 0.020 | 0.400 ± 0.020 | 0.300 ± 0.100 | 0.400 ± 0.020 | 1,234 |"
    assert page.count(f"| OFT n=4, 0.0001 | {told}") == 2
    assert "Semantic maps, 2 seeds:" in page
    assert page.count("| encoder-only | 0.100 ± 0.020 |") == 2
    assert "Silhouettes, " not in page


def test_rows_are_compared_in_pairs_by_both_judges(tmp_path: Path) -> None:
    made = benchmark()
    for run in made["runs"]:
        run["scores"]["outside"] = 1 - run["scores"]["object"]
    for row in made["methods"].values():
        row["scores"]["outside"] = estimate(0.5)
    results = write_all(tmp_path, benchmark=made)
    page = results_page(Measured.read(results), results)
    # of four draws of two subjects each has one that takes a subject twice, so the interval is the two
    told = "+0.035 (+0.030 to +0.040) | -0.035 (-0.040 to -0.030)"
    assert f"| ETHER+ less LoRA r=4 | 600 and 900 | {told} |" in page


def test_a_damaged_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_all(tmp_path)
    (results / "cost.json").write_text("{")
    assert write_results.main(["--docs", str(results.parent), "--curves", str(tmp_path / "c.json")]) == 2
    assert capsys.readouterr().err.startswith("write_results: ")
    assert json.loads((results / "blocks.json").read_text())
    assert not (tmp_path / "c.json").exists()


def test_the_page_tells_photos_and_steps(tmp_path: Path) -> None:
    results = write_all(tmp_path, photos=photos())
    page = results_page(Measured.read(results), results)
    assert "| photos | 50 steps | 100 steps | enough |" in page
    assert "| 4 | 0.790 ± 0.100, 75% | 0.800 ± 0.100, 100% | 50 |" in page
    assert "without an adapter 0.300 and 0%" in page
