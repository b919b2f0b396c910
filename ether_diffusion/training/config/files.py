"""Configuration files: YAML, TOML or JSON with one key per option, read strictly and written whole."""

import math
import re
import tomllib
from pathlib import Path

import yaml

from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import Json, parse_json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.wording import printable

MAX_BYTES, MAX_JOBS = 1 << 20, 1000


def read_config_file(path: str | Path) -> dict[str, Json]:
    """Read a configuration file, by its suffix; names and values are checked by `DreamBoothConfig.from_flat`.

    One that cannot be read is a ValueError or a FileNotFoundError.
    """
    where = f"the configuration {printable(path)}"
    values = _read(Path(path), where)
    return {} if values is None else _flat(values, where)


def read_jobs_file(path: str | Path) -> list[dict[str, Json]]:
    """Read a file with a list of runs, each with its options by name, as `read_config_file`."""
    where = f"the list of jobs {printable(path)}"
    jobs = _read(Path(path), where)
    if not isinstance(jobs, list) or not jobs:
        raise ValueError(
            f"{where} is no list of runs; begin each with '- ', as '- instance_data_dir: photos'"
        )
    return [_flat(values, f"job {number} of {where}") for number, values in enumerate(jobs, 1)]


def _flat(values: Json, where: str) -> dict[str, Json]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping of names to values; write lines like 'seed: 1'")
    for name, item in values.items():
        if isinstance(item, dict):
            raise ValueError(f"{where} has values under {printable(name)}; give each option by its own name")
    return values


def _read(path: Path, where: str) -> Json:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml", ".json"):
        raise ValueError(f"{where} is neither .yaml, .yml, .toml nor .json; name it by what it holds")
    if not path.exists():
        raise FileNotFoundError(f"{where} does not exist; check the path")
    if not path.is_file():
        raise ValueError(f"{where} is not a file; give a .yaml, .toml or .json file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{where} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if suffix == ".json":
            values = parse_json(text, where)
        else:
            values = tomllib.loads(text) if suffix == ".toml" else _read_yaml(text, where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; it is one mapping of names to values") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        kind, said = "TOML" if suffix == ".toml" else "YAML", printable(" ".join(str(error).split()), 300)
        raise ValueError(f"{where} is not valid {kind} ({said})") from None
    return values


def write_config_file(path: str | Path, config: DreamBoothConfig) -> None:
    """Write every option with its value as YAML, section by section; `read_config_file` reads it back."""
    parts = ["# every option of train-dreambooth; use it again with --config\n"]
    for section, values in config.model_dump(mode="json").items():
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
        parts.append(f"\n# {section}\n{text}")
    write_files(Path(path).parent, {Path(path).name: "".join(parts).encode()})


_INT = re.compile(r"[-+]?[0-9]{1,20}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Json] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # between single quotes PyYAML takes a next line for a line break, and reads a space or none back
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"{_FLOAT.pattern}$"), [*"-+.0123456789"])


def _read_yaml(text: str, where: str) -> Json:
    # composed, not constructed: safe_load drops keys given twice, and `no` and 6e-3 are YAML 1.1 there
    root = yaml.compose(text, Loader=yaml.BaseLoader)
    if isinstance(root, yaml.SequenceNode) and any(isinstance(each, yaml.MappingNode) for each in root.value):
        if len(root.value) > MAX_JOBS:
            raise ValueError(f"{where} has {len(root.value)} entries; at most {MAX_JOBS} are read")
        return [_yaml_mapping(each, where) for each in root.value]
    return None if root is None else _yaml_mapping(root, where)


def _yaml_mapping(node: yaml.Node, where: str) -> Json:
    if not isinstance(node, yaml.MappingNode):
        return _yaml_value(node, where)
    values: dict[str, Json] = {}
    for key, value in node.value:
        place = f"in line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{where} has a key that is no name {place}; use the names of flags")
        if key.value in values:
            raise ValueError(f"{where} gives {printable(key.value)} twice {place}; keep one")
        values[key.value] = _yaml_value(value, where)
    return values


def _yaml_value(node: yaml.Node, where: str) -> Json:
    place = f"in line {node.start_mark.line + 1}"
    if node.tag not in _PLAIN_TAGS:
        raise ValueError(f"{where} has the tag {printable(node.tag)} {place}; write the plain value")
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_yaml_value(item, where) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where} has nested values {place}; give each option by its own name")
    text: str = node.value
    if node.style is not None:
        return text
    # a plain scalar in YAML 1.2's core schema
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else _WORDS.get(text, text)
