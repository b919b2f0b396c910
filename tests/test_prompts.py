"""Weights against compel's own syntax, and prompts that are drawn from templates by their seed."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_pipelines import flow_pipeline
from tiny_pipelines import tiny_sd, tiny_sdxl

from ether_diffusion.bases import open_base
from ether_diffusion.prompts import Wildcards, weighted_fragments
from ether_diffusion.serving.engine import Engine, Request

NEEDED = "compel is not installed; with what pyproject.toml names, this test runs"


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", [("", 1.0)]),
        ("a (cat) here", [("a ", 1.0), ("cat", 1.1), (" here", 1.0)]),
        ("a ((cat))", [("a ", 1.0), ("cat", 1.1**2)]),
        ("a [cat]", [("a ", 1.0), ("cat", 1 / 1.1)]),
        ("(a [cat:1]:1.5)", None),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(cat : 1.3 )", [("cat ", 1.3)]),
        ("time: 12:30", [("time: 12:30", 1.0)]),
        (r"a \(b\) \[c\]", [("a (b) [c]", 1.0)]),
        ("a (b", [("a (b", 1.0)]),
        (":) a] (b)", [(":) a] ", 1.0), ("b", 1.1)]),
    ],
)
def test_weights_are_read_as_people_know_them(prompt: str, fragments: Any) -> None:
    if fragments is None:
        with pytest.raises(ValueError, match="changes the prompt between steps"):
            weighted_fragments(prompt)
        return
    found = weighted_fragments(prompt)
    assert [text for text, _ in found] == [text for text, _ in fragments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in fragments])


@pytest.mark.parametrize("prompt", ["(a:99)", "(a:-1)"])
def test_weights_that_are_none_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="a weight is from 0 to 10"):
        weighted_fragments(prompt)


@pytest.mark.parametrize("prompt", ["[a|b]", "[a:b:0.5]", "a [b : 0.3]"])
def test_prompts_that_change_between_steps_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="changes the prompt between steps"):
        weighted_fragments(prompt)


WEIGHED = {
    "a (b:1.4) c": "a (b)1.4 c",
    "(a b:0.6) c": "(a b)0.6 c",
    "a ((b)) [c]": "a (b)1.21 (c)0.9090909090909091",
}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("prompt", WEIGHED)
def test_embeddings_are_compels(family: str, prompt: str, tmp_path: Path) -> None:
    compel = pytest.importorskip("compel", reason=NEEDED)
    make, kind = {"sd": (tiny_sd, compel.CompelForSD), "sdxl": (tiny_sdxl, compel.CompelForSDXL)}[family]
    pipe = make()
    pipe.save_pretrained(tmp_path)
    base = open_base(tmp_path)
    with torch.no_grad():
        found = base.encode_weighted(pipe, weighted_fragments(prompt))
        expected = kind(pipe)(WEIGHED[prompt])
        plain = base.encode(pipe, ["a b c"])
    torch.testing.assert_close(found.sequence, expected.embeds, rtol=0, atol=1e-6)
    assert found.sequence.shape == plain.sequence.shape
    assert not torch.allclose(found.sequence, plain.sequence)
    if (
        plain.pooled is not None and found.pooled is not None
    ):  # of the whole prompt, where no word has a weight
        assert torch.equal(found.pooled, plain.pooled)


def test_a_prompt_without_weights_is_embedded_as_ever(tmp_path: Path) -> None:
    pytest.importorskip("compel", reason=NEEDED)
    tiny_sd().save_pretrained(tmp_path)
    engine = Engine(open_base(tmp_path))
    how: Any = {"steps": 2, "width": 16, "height": 16}
    asked = ("a b c", "a (b:1.0) c", "a (b:1.4) c", r"a \(b\) c")
    plain, one, more, _ = (engine.draw([Request(prompt=each, **how)]) for each in asked)
    pictures = [next(iter(each)).tobytes() for each in (plain, one, more)]
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
    (negative,) = engine.draw([Request(prompt="a b c", negative_prompt="(c:1.5)", **how)])
    (even,) = engine.draw([Request(prompt="a b c", negative_prompt="c", **how)])
    assert negative.tobytes() != even.tobytes()


def test_a_family_without_weights_says_so(tmp_path: Path) -> None:
    flow_pipeline("flux").save_pretrained(tmp_path)
    engine = Engine(open_base(tmp_path))
    with pytest.raises(ValueError, match=r"without weights; take \(cat:1.3\) out of it"):
        engine.submit(Request(prompt="a (cat:1.3)"))
    assert engine.submit(Request(prompt="a (cat)", steps=1, width=32, height=32)).picture.result(60)
    engine.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "animal.txt").write_text("# of the forest\nfox\n\n{red|grey} squirrel\n", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "place.txt").write_text("beach\n", encoding="utf-8")
    return tmp_path


def test_prompts_are_drawn_by_their_seed(folder: Path) -> None:
    wildcards, template = Wildcards(folder), "a {big|small|} __animal__ at the __more/place__"
    drawn = [wildcards.draw(template, seed) for seed in range(300)]
    assert drawn == [wildcards.draw(template, seed) for seed in range(300)]
    sizes, animals = ("big ", "small ", " "), ("fox", "red squirrel", "grey squirrel")
    assert set(drawn) == {f"a {size}{animal} at the beach" for size in sizes for animal in animals}
    foxes = Counter("fox" in each for each in drawn)[True]
    assert 110 < foxes < 190  # of 300, half: four standard deviations
    assert wildcards.names() == ["animal", "more/place"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("other", None, "there is no wildcard __other__; those there are: animal, more/place"),
        ("../animal", None, "__../animal__"),
        ("empty", b"# nothing\n", "empty.txt holds nothing"),
        ("bytes", b"\xff\xfe\x00", "no UTF-8"),
        ("large", b"x" * (2**20 + 1), "over 1 MiB"),
        ("loop", b"__loop__ a\n", "hold one another without end"),
    ],
)
def test_wildcards_that_cannot_be_drawn_are_refused(
    folder: Path, name: str, text: bytes | None, sentence: str
) -> None:
    if text is not None:
        (folder / f"{name}.txt").write_bytes(text)
    if name.startswith(".."):  # is no name, so it is text
        assert Wildcards(folder / "more").draw(f"__{name}__", 0) == sentence
        return
    with pytest.raises(ValueError, match=sentence):
        Wildcards(folder).draw(f"a __{name}__", 0)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path) -> None:
    (folder / "more" / "out.txt").symlink_to(folder / "animal.txt")
    with pytest.raises(ValueError, match="no wildcard __out__"):
        Wildcards(folder / "more").draw("__out__", 0)
    with pytest.raises(ValueError, match="no folder of wildcards"):
        Wildcards().draw("__animal__", 0)
    with pytest.raises(ValueError, match="there is no folder"):
        Wildcards(folder / "missing")
