"""The direction of imports, which has no other arrows, and where libraries may appear."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "ether_diffusion"

LEVELS = [
    {
        "reflections",
        "fast_linear",
        "wording",
        "strict_json",
        "console",
        "durable_files",
        "contact_sheet",
        "prompts",
        "options",
        "flags",
        "tiny_world",
    },
    {"tuner"},
    {"adapters"},
    {"bases", "control", "export", "mixing"},
    {"metrics"},
    {"training", "pipelines"},
    {"benchmark", "serving"},
    {"ui", "scripts"},
    {"recipes", "tools"},
    {"research"},
]
"""Each part may import what stands above it, and its own level."""

ONLY_IN = {
    "accelerate": {"training", "recipes"},
    "gradio": {"ui"},
    "fastapi": {"serving"},
    "ray": {"serving", "training"},
    "argparse": {"scripts", "flags", "recipes", "research", "tools"},
}

NOT_INSTALLED = ("recipes", "research", "tools")
TOP_LEVEL = ("pipelines", "ui", "scripts", *NOT_INSTALLED)


def modules() -> Iterator[tuple[str, Path]]:
    for folder, prefix in ((ROOT / PACKAGE, ()), *((ROOT / n, (n,)) for n in TOP_LEVEL)):
        for path in sorted(folder.rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield ".".join((*prefix, *path.relative_to(folder).with_suffix("").parts)), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(part: str) -> int:
    found = [index for index, parts in enumerate(LEVELS) if part in parts]
    assert found, f"{part} has no place in LEVELS; say which parts it may import"
    return found[0]


MODULES = dict(modules())


def is_part(name: str) -> bool:
    return bool(name) and ((ROOT / PACKAGE / name).is_dir() or (ROOT / PACKAGE / f"{name}.py").exists())


def test_every_module_imports_only_what_stands_above_it() -> None:
    wrong = []
    for name, path in MODULES.items():
        part = name.split(".")[0]
        for target in imports(path):
            package, _, rest = target.partition(".")
            other = rest.split(".")[0]
            if package == PACKAGE and is_part(other) and part != "__init__" and level(other) > level(part):
                wrong.append(f"{name} imports {target}, which stands below it")
            if package in NOT_INSTALLED and part not in NOT_INSTALLED:
                wrong.append(f"{name} is installed and imports {target}, which is not")
            if package in {"pipelines", "ui", "scripts"}:
                wrong.append(f"{name} imports {target}; use {PACKAGE}.{package}")
    assert not wrong, "\n".join(wrong)


def test_a_library_appears_only_where_it_belongs() -> None:
    wrong = [
        f"{name} imports {library}"
        for name, path in MODULES.items()
        for library in ONLY_IN.keys() & {target.split(".")[0] for target in imports(path)}
        if name.split(".")[0] not in ONLY_IN[library]
    ]
    assert not wrong, "\n".join(wrong)


KNOWS_MODELS = ("bases", "pipelines", "tiny_world", "metrics", *NOT_INSTALLED)
"""Bases; what draws with them; the shipped base's own code; what only looks at pictures."""
CLASS = re.compile(
    r"(?:diffusers|transformers)\.(?:.*\.)?(?!DiffusionPipeline$)(?:UNet\w+Model|Autoencoder\w*|CLIP\w+|T5\w+"
    r"|\w*Transformer\w*Model|\w+Pipeline|\w+Scheduler|\w+ForCausalLM)"
)
ANY_CLASS = re.compile(r"(?:diffusers|transformers)\.[A-Z]\w*")
FAMILY = re.compile(
    r"(?:sd|sdxl|sd[123]|stable[ _-]?diffusion(?:[ _-]?xl)?|flux|sana|chroma|qwen|z[_-]?image)", re.IGNORECASE
)


def names_of_families(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and FAMILY.fullmatch(node.value):
            yield repr(node.value)
        if isinstance(node, ast.Attribute) and node.attr in ("family", "addition_embed_type"):
            yield f".{node.attr}"


def test_only_bases_know_families_and_the_classes_of_models() -> None:
    wrong = []
    for name, path in MODULES.items():
        if name.split(".")[0] in KNOWS_MODELS:
            continue
        forbidden = ANY_CLASS if name.startswith("training") else CLASS
        classes = {each for each in imports(path) if forbidden.fullmatch(each)}
        wrong += [f"{name}: {found}; ask ether_diffusion.bases" for found in classes]
        wrong += [f"{name}: {found}; ask ether_diffusion.bases" for found in names_of_families(path)]
    assert not wrong, "\n".join(wrong)
