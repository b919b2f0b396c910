"""Configuration files: read strictly in three formats, written so that they make the same run again."""

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.files import MAX_BYTES, read_config_file, write_config_file

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    str.strip
)
NUMBERS = st.floats(min_value=1e-300, max_value=1e300)


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    values=st.fixed_dictionaries(
        {"instance_data_dir": st.just("photos")},
        optional={
            "instance_prompt": TEXTS,
            "validation_prompt": st.lists(TEXTS, max_size=3),
            "learning_rate": NUMBERS,
            "adam_epsilon": NUMBERS,
            "noise_offset": NUMBERS,
            "seed": st.integers(0, 2**63 - 1),
            "center_crop": st.booleans(),
            "mixed_precision": st.sampled_from([None, "no", "bf16"]),
        },
    )
)
def test_what_is_written_is_read_as_the_same_configuration(tmp_path: Path, values: dict[str, Json]) -> None:
    values["instance_prompt"] = (
        str(values.get("instance_prompt", "x")).replace("{token}", "")[:50].strip() or "x"
    )
    config = DreamBoothConfig.from_flat(values)
    path = tmp_path / "config.yaml"
    write_config_file(path, config)
    assert DreamBoothConfig.from_flat(read_config_file(path)) == config
    # and by a reader of YAML 1.1, which takes more words for numbers and truth values
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert DreamBoothConfig.from_flat(loaded) == config


@pytest.mark.parametrize("prompt", ["a\x85b", "\x85a dog", "a \u2028\x85\n dog\x85", "ä 🐶"])
def test_a_next_line_in_a_prompt_is_read_back(tmp_path: Path, prompt: str) -> None:
    values: dict[str, Json] = {"instance_data_dir": "p", "validation_prompt": ["x", prompt]}
    config = DreamBoothConfig.from_flat(values | {"instance_prompt": prompt})
    write_config_file(tmp_path / "config.yaml", config)
    assert DreamBoothConfig.from_flat(read_config_file(tmp_path / "config.yaml")) == config
    as_json = written(tmp_path, "a.json", json.dumps(config.flat()))
    assert DreamBoothConfig.from_flat(read_config_file(as_json)) == config


def test_the_file_has_every_option_under_its_section(tmp_path: Path) -> None:
    config = DreamBoothConfig.from_flat({"instance_data_dir": "photos"})
    write_config_file(tmp_path / "config.yaml", config)
    text = (tmp_path / "config.yaml").read_text()
    assert read_config_file(tmp_path / "config.yaml") == config.flat()
    assert "\n# adapter\nadapter: ether_plus\nnum_blocks: null\n" in text


PLAIN_YAML = """
learning_rate: 6e-3
mixed_precision: no
validation_prompt: [a, 'b c']
token:
use_ema: true
"""
FLOW_YAML = "{learning_rate: .6e-2, mixed_precision: 'no', validation_prompt: [\"a\", b c], use_ema: True}"
TOML = """
learning_rate = 6e-3
mixed_precision = "no"
validation_prompt = ["a", "b c"]
use_ema = true
"""
JSON = """\ufeff{
"learning_rate": 6e-3, "mixed_precision": "no", "validation_prompt": ["a", "b c"], "use_ema": true
}"""


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", PLAIN_YAML), ("a.yml", FLOW_YAML), ("a.toml", TOML), ("a.JSON", JSON)]
)
def test_the_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    values = read_config_file(written(tmp_path, name, text))
    assert values.pop("token", None) is None
    assert values == {
        "learning_rate": 6e-3,
        "mixed_precision": "no",
        "validation_prompt": ["a", "b c"],
        "use_ema": True,
    }


PLAIN_VALUES: dict[str, Json] = {
    "3": 3,
    "010": 10,
    "-3": -3,
    "3.": 3.0,
    "1e-08": 1e-8,
    "1e999": math.inf,
    "on": "on",
    "1:30": "1:30",
    "0x10": "0x10",
    ".nan": ".nan",
    "2026-01-01": "2026-01-01",
    "'3'": "3",
    "|\n  a\n  b": "a\nb",
    "null": None,
    "": None,
    "[1, 2.0, x]": [1, 2.0, "x"],
}


def test_a_plain_value_of_yaml_is_what_it_looks_like(tmp_path: Path) -> None:
    for text, value in PLAIN_VALUES.items():
        found = read_config_file(written(tmp_path, "a.yaml", f"x: {text}"))
        assert found == {"x": value}
        assert type(found["x"]) is type(value)
    for name in ("a.yaml", "a.toml"):  # an empty file sets nothing
        assert read_config_file(written(tmp_path, name, "")) == {}


BAD = [
    ("a.yaml", "seed: 1\nseed: 2\n", "gives seed twice in line 2; keep one"),
    ("a.json", '{"seed": 1, "seed": 2}', "gives the key seed twice"),
    ("a.toml", "seed = 1\nseed = 2\n", "is not valid TOML"),
    ("a.yaml", "seed: [1", "is not valid YAML"),
    ("a.json", "{", "is not valid JSON"),
    ("a.json", '{"x": NaN}', "holds NaN"),
    ("a.yaml", "- 1\n", "is not a mapping of names to values"),
    ("a.json", "[]", "is not a mapping of names to values"),
    ("a.yaml", "just words", "is not a mapping of names to values"),
    ("a.yaml", "data:\n  seed: 1\n", "has nested values in line 2; give each option by its own name"),
    ("a.json", '{"data": {"seed": 1}}', "has values under data; give each option by its own name"),
    ("a.toml", "[data]\nseed = 1\n", "has values under data; give each option by its own name"),
    ("a.yaml", "x: !!python/object/apply:os.system ['true']", "has the tag tag:yaml.org,2002:python"),
    ("a.yaml", "? [a]\n: 1", "has a key that is no name"),
    ("a.yaml", "x: " + "[" * 100_000, "is nested too deeply"),
    ("a.toml", "x = " + "[" * 100_000, "is n"),
    ("a.json", "[" * 100_000, "is nested too deeply"),
    ("a.yaml", "a: 1\n---\nb: 2\n", "is not valid YAML"),
    ("a.yaml", "x: \x07", "is not valid YAML"),
    ("a.yaml", b"x: \xff", "is not UTF-8 at byte 3"),
    ("a.yaml", b"#" * (MAX_BYTES + 1), "at most 1048576 are read"),
    ("a.txt", "x: 1", r"is neither \.yaml, \.yml, \.toml nor \.json"),
]


@pytest.mark.parametrize(("name", "text", "sentence"), BAD, ids=range(len(BAD)))
def test_a_bad_file_is_refused_by_name(tmp_path: Path, name: str, text: str | bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        read_config_file(written(tmp_path, name, text))
    assert name in str(error.value)
    assert "\\n" not in str(error.value)


def test_a_bomb_of_aliases_stays_small(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    with pytest.raises(ValueError, match="has nested values"):
        read_config_file(written(tmp_path, "a.yaml", "\n".join(lines)))


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_config_file(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").mkdir()
    with pytest.raises(ValueError, match="is not a file"):
        read_config_file(tmp_path / "b.yaml")


@pytest.mark.parametrize("value", ["[2026-01-01]", "2026-01-01", "12:30:00"])
def test_a_date_is_no_value_of_an_option(tmp_path: Path, value: str) -> None:
    values = read_config_file(written(tmp_path, "a.toml", f"seed = {value}"))
    with pytest.raises(ValueError, match="does not fit; use a whole number"):
        DreamBoothConfig.from_flat({"instance_data_dir": "x"} | values)
