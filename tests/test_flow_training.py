"""Every transformer family trains, goes on after a kill, is saved, loaded, exported, and is the base at 0."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from flow_pipelines import FLOW_PIPELINES, SIDE, draw, flow_pipeline
from forked_runs import exit_code, fork, training, training_until_change
from PIL import Image
from studio_folders import begin
from torch.testing import assert_close
from training_runs import config, log_of, trained_files, write_photos

from ether_diffusion import load_ether
from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.scripts.ether import main
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import ControlRunConfig
from ether_diffusion.training.processes import make_accelerator
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.training.setup import check_run
from ether_diffusion.tuner.contexts import chosen_adapters
from ether_diffusion.ui.jobs import Job, Working
from ether_diffusion.ui.requests import GenerateRequest
from ether_diffusion.ui.studio import Studio

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # its own
Bases = Callable[[str], Path]

FLAGS: dict[str, Json] = {
    "resolution": SIDE,
    "max_train_steps": 5,
    "checkpointing_steps": 1,
    "learning_rate": 0.1,  # five steps are to be seen
    "weighting_scheme": "logit_normal",
    "validation_prompt": ["a sks cat"],
    "num_validation_images": 1,
    "validation_num_inference_steps": 2,
    "validation_steps": 5,
    "export_lora": True,
}


class Trained(NamedTuple):
    """A family, and the folder of a run that was killed on its way."""

    family: str
    folder: Path


@pytest.fixture(scope="module", params=FLOW_PIPELINES)
def trained(
    request: pytest.FixtureRequest, flow_base: Bases, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp("training")
    flags = FLAGS | {"pretrained_model_name_or_path": str(flow_base(request.param))}
    run = config(folder, **flags)
    assert exit_code(fork(training_until_change(run, 90))) == -signal.SIGKILL
    assert 0 < len(log_of(folder / "run")) < 5
    assert exit_code(fork(training(run), folder / "messages")) == 0, (folder / "messages").read_text()
    return Trained(request.param, folder)


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(trained: Trained, flow_base: Bases) -> None:
    whole = trained.folder / "whole"
    flags = FLAGS | {"pretrained_model_name_or_path": str(flow_base(trained.family))}
    assert train_dreambooth(config(trained.folder, **flags, output_dir=str(whole))) == 0
    assert trained_files(trained.folder / "run") == trained_files(whole)
    assert log_of(trained.folder / "run") == log_of(whole)


def test_the_adapter_and_its_lora_draw_the_same_and_no_strength_is_the_base(trained: Trained) -> None:
    base, native, lora = (flow_pipeline(trained.family) for _ in range(3))
    plain = draw(base, trained.family)
    report = load_ether(native, trained.folder / "run")
    assert report.base_match == "same"
    assert report.components.keys() == {"transformer"}
    lora.load_lora_weights(trained.folder / "run")
    adapted = draw(native, trained.family)
    assert (adapted - plain).abs().max() > 1e-3
    assert_close(draw(lora, trained.family), adapted, atol=1e-4, rtol=0)
    with chosen_adapters(native.transformer, {"default": 0.0}):
        assert torch.equal(draw(native, trained.family), plain)


def test_another_family_refuses_the_adapter_and_is_as_before(trained: Trained) -> None:
    # Chroma's projections have the names and widths of FLUX.1's, and at this size Qwen-Image's
    other = flow_pipeline("chroma" if trained.family == "flux" else "flux")
    before = [name for name, _ in other.transformer.named_modules()]
    with pytest.raises(ValueError, match="load the base it was made for"):
        load_ether(other, trained.folder / "run")
    assert [name for name, _ in other.transformer.named_modules()] == before


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_generate_draws_it_beside_the_base(trained: Trained, flow_base: Bases) -> None:
    base, out = flow_base(trained.family), trained.folder / "drawn"
    words = f"--size {SIDE} --seed 0 1 --strength 0 1 --batch_size 2 --steps 2 --grid --prompt".split()
    words += ["a sks cat", "--adapter", str(trained.folder / "run"), "--output", str(out)]
    assert main(["generate", "--base", str(base), *words]) == 0
    drawn = [out / "pictures" / f"prompt1_seed1_{name}.png" for name in ("base", "run0", "run1")]
    pictures = [Image.open(path).tobytes() for path in drawn]
    assert pictures[0] == pictures[1] != pictures[2]
    found = read_image_metadata(drawn[2])
    assert found is not None
    assert found.pipeline == f"Ether{type(flow_pipeline(trained.family)).__name__}"
    assert [use.name for use in found.adapters] == ["run"]
    words[-1] = str(trained.folder / "negative")
    is_refused = trained.family in ("flux", "flux2_dev")  # their guidance was distilled into them
    assert main(["generate", "--base", str(base), *words, "--negative_prompt", "snow"]) == 2 * is_refused
    away = trained.folder / "negative" / "pictures" / drawn[2].name
    assert is_refused or Image.open(away).tobytes() != pictures[2]


def test_the_studio_draws_and_looks_at_its_steps(trained: Trained, flow_base: Bases) -> None:
    studio = Studio(trained.folder / "studio", base=str(flow_base(trained.family)))
    adapter = studio.library.add_run_result(trained.folder / "run", "cat").id
    asked = GenerateRequest("a cat", adapters={adapter: 1.0}, steps=2, width=SIDE, height=SIDE)
    *events, end = begin(studio.engine, asked)
    studio.close()
    assert isinstance(end, Job)
    seen = [event.image for event in events if isinstance(event, Working) and event.image]
    assert {image.size for image in seen} == {(SIDE, SIDE)}


@pytest.mark.parametrize("family", FLOW_PIPELINES)
def test_priors_masks_buckets_and_captions_train(family: str, flow_base: Bases, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", count=2)
    write_photos(tmp_path / "photos", count=2, wide=2)
    (tmp_path / "masks").mkdir()
    for photo in photos.glob("*.png"):
        shutil.copy(photo, tmp_path / "masks")
    write_photos(tmp_path / "class", count=2, seed=5)
    flags: dict[str, Json] = FLAGS | {
        "pretrained_model_name_or_path": str(flow_base(family)),
        "instance_data_dir": str(photos),
        "mask_data_dir": str(tmp_path / "masks"),
        "aspect_ratio_buckets": f"{SIDE},{SIDE};{SIDE},{2 * SIDE}",
        "use_aspect_ratio_buckets": True,
        "caption_dropout": 0.5,
        "class_prompt": "a cat",
        "max_train_steps": 3,
        "train_batch_size": 2,
        "cache_latents": False,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "validation_prompt": [],
        "weighting_scheme": "cosmap",
    }
    losses = []
    images: dict[str, Json] = {"class_data_dir": str(tmp_path / "class"), "num_class_images": 2}
    for kind, further in (("frozen", {}), ("class_images", images)):
        flags |= {"prior_preservation": kind, "output_dir": str(tmp_path / kind)}
        run = config(tmp_path, **flags, **further)
        assert train_dreambooth(run) == 0
        losses.append([line["loss"] for line in log_of(run.output.output_dir)])
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0] != losses[1]


def test_the_card_says_what_to_train_on_instead_of_a_distilled_base(flow_base: Bases, tmp_path: Path) -> None:
    shutil.copytree(flow_base("flux2"), tmp_path / "klein")
    path = tmp_path / "klein" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_distilled": True}))
    flags: dict[str, Json] = {"resolution": SIDE, "max_train_steps": 1}
    said = "klein was distilled to draw in a few steps, which training undoes; train on black-forest-labs/"
    for base, is_distilled in ((tmp_path / "klein", True), (flow_base("flux2"), False)):
        flags |= {"pretrained_model_name_or_path": str(base), "output_dir": f"{base}_run"}
        run = config(tmp_path, **flags)
        assert train_dreambooth(run) == 0
        assert (said in (run.output.output_dir / "README.md").read_text()) == is_distilled


def test_control_images_are_refused_by_name(flow_base: Bases, tmp_path: Path) -> None:
    flags: dict[str, Json] = {"pretrained_model_name_or_path": str(flow_base("flux")), "detector": "canny"}
    flags |= {"instance_data_dir": str(write_photos(tmp_path / "photos")), "resolution": SIDE}
    run = ControlRunConfig.from_flat({**flags, "output_dir": str(tmp_path / "run")}).resolved()
    with pytest.raises(ValueError, match=r"control images are for Stable Diffusion .* the base is of Flux 1"):
        check_run(run, make_accelerator(run.compute))
