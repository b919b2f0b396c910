"""What is read of JSON files, and the sentence for what is not."""

import re

import pytest
from pydantic import Field

from ether_diffusion.strict_json import StrictModel, read_json


class Point(StrictModel):
    x: float
    count: int = Field(default=1, ge=1)
    names: tuple[str, ...] = ()
    tags: str | list[str] = ""
    facts: dict[str, str | int] = Field(default_factory=dict)
    pair: tuple[int, int] | None = None


def test_a_file_is_read_as_its_model() -> None:
    assert read_json('{"x": 1, "names": ["a"]}', Point, "p.json") == Point(x=1.0, names=("a",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"count": 2}', "p.json: x is missing"),
        ('{"x": 1, "y": 2}', "p.json: y is not a key that is known"),
        ('{"x": "1"}', 'x is "1"; it should be a valid number'),
        ('{"x": 1, "count": true}', "count is true; it should be a valid integer"),
        ('{"x": 1, "count": 0}', "count is 0; it should be greater than or equal to 1"),
        ('{"x": 1, "names": ["a", 2]}', "names.1 is 2; it should be a valid string"),
        ('{"x": 1, "tags": 3}', "json: tags is 3; it should be a valid string or be a valid array"),
        ('{"x": 1, "tags": ["a", 3]}', "json: tags.1 is 3; it should be a valid string"),
        ('{"x": 1, "facts": {"str": []}}', "json: facts.str is []; it should be a valid string or"),
        ('{"x": 1, "pair": [1]}', "json: pair.1 is missing"),
        ('{"x": 1e999}', "out of range"),
        ('{"x": 1, "x": 2}', "twice"),
        ('["x"]', 'it is ["x"]; it should be an object'),
        ('{"x": 1, "\\u001b[2J": 2}', "\\x1b[2J is not a key"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_json(text, Point, "p.json")
    assert "\n" not in str(caught.value)
