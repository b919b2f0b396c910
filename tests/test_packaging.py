"""What is built is what the checkout shows, under one name, and works away from it."""

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the unpacked sdist, as an index would."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, ROOT, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment that sees this one's libraries but only the wheel's ether_diffusion."""
    target = tmp_path_factory.mktemp("venv")
    venv.create(target, with_pip=True, symlinks=True)
    site = next((target / "lib").iterdir()) / "site-packages"
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    run(target / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=target)
    return target


def test_the_wheel_installs_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ether_diffusion"}


def test_the_wheel_holds_every_module_and_all_data_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    expected = {
        f"ether_diffusion/{path.relative_to(ROOT / 'ether_diffusion')}"
        for path in (ROOT / "ether_diffusion").rglob("*")
        if path.suffix in {".py", ".typed", ".json", ".webp", ".safetensors", ".txt"}
        and not any(parent.is_symlink() for parent in path.parents)
    } | {
        f"ether_diffusion/{folder}/{path.relative_to(ROOT / folder)}"
        for folder in ("pipelines", "ui", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected <= packed


def test_the_table_of_packages_names_every_folder() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "ether_diffusion").rglob("__init__.py")
        if not any(parent.is_symlink() for parent in path.parents)
    } | {
        f"ether_diffusion.{'.'.join(p.parent.relative_to(ROOT).parts)}"
        for f in ("pipelines", "ui", "scripts")
        for p in (ROOT / f).rglob("__init__.py")
    }
    assert set(table) == folders


def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import ether_diffusion as e, ether_diffusion.scripts, ether_diffusion.ui;"
        "print(e.__file__, e.EtherConfig().variant)"
    )
    file, variant = run(installed / "bin" / "python", "-W", "ignore", "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed)
    assert variant == "ether"


def test_the_wheel_installs_the_ether_command(installed: Path, tmp_path: Path) -> None:
    assert "inspect" in run(installed / "bin" / "ether", "--help", cwd=tmp_path)


def test_the_links_make_the_checkout_look_like_the_wheel() -> None:
    for folder in ("pipelines", "ui", "scripts"):
        assert (ROOT / "ether_diffusion" / folder).resolve() == ROOT / folder
