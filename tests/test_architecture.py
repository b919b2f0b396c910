"""The direction of imports, which has no other arrows, and where libraries may appear."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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
        "options",
        "flags",
        "tiny_world",
    },
    {"tuner", "registration"},
    {"adapters"},
    {"bases", "control"},
    {"metrics"},
    {"training", "pipelines"},
    {"benchmark"},
    {"ui", "scripts"},
    {"recipes", "tools"},
    {"research"},
]
"""Each part may import what stands above it, and its own level."""

ONLY_IN = {
    "accelerate": {"training", "recipes"},
    "gradio": {"ui"},
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


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_a_module_imports_only_what_stands_above_it(name: str) -> None:
    own = level(name.split(".")[0])
    for target in imports(MODULES[name]):
        parts = target.split(".")
        if (
            parts[0] == PACKAGE
            and len(parts) > 1
            and (ROOT / PACKAGE / parts[1]).with_suffix(".py").exists() | (ROOT / PACKAGE / parts[1]).is_dir()
        ):
            assert level(parts[1]) <= own, f"{name} imports {target}, which stands below it"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_appears_only_where_it_belongs(library: str) -> None:
    for name, path in MODULES.items():
        if library in {target.split(".")[0] for target in imports(path)}:
            assert ONLY_IN[library] & set(name.split(".")), f"{name} imports {library}"


def test_nothing_that_is_installed_imports_what_is_not() -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] not in NOT_INSTALLED:
            found = set(NOT_INSTALLED) & {target.split(".")[0] for target in imports(path)}
            assert not found, f"{name} imports {found}"


def test_no_module_imports_a_top_level_folder_by_its_bare_name() -> None:
    for name, path in MODULES.items():
        bare = {"pipelines", "ui", "scripts"} & {target.split(".")[0] for target in imports(path)}
        assert not bare, f"{name} imports {bare}; use {PACKAGE}.…"
