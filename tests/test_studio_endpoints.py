"""Scripts do through the studio's endpoints what visitors do on its page; whatever they send is answered."""

import json
import re
import secrets
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import RunningStudio
from PIL import Image

from ether_diffusion.control import control_image_sha256
from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.ui.studio import EXAMPLE

gradio_client = pytest.importorskip(
    "gradio_client", reason="the extra ui is not installed; with it, and in CI, this runs"
)
STUDIO_PAGE = (Path(__file__).parent.parent / "docs" / "studio.md").read_text(encoding="utf-8")
GOOD: dict[str, Any] = {
    "prompt": "a fox", "adapters": {}, "seed": 0, "steps": 1, "guidance_scale": 3, "width": 64, "height": 64,
    "num_images": 1, "negative_prompt": "", "compare_with_base": False, "keep_metadata": True,
    "control_strength": 1, "control_detector": "", "control_image": None,
}  # fmt: skip
HUGE = 10**30
WRONG: tuple[Any, ...] = (5, True, [], {})
QUICK = {"steps": 2, "compare_with_base": False, "api_name": "/generate"}


@pytest.fixture
def studio(furnished: RunningStudio) -> RunningStudio:
    return furnished


@pytest.fixture
def ids(furnished: RunningStudio) -> dict[str, str]:
    return furnished.ids


@pytest.fixture
def script(studio: RunningStudio, tmp_path: Path) -> Any:
    return gradio_client.Client(
        studio.url, download_files=tmp_path / "downloads", verbose=False, analytics_enabled=False
    )


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (16, 16, 48, 48))
    image.save(tmp_path / "shape.png")
    return tmp_path / "shape.png"


def test_eight_clients_at_once_each_get_the_picture_that_is_drawn_alone(
    studio: RunningStudio, ids: dict[str, str], tmp_path: Path
) -> None:
    """Of other prompts, seeds, sizes, and adapters at other strengths."""
    wishes: list[dict[str, Any]] = [
        {
            "prompt": f"a fox number {n}",
            "seed": n,
            "width": 64 + 8 * (n % 3),
            "adapters": {ids["Fox"]: n / 4},
            **QUICK,
        }
        for n in range(8)
    ]

    def drawn(wish: dict[str, Any]) -> np.ndarray:
        folder = tmp_path / secrets.token_hex(4)
        client = gradio_client.Client(
            studio.url, download_files=folder, verbose=False, analytics_enabled=False
        )
        (picture,), _, _ = client.predict(**wish)
        with Image.open(picture["image"]) as image:
            return np.asarray(image)

    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(drawn, wishes))
    alone = [drawn(wish) for wish in wishes]
    assert all(np.array_equal(*pair) for pair in zip(together, alone, strict=True))
    assert len({picture.tobytes() for picture in alone}) == 8


def test_only_two_endpoints_are_offered(script: Any) -> None:
    offered = script.view_api(return_format="dict", print_info=False)
    assert set(offered["named_endpoints"]) == {"/adapters", "/generate"}
    assert offered["unnamed_endpoints"] == {}


def test_adapters_are_listed_with_what_generate_needs_to_know(
    script: Any, studio: RunningStudio, ids: dict[str, str]
) -> None:
    cards = script.predict(api_name="/adapters")
    assert {card["name"]: card["id"] for card in cards} == ids
    fox = next(card for card in cards if card["name"] == "Fox")
    files = [path for path in (studio.folder / "adapters" / ids["Fox"]).rglob("*") if path.is_file()]
    assert fox == {
        "id": ids["Fox"], "name": "Fox", "kind": "subject", "method": "ETHER+", "trigger": "a sks animal",
        "fits_base": True, "why_not": "", "num_bytes": sum(path.stat().st_size for path in files),
    }  # fmt: skip
    assert {card["name"]: card["kind"] for card in cards if card["name"] != "Fox"} == {
        "Classes": "control", "Shapes": "control",
    }  # fmt: skip
    assert str(studio.folder) not in str(cards)


def test_a_picture_says_what_the_script_asked_for(script: Any, ids: dict[str, str]) -> None:
    pictures, of_base, facts = script.predict(
        "a red fox", {ids["Fox"]: 0.5}, seed=7, steps=3, num_images=2, negative_prompt="rain",
        api_name="/generate",
    )  # fmt: skip
    assert [len(pictures), len(of_base), facts["notes"]] == [2, 2, []]
    assert facts["touched_layers"] > 0
    for number, picture in enumerate(pictures):
        said = read_image_metadata(picture["image"])
        assert said is not None
        assert (said.prompt, said.negative_prompt) == ("a red fox", "rain")
        assert (said.seed, said.steps) == (7 + number, 3)
        assert [(use.name, use.strength) for use in said.adapters] == [("Fox", 0.5)]


