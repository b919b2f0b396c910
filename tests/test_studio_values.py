"""Whatever a script sends to an endpoint, the answer is pictures or one sentence that names what is wrong."""

import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest
from browser import RunningStudio

from ether_diffusion.ui.numbers import read_number, read_optional, read_switch, read_text, read_whole

pytest.importorskip("gradio", reason="the extra ui is not installed; with it, and in CI, this runs")
NAMES = (
    "prompt", "adapters", "seed", "steps", "guidance_scale", "width", "height", "num_images",
    "negative_prompt", "compare_with_base", "keep_metadata", "control_strength", "control_detector",
    "control_image",
)  # fmt: skip
GOOD: dict[str, Any] = {
    "prompt": "a fox", "adapters": {}, "seed": 0, "steps": 1, "guidance_scale": 3, "width": 64, "height": 64,
    "num_images": 1, "negative_prompt": "", "compare_with_base": False, "keep_metadata": True,
    "control_strength": 1, "control_detector": "", "control_image": None,
}  # fmt: skip
HUGE = 10**30


@pytest.fixture
def studio(furnished: RunningStudio) -> RunningStudio:
    return furnished


def send(studio: RunningStudio, wish: dict[str, Any]) -> tuple[str, Any]:
    """Return the last event of a call and what it says, as raw HTTP gives them."""
    data = json.dumps({"data": [wish[name] for name in NAMES]}).encode()
    url = f"{studio.url}/gradio_api/call/generate"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            event = json.load(response)["event_id"]
    except urllib.error.HTTPError as error:
        return "error", json.load(error)["detail"][0]["message"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=120) as response:
        said = response.read().decode().strip().rsplit("event: ", 1)[1]
    name, _, answer = said.partition("\ndata: ")
    found = json.loads(answer)
    return name, found["error"] if name == "error" and isinstance(found, dict) else found


@pytest.mark.parametrize(
    "wish", [{}, {"height": 2048, "width": 16}, {"width": None, "height": 0}, {"steps": "1"}]
)
def test_what_is_good_draws(studio: RunningStudio, wish: dict[str, Any]) -> None:
    name, answer = send(studio, GOOD | wish)
    assert (name, len(answer[0])) == ("complete", 1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt", [None]),
        ("adapters", [[], "fox", 3, {"fox": None}, {"fox": "x"}, {"fox": True}, {"../..": 1}, {"path": "x"}]),
        ("seed", [None, "x", -1, 1.5, HUGE, True, [], {}]),
        ("steps", [None, "x", 0, -5, 1001, 2.5, HUGE, False, [1]]),
        ("guidance_scale", [None, "x", -1, 101, [], {}]),
        ("width", ["x", 60, -8, 4104, 64.5, HUGE, [64], True]),
        ("height", ["y", 12, 10**9]),
        ("num_images", [None, "x", 0, 33, 1.5, {}]),
        ("compare_with_base", [None, [], "yes", 1]),
        ("keep_metadata", [None, {}, "no"]),
        ("control_strength", [None, "x", 11, -11, []]),
        ("control_detector", ["canny", "magic"]),
        (
            "control_image",
            [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": "/etc/passwd"}],
        ),
    ],
)
def test_every_bad_value_is_refused_in_a_sentence(
    studio: RunningStudio, field: str, values: list[Any]
) -> None:
    for value in values:
        name, said = send(studio, GOOD | {field: value})
        assert name == "error", (value, said)
        assert isinstance(said, str), (value, said)
        assert re.fullmatch(r"[^\n]{12,400}[.!]", said), (value, said)
        assert "Something went wrong" not in said, (value, said)
        assert str(studio.folder) not in said, (value, said)


@pytest.mark.parametrize(
    "value", [None, "", "x", "1e999", float("nan"), float("inf"), True, [], {}, "9" * 99]
)
def test_what_is_no_number_is_refused_by_the_name_of_its_field(value: object) -> None:
    for read in (read_number, read_whole):
        with pytest.raises(ValueError, match=r"^steps must be a .*number; found "):
            read(value, "steps")


def test_numbers_are_read_as_pages_and_scripts_send_them() -> None:
    assert [read_whole(value, "x") for value in (5, 5.0, "5", " 5 ", -3)] == [5, 5, 5, 5, -3]
    assert [read_number(value, "x") for value in (1, 0.5, "0.5")] == [1.0, 0.5, 0.5]
    assert [read_optional(value, "x") for value in (None, "", 0, 64)] == [None, None, None, 64]
    assert [read_text(None, "x"), read_text("a", "x")] == ["", "a"]
    assert [read_switch(True, "x"), read_switch(False, "x")] == [True, False]
    for wrong in (1.5, "1.5"):
        with pytest.raises(ValueError, match=r"must be a whole number; found 1\.5"):
            read_whole(wrong, "x")
