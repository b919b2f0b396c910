"""The study of costs counts what the paper's tables count."""

import json
from pathlib import Path

from research.study_cost import main

PAPER = {"ETHER": 99_456, "ETHER+": 398_592, "PEFT LoRA r=4": 797_184, "PEFT OFT 4 blocks": 11_602_368}
"""Of SD 1.5, from the widths of its attention projections: 0.1, 0.4, 0.8 and 11.6 million in Table 2."""


def test_parameters_are_those_of_the_paper_and_files_hold_them(tmp_path: Path) -> None:
    assert main(["--what", "size", "--output_dir", str(tmp_path)]) == 0
    methods = json.loads((tmp_path / "cost.json").read_text())["methods"]
    assert {name: methods[name]["parameters"] for name in PAPER} == PAPER
    for costs in (methods[name] for name in PAPER):
        assert 0 < costs["file_bytes"] - 4 * costs["parameters"] < 200_000  # the header
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
