"""The shipped pipelines: stock diffusers loads them, they are small, and draw what captions say."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors import safe_open

from ether_diffusion.tiny_world import ALIAS, EMBEDDED, SECOND_ALIAS, resolve_base, tiny_world_path
from ether_diffusion.tiny_world.concepts import RENDERS_FOLDER, find_concept, load_concepts
from ether_diffusion.tiny_world.pictures import draw_scenes, generate
from ether_diffusion.tiny_world.world import Background, Scene
from recipes.tiny_world.autoencoder import psnr, reconstruct
from recipes.tiny_world.background_colours import background_accuracy
from recipes.tiny_world.judge import load_judge, rank_concepts, top_accuracy

EASY = {
    "cat": "white",
    "frog": "purple",
    "strawberry": "yellow",
    "rocket": "blue",
    "car": "teal",
    "koala": "pink",
}
SCENES = [Scene(find_concept(name), Background("plain", colour)) for name, colour in EASY.items()]
LABELS = torch.tensor([load_concepts("trained").index(scene.concept) for scene in SCENES])


@pytest.mark.parametrize("alias", EMBEDDED)
def test_no_config_names_a_place_on_the_machine_that_made_it(alias: str) -> None:
    configs = [json.loads(path.read_bytes()) for path in tiny_world_path(alias).rglob("config.json")]
    assert len(configs) > 2
    assert not [config for config in configs if Path(config.get("_name_or_path", "")).is_absolute()]


@pytest.fixture(scope="module", params=[ALIAS, SECOND_ALIAS])
def pipeline(request: pytest.FixtureRequest) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_world_path(request.param))


def test_the_names_of_the_shipped_pipelines_alone_are_mapped() -> None:
    assert resolve_base("tiny_world") == str(tiny_world_path())
    for alias in EMBEDDED:
        assert resolve_base(alias) == str(tiny_world_path(alias))
    assert resolve_base("some/folder") == "some/folder"


@pytest.mark.parametrize("alias", EMBEDDED)
def test_the_folder_is_at_most_27_megabytes_of_float16(alias: str) -> None:
    files = [path for path in tiny_world_path(alias).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 27e6
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
            assert kinds <= {"F16", "I64"}


def test_both_copyright_lines_travel_with_the_weights_and_the_renders() -> None:
    for folder in (*map(tiny_world_path, EMBEDDED), RENDERS_FOLDER):
        notice = (folder / "NOTICE").read_text(encoding="utf-8")
        assert "Copyright (c) Microsoft Corporation" in notice
        assert "Copyright (c) LobeHub" in notice


def test_every_attention_dimension_can_be_cut_into_4_8_and_16_blocks(
    pipeline: StableDiffusionPipeline,
) -> None:
    projections = [
        module
        for name, module in pipeline.unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    assert len(projections) >= 40
    assert all(size % 16 == 0 for module in projections for size in module.weight.shape)


def test_attention_works_at_two_resolutions_or_more(pipeline: StableDiffusionPipeline) -> None:
    crossing = [block for block in pipeline.unet.config.down_block_types if block.startswith("CrossAttn")]
    assert len(crossing) >= 2


def test_true_pictures_survive_the_autoencoder(pipeline: StableDiffusionPipeline) -> None:
    scenes = [scene for scene in SCENES if scene.concept.name in ("cat", "frog", "rocket")]
    pictures = draw_scenes(scenes, size=pipeline.vae.config.sample_size)
    assert float(psnr(reconstruct(pipeline.vae, pictures), pictures).mean()) > 27


# diffusers 0.42 still calls numpy.array on tensors in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, EulerDiscreteScheduler])
def test_pictures_show_the_concept_and_the_background_of_their_captions(
    pipeline: StableDiffusionPipeline, scheduler: type[DDIMScheduler] | None
) -> None:
    own = pipeline.scheduler
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(own.config)
    try:
        pictures, _ = generate(pipeline, [scene.caption() for scene in SCENES], num_steps=12)
    finally:
        pipeline.scheduler = own
    ranked = rank_concepts(load_judge(tiny_world_path()), pictures)
    assert top_accuracy(ranked, LABELS, 1) >= 4 / 6
    assert background_accuracy(pictures, SCENES) >= 5 / 6
