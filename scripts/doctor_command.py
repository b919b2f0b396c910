"""What this machine has and can do: packages, devices, memory, the Hub, bases, and a step of training."""

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement
from PIL import Image

from ether_diffusion.bases import Base, open_base
from ether_diffusion.bases.found import FoundBase, find_bases
from ether_diffusion.console import machine_memory
from ether_diffusion.pipelines.opening import default_device, default_dtype
from ether_diffusion.scripts import command_options as told
from ether_diffusion.scripts.drawing import hush_libraries
from ether_diffusion.strict_json import Json
from ether_diffusion.training import run as training_run
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.wording import printable

MIB, GIB = 2**20, 2**30
PACKAGE = "ether-diffusion"
PATIENCE_SECONDS = 5.0


def bases(options: told.Bases) -> None:
    """Print the bases that lie here."""
    found = find_bases(map(Path, options.folder))
    if options.json_:
        print(json.dumps([vars(each) for each in found], indent=2))
        return
    for each in found:
        print(_line_of(each))


def doctor(options: told.Doctor) -> int:
    """Print what is here; return 1 where a package that is needed is missing or too old, else 0."""
    hush_libraries()
    wanted = [open_base(name) for name in options.base or ("tiny_world_2",)]  # refused first of all
    bad = list(_bad_packages())
    sections = {
        "system": _system(),
        "packages": _packages(),
        "device": _device(),
        "hub": _hub(),
        "bases": (_line_of(each) for each in find_bases()),
        "one step of training": (line for base in wanted for line in _step(base)),
    }
    for title, lines in sections.items():
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    for each in bad:
        print(f"to mend: pip install '{each}'")
    return 1 if bad else 0


def _system() -> Iterator[str]:
    yield f"Python {platform.python_version()} on {platform.platform()}"
    available = min(machine_memory(), psutil.virtual_memory().available)
    yield f"memory: {machine_memory() / GIB:.1f} GiB, {available / GIB:.1f} free; {os.cpu_count()} cores"
    there = next(
        path for path in (Path(constants.HF_HOME), *Path(constants.HF_HOME).parents) if path.exists()
    )
    yield f"disk: {shutil.disk_usage(there).free / GIB:.1f} GiB free for bases in {constants.HF_HOME}"


def _requirements() -> Iterator[tuple[Requirement, str, str | None]]:
    """Yield what is required, of which extra or "", and the version that is installed."""
    for text in importlib.metadata.requires(PACKAGE) or ():
        required = Requirement(text)
        extra = "" if required.marker is None else str(required.marker).partition("extra == ")[2].strip("\"'")
        if extra == "dev" or not (required.marker is None or required.marker.evaluate({"extra": extra})):
            continue
        try:
            yield required, extra, importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            yield required, extra, None


def _packages() -> Iterator[str]:
    yield f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    for required, extra, installed in _requirements():
        needed = f"needs {required.specifier}" if required.specifier else "any version"
        if installed is None:
            yield f"{required.name} is not installed ({needed}{f', in the extra {extra}' if extra else ''})"
        else:
            old = "" if required.specifier.contains(installed, prereleases=True) else ": TOO OLD"
            yield f"{required.name} {installed} ({needed}){old}"


def _bad_packages() -> Iterator[Requirement]:
    for required, extra, installed in _requirements():
        if (installed is None and not extra) or not (
            installed is None or required.specifier.contains(installed, prereleases=True)
        ):
            yield Requirement(f"{required.name}{required.specifier}")


def _device() -> Iterator[str]:
    device = default_device()
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            sizes = f"{total / GIB:.1f} GiB, {free / GIB:.1f} free"
            yield f"cuda:{index}: {torch.cuda.get_device_name(index)}, {sizes}"
    else:
        yield f"{device.type}, with {torch.get_num_threads()} threads of torch {torch.__version__}"
    bf16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    yield f"draws in {default_dtype(device)}; bfloat16 {'works' if bf16 else 'is not supported'}"


def _hub() -> Iterator[str]:
    if constants.HF_HUB_OFFLINE:
        yield "not asked, as HF_HUB_OFFLINE says; bases come from folders, files and the cache"
        return
    token = get_token()
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    place = constants.ENDPOINT if token is None else f"{constants.ENDPOINT}/api/whoami-v2"
    try:
        with urlopen(Request(place, headers=headers), timeout=PATIENCE_SECONDS) as answer:
            name = json.loads(answer.read())["name"] if token else None
    except HTTPError as error:
        yield f"{constants.ENDPOINT} answers {error.code} {error.reason}"
    except (OSError, ValueError, KeyError) as error:
        yield f"{constants.ENDPOINT} cannot be reached ({printable(str(error), 200)})"
    else:
        advice = "not logged in; `hf auth login` opens gated bases, as FLUX.1-dev"
        yield f"{constants.ENDPOINT} is reachable; {f'logged in as {printable(name)}' if token else advice}"


def _line_of(base: FoundBase) -> str:
    size = f"{base.num_bytes / GIB:.2f} GiB" if base.num_bytes > GIB else f"{base.num_bytes / MIB:.0f} MiB"
    problem = "" if base.problem is None else f"; cannot be used: {printable(base.problem, 300)}"
    return f"{printable(base.name)}: {base.kind}, {size}{problem}"


def _step(base: Base) -> Iterator[str]:
    """Do one step and draw one picture as a run does, in a folder of its own, and say what they took."""
    name, said = base.name, _Said()
    training_run.logger.addHandler(said)
    level, training_run.logger.propagate = training_run.logger.level, False
    training_run.logger.setLevel(logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder, "photos")
            photos.mkdir()
            Image.radial_gradient("L").convert("RGB").resize((base.native_size,) * 2).save(photos / "0.png")
            settings: dict[str, Json] = {
                "pretrained_model_name_or_path": name,
                "instance_data_dir": str(photos),
                "instance_prompt": "a photo of sks thing",
                "validation_prompt": ["a photo of sks thing"],
                "max_train_steps": 1,
                "output_dir": str(Path(folder, "run")),
            }
            training_run.train_dreambooth(DreamBoothConfig.from_flat(settings), dry_run=True)
    finally:
        training_run.logger.removeHandler(said)
        training_run.logger.setLevel(level)
        training_run.logger.propagate = True
    yield f"{name} at {base.native_size} px, one photo:"
    yield from (f"  {line}" for line in said.lines if line.startswith(("trained:", "load", "one ")))


class _Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())
