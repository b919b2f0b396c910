"""The embedded transformer, trained by flow matching, is a base like the others, and learns subjects."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from test_tiny_world_weights import SCENES

from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import open_base
from ether_diffusion.bases.stable_diffusion_3 import StableDiffusion3
from ether_diffusion.pipelines import EtherStableDiffusion3Pipeline
from ether_diffusion.tiny_world import FLOW_ALIAS, GUIDANCE_SCALE, WEIGHTS_FOLDER, tiny_world_path
from ether_diffusion.tiny_world.concepts import find_concept, load_concepts
from ether_diffusion.tiny_world.pictures import generate
from recipes.tiny_world.background_colours import background_accuracy
from recipes.tiny_world.judge import load_judge, rank_concepts, top_accuracy
from recipes.tiny_world.learned_subject import draw_subject, learn_subject

FOLDER = tiny_world_path(FLOW_ALIAS)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return EtherStableDiffusion3Pipeline.from_pretrained(FLOW_ALIAS, dtype=torch.float32)


def test_the_name_opens_a_stable_diffusion_3_of_64_px_that_is_drawn_as_this_world_is() -> None:
    base = open_base(FLOW_ALIAS)
    assert isinstance(base, StableDiffusion3)
    assert (base.folder, base.native_size, base.guidance_scale) == (FOLDER, 64, GUIDANCE_SCALE)
    assert shareable_name(base.folder) == FLOW_ALIAS
    assert base.load_noise().scheduler.config.shift == 1.0


def test_the_folder_is_at_most_15_megabytes_of_float16_beside_the_shared_autoencoder() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    own = [path for path in files if path.resolve().is_relative_to(FOLDER)]
    assert sum(path.stat().st_size for path in own) <= 15e6
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (FOLDER / weights).read_bytes() == (WEIGHTS_FOLDER / weights).read_bytes()


def test_stock_diffusers_draws_what_our_pipeline_draws(pipeline: StableDiffusion3Pipeline) -> None:
    stock = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    prompts = ["a cat on a red background"]
    pictures = [generate(each, prompts, num_steps=2)[0] for each in (stock, pipeline)]
    assert torch.equal(*pictures)


@pytest.mark.slow
def test_it_draws_what_captions_say(pipeline: StableDiffusion3Pipeline) -> None:
    pictures, _ = generate(pipeline, [scene.caption() for scene in SCENES])
    labels = torch.tensor([load_concepts("trained").index(scene.concept) for scene in SCENES])
    ranked = rank_concepts(load_judge(WEIGHTS_FOLDER), pictures, num_concepts=len(load_concepts("trained")))
    assert top_accuracy(ranked, labels, 1) >= 0.8
    assert background_accuracy(pictures, SCENES) >= 0.8


@pytest.mark.slow
def test_it_learns_a_subject_that_it_never_saw_by_the_score_of_the_demonstration(tmp_path: Path) -> None:
    concept = find_concept("robot")
    adapter = learn_subject(concept, tmp_path, {"max_train_steps": 100}, base=FLOW_ALIAS)
    scores = draw_subject(concept, adapter, base=FLOW_ALIAS).scores()
    assert scores["base_recognised"] <= 0.125
    assert scores["adapter_recognised"] >= 0.625
    assert scores["adapter_background"] >= 0.8