def test_a_control_image_is_followed(
    script: Any, studio: RunningStudio, ids: dict[str, str], shape: Path
) -> None:
    asked = {"adapters": {ids["Shapes"]: 1.0, ids["Fox"]: 0.5}, "seed": 3, **QUICK}
    (picture,), _, _ = script.predict(
        "a strawberry", control_image=gradio_client.handle_file(shape), control_strength=0.7, **asked
    )
    said = read_image_metadata(picture["image"])
    assert said is not None
    with Image.open(shape) as image:
        assert said.options["control_image_sha256"] == control_image_sha256(image)
    assert (said.options["control"], said.options["control_strength"]) == ("Shapes", 0.7)
    (free,), _, facts = script.predict("a strawberry", **asked)
    assert "Shapes follows a control image, and none was given." in facts["notes"]
    with Image.open(picture["image"]) as followed, Image.open(free["image"]) as alone:
        assert not np.array_equal(np.asarray(followed), np.asarray(alone))


def test_a_detector_makes_the_control_image_of_a_photo(
    script: Any, studio: RunningStudio, ids: dict[str, str], tmp_path: Path
) -> None:
    cut_out = Image.new("RGBA", (128, 128))
    cut_out.paste((200, 30, 30, 255), (32, 32, 96, 96))
    cut_out.save(tmp_path / "cut-out.png")
    (picture,), _, _ = script.predict(
        "a strawberry",
        {ids["Shapes"]: 1.0},
        control_image=gradio_client.handle_file(tmp_path / "cut-out.png"),
        control_detector="silhouette",
        **QUICK,
    )
    said = read_image_metadata(picture["image"])
    assert said is not None
    expected = np.zeros((64, 64, 3), dtype=np.uint8)
    expected[16:48, 16:48] = 255
    assert said.options["control_image_sha256"] == control_image_sha256(Image.fromarray(expected))


def send(studio: RunningStudio, wish: dict[str, Any]) -> tuple[str, Any]:
    """Return the last event of a call and what it says, as raw HTTP gives them."""
    data = json.dumps({"data": [wish[name] for name in GOOD]}).encode()
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
        ("control_image", [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"path": "/x"}]),
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
    ("wish", "words"),
    [
        ({"adapters": {"nobody": 1.0}}, "no longer in the library"),
        ({"control_image": True, "control_detector": "magic"}, "There is no such detector"),
        ({"control_image": True}, "A control image needs one adapter that follows it; found none"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(
    script: Any, studio: RunningStudio, shape: Path, wish: dict[str, Any], words: str
) -> None:
    if "control_image" in wish:
        wish = wish | {"control_image": gradio_client.handle_file(shape)}
    with pytest.raises(gradio_client.exceptions.AppError, match=re.escape(words)) as caught:
        script.predict("a red fox", **wish, **QUICK)
    assert str(studio.folder) not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_the_snippet_of_the_page_runs(
    studio: RunningStudio, ids: dict[str, str], shape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snippet,) = re.findall(r"```python\n(from gradio_client.*?)```", STUDIO_PAGE, flags=re.DOTALL)
    monkeypatch.chdir(shape.parent)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    here = f'"{studio.url}", download_files={str(shape.parent)!r}'
    scope: dict[str, Any] = {}
    assert f'"{EXAMPLE}"' in snippet  # which this studio has under another name
    snippet = snippet.replace(EXAMPLE, "Fox")
    exec(snippet.replace('"http://127.0.0.1:7860"', here).replace("steps=20", "steps=2"), scope)
    assert Path(scope["pictures"][0]["image"]).is_file()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a"], "takes 14 values and found 1"),
        ([*GOOD.values(), 1], "takes 14 values and found 15"),
        *(([each, *list(GOOD.values())[1:]], "is a text; found") for each in WRONG),
    ],
    ids=str,
)
def test_a_call_of_another_form_is_refused_before_it_is_queued(
    studio: RunningStudio, values: list[Any], words: str
) -> None:
    request = urllib.request.Request(
        f"{studio.url}/gradio_api/call/generate",
        json.dumps({"data": values}).encode(),
        {"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    assert refusal.value.code == 422
    assert words in json.loads(refusal.value.read())["detail"]


def test_prompts_are_weighed_and_drawn_from_wildcards(script: Any, studio: RunningStudio) -> None:
    (studio.folder / "wildcards").mkdir(exist_ok=True)
    (studio.folder / "wildcards" / "thing.txt").write_text("cake\ncat\nrocket\n", encoding="utf-8")
    pictures, _, _ = script.predict("a (red:1.3) __thing__ {here|there}", **QUICK, num_images=3)
    said = [read_image_metadata(picture["image"]) for picture in pictures]
    drawn = {
        f"a (red:1.3) {thing} {place}" for thing in ("cake", "cat", "rocket") for place in ("here", "there")
    }
    assert {each.prompt for each in said if each is not None} <= drawn
    assert said[0] is not None
    assert said[0].options["template"] == "a (red:1.3) __thing__ {here|there}"
    for prompt, words in (
        ("__nothing__", "no wildcard __nothing__"),
        ("[a|b]", "hanges the prompt between"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=words):
            script.predict(prompt, **QUICK)
