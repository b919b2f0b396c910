"""Small models built from configs, with fixed seeds: nothing here reaches a hub."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from tiny_pipelines import SMALL_UNET
from torch import Tensor, nn

UNetInputs = tuple[Tensor, Tensor, Tensor]
Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
Factory = pytest.TempPathFactory


LONGEST = (
    "studio_browser_train", "demo", "studio_browser_drawing", "studio_server", "real_architectures",
    "flag_effects", "studies", "flow_training", "studio_browser_library", "diffusers", "benchmark",
    "processes", "kill", "docs", "studio_endpoints", "studio_runs", "studio_engine", "packaging",
    "serving_api", "serving_engine", "single_file_base", "resume", "export", "generate",
    "hooked_layers", "methods", "console", "run_troubles", "imports", "bench_training",
    "pipelines_compiled", "pipelines_adapters", "interrupts", "training_evaluation", "evaluate_command",
    "evaluate_control", "control_pipelines", "studio_uploads", "real_photographs", "bad_inputs",
    "study_control", "run_folder", "random_transforms", "doctor", "adapter_loading", "flow_bases", "samples",
    "segmenter", "control_methods", "base_variants", "generate_control", "training_bases", "training_control",
    "tiny_world_weights", "serving_ray",
)  # fmt: skip
"""Files that draw, train or start processes for more than seconds, the longest first."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that all workers end together; `make test-quick` leaves them out."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.stem in place:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forgotten_precision() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run for all of them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A studio that serves with the adapters Fox, Classes and Shapes in its library, whose ids it knows."""
    from browser import running_studio
    from studio_files import furnish

    folder = tmp_path_factory.mktemp("furnished") / "studio"
    ids = furnish(folder)
    with running_studio(folder) as running:
        running.ids = ids
        yield running


@pytest.fixture(scope="session")
def drawing_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A studio without its page, with adapters of many kinds in its library."""
    from studio_folders import open_drawing_studio

    opened = open_drawing_studio(tmp_path_factory.mktemp("drawing"))
    yield opened
    opened.studio.close()
    assert opened.studio.engine.line.is_free


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser, which ends with its module: a loop of events runs in the thread meanwhile."""
    from browser import running_browser

    with running_browser() as running:
        yield running


def tiny_unet() -> UNet2DConditionModel:
    """A UNet that always has the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UNet2DConditionModel(**SMALL_UNET).eval()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def unet_inputs() -> UNetInputs:
    return torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 7, 32)


@pytest.fixture
def predict(unet_inputs: UNetInputs) -> Callable[..., Tensor]:
    """Return a function that runs a UNet on fixed inputs without gradients."""

    def run(model: nn.Module, **options: object) -> Tensor:
        with torch.no_grad():
            sample: Tensor = model(
                *(x.to(_dtype(model)) if x.is_floating_point() else x for x in unet_inputs), **options
            )[0]
        return sample

    return run


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for name, p in model.named_parameters() if "ether_" not in name)


@pytest.fixture(scope="session")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a family's tiny base."""
    from flow_pipelines import flow_pipeline

    @cache
    def folder(family: str) -> Path:
        path = tmp_path_factory.mktemp(family) / "base"
        flow_pipeline(family).save_pretrained(path)
        return path

    return folder
