"""Configuration files: YAML, TOML or JSON with one key per option, read strictly and written whole."""

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import yaml

from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import Json, parse_json
from ether_diffusion.training.config.dreambooth import DreamBoothConfig
from ether_diffusion.wording import printable

MAX_BYTES = 1 << 20


def read_config_file(path: str | Path) -> dict[str, Json]:
    """Read a configuration file, by its suffix; names and values are checked by `DreamBoothConfig.from_flat`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, not valid, a key given twice, a number that is not finite, or no mapping.
    """
    path = Path(path)
    where = f"the configuration {printable(path)}"
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ValueError(f"{where} is neither .yaml, .yml, .toml nor .json; name it by what it holds")
    if not path.exists():
        raise FileNotFoundError(f"{where} does not exist; check the path")
    if not path.is_file():
        raise ValueError(f"{where} is not a file; give a .yaml, .toml or .json file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{where} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return _mapping(parse(text, where), where)


def write_config_file(path: str | Path, config: DreamBoothConfig) -> None:
    """Write every option with its value as YAML, section by section; `read_config_file` reads it back."""
    path, values = Path(path), config.flat()
    parts = ["# every option of train-dreambooth; use it again with --config\n"]
    for section, config_type in config.sections.items():
        lines = (f"{each.name}: {_yaml_text(values[each.name])}\n" for each in fields(config_type))
        parts.append(f"\n# {section}\n{''.join(lines)}")
    write_files(path.parent, {path.name: "".join(parts).encode()})


def _read_yaml(text: str, where: str) -> Json:
    try:
        # composed, not constructed: nothing is made but names, texts and lists
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML ({' '.join(printable(error, 300).split())})") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; it is one mapping of names to values") from None
    if not isinstance(root, yaml.MappingNode):
        return None if root is None else _yaml_value(root, where)
    values: dict[str, Json] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{where} has a key that is no name {_place(key)}; use the names of flags")
        if key.value in values:
            raise ValueError(f"{where} gives {printable(key.value)} twice {_place(key)}; keep one")
        values[key.value] = _yaml_value(value, where)
    return values


def _yaml_value(node: yaml.Node, where: str) -> Json:
    if node.tag not in _PLAIN_TAGS:
        raise ValueError(f"{where} has the tag {printable(node.tag)} {_place(node)}; write the plain value")
    if isinstance(node, yaml.ScalarNode):
        return _yaml_scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_yaml_value(item, where) for item in node.value]
    raise ValueError(f"{where} has nested values {_place(node)}; give each option by its own name")


def _yaml_scalar(text: str) -> Json:
    """Return a plain scalar's value in YAML 1.2's core schema: `no` is text, and 6e-3 is a number."""
    if text.lower() in ("", "~", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]{1,20}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text


def _place(node: yaml.Node) -> str:
    return f"in line {node.start_mark.line + 1}"


def _read_toml(text: str, where: str) -> Json:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not valid TOML ({printable(error)})") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; it is one mapping of names to values") from None


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}
_PARSERS: dict[str, Callable[[str, str], Json]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".toml": _read_toml,
    ".json": parse_json,
}


def _mapping(value: Json, where: str) -> dict[str, Json]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a mapping of names to values; write lines like 'seed: 1'")
    for name, item in value.items():
        if isinstance(item, dict):
            raise ValueError(f"{where} has values under {printable(name)}; give each option by its own name")
    return value


def _yaml_text(value: Json) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_yaml_text(item) for item in value)}]"
    if isinstance(value, str):
        # every escape of JSON is one of YAML's, which has more characters to escape
        return re.sub(
            _UNPRINTABLE, lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")  # without the point, YAML 1.1 takes it for text
    return json.dumps(value)


_UNPRINTABLE = "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
