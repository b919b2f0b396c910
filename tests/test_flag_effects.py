"""Every option does what it says: for each one a run, or a loaded run, that differs by that option alone."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import TypeVar

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from flag_runs import (
    CLASS_IMAGES,
    DATA_SET,
    DRAWN,
    FLOW,
    FROZEN,
    LORA,
    MASKED,
    MEASURED,
    Flags,
    Outcome,
    World,
    listening,
    made_world,
    write_drawing_base,
)
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from scripted_evaluation import RISING, train_scripted
from training_runs import contents, log_of

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.presets import OLD_NAMES, translate_old_names
from ether_diffusion.training.setup import Run

Test = TypeVar("Test", bound=Callable[..., object])

TRAINS_OTHERWISE: list[tuple[str, Json, Flags]] = [
    ("pretrained_model_name_or_path", "@other base", {}),
    ("variant", "fp16", {}),
    ("pretrained_vae_model_name_or_path", "@other base/vae", {}),
    ("tokenizer_name", "@tokenizer", {}),
    ("instance_data_dir", "@other photos", {}),
    ("dataset_config_name", "two", DATA_SET),
    ("image_column", "copy", DATA_SET),
    ("caption_column", "words", DATA_SET),
    ("max_train_samples", 1, {}),
    ("instance_prompt", "a sks dog", {}),
    ("token", "abc", {"instance_prompt": "a {token} cat", "token": "sks"}),
    ("caption_template", "art: {caption}", {}),
    ("resolution", 16, {}),
    ("center_crop", True, {}),
    ("random_flip", True, {}),
    ("crops_per_photo", 1, {}),
    ("caption_dropout", 1.0, {}),
    ("use_aspect_ratio_buckets", True, {"resolution": 16}),
    ("aspect_ratio_buckets", "8,24", {"use_aspect_ratio_buckets": True}),
    ("mask_from_alpha", True, {}),
    ("mask_data_dir", "@masks", {}),
    ("unmasked_weight", 0.5, MASKED),
    ("image_interpolation_mode", "nearest", {}),
    ("cache_latents", False, {}),  # crops are then drawn for each visit
    ("follow_symlinks", True, {"instance_data_dir": "@mixed"}),
    ("prior_preservation", "frozen", {"class_prompt": "a cat"}),
    ("class_data_dir", "@other photos", CLASS_IMAGES),
    ("class_prompt", "a dog", FROZEN),
    ("prior_loss_weight", 0.1, FROZEN),
    ("num_blocks", 4, {}),
    ("sides", "input", {}),
    ("rank", 2, LORA),
    ("lora_alpha", 1, LORA),
    ("dropout", 0.5, {}),
    ("train_batch_size", 2, {}),
    ("gradient_accumulation_steps", 2, {}),
    ("learning_rate", 1e-3, {}),
    ("lr_warmup_steps", 2, {"lr_scheduler": "linear"}),
    ("adam_beta1", 0.5, {}),
    ("adam_beta2", 0.5, {}),
    ("adam_weight_decay", 0.5, {}),
    ("adam_epsilon", 0.1, {}),
    ("max_grad_norm", 1e-4, {}),
    ("snr_gamma", 1.0, {}),
    ("weighting_scheme", "cosmap", FLOW),
    ("timestep_shift", 1.5, FLOW),
    ("noise_offset", 0.5, {}),
    ("use_ema", True, {}),
    ("ema_decay", 0.1, {"use_ema": True}),
    ("seed", 1, {}),
    ("mixed_precision", "bf16", {}),
]
"""Options that make other adapters: name, value, and what is given beside it in both runs."""

SHOWN = {name for name, _, _ in TRAINS_OTHERWISE}
SHOWN |= {"report_to", "logging_dir", "tracker_project_name"}  # in test_trackers
SHOWN |= {"push_to_hub", "hub_model_id", "hub_private_repo"}  # in test_hub_upload


def shows(*names: str) -> Callable[[Test], Test]:
    """Mark the test that fails where these options do nothing."""
    SHOWN.update(names)
    return lambda test: test


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with made_world(tmp_path_factory.mktemp("world")) as made:
        yield made


def test_two_equal_runs_make_equal_adapters(world: World) -> None:
    """Without this, the next test would say nothing."""
    assert world.run_anew(output_dir="@again").trained == world.run().trained


@pytest.mark.parametrize(("name", "value", "beside"), TRAINS_OTHERWISE, ids=lambda value: str(value)[:30])
def test_with_another_value_another_adapter_is_trained(
    world: World, name: str, value: Json, beside: Flags
) -> None:
    assert world.run(**(beside | {name: value})).trained != world.run(**beside).trained


@shows("dataset_name")
def test_a_data_set_is_trained_on_in_place_of_a_folder(world: World) -> None:
    plain = world.run(instance_data_dir="@other photos", instance_prompt="x", caption_template="a cat")
    rows = world.run(
        instance_data_dir=None, dataset_name="@other photos", instance_prompt="x", caption_template="a cat"
    )
    assert rows.trained == plain.trained


@shows("revision", "local_files_only")
def test_a_base_of_the_hub_is_taken_at_its_revision_and_without_asking(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, asked = world.folder / "hub" / "models--somebody--base", []
    for number, (name, base) in enumerate({"main": "base", "old": "other base"}.items()):
        commit = str(number) * 40
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(world.folder / base, repository / "snapshots" / commit)

    def ask(*_: object, **__: object) -> None:
        asked.append(1)
        raise OfflineModeIsEnabled("no net")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world.folder / "hub"))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", ask)
    hub: Flags = {"pretrained_model_name_or_path": "somebody/base", "local_files_only": True}
    assert world.run(**hub).trained == world.run().trained
    old = world.run(pretrained_model_name_or_path="@other base")
    assert world.run(**hub, revision="old").trained == old.trained
    assert not asked
    world.run(pretrained_model_name_or_path="somebody/base")
    assert asked


@shows("resolution")
def test_pictures_are_drawn_at_the_resolution(world: World) -> None:
    run = world.run(**DRAWN, resolution=16)
    with Image.open(run.folder / "samples" / "final" / "prompt-00_seed-0.png") as picture:
        assert picture.size == (16, 16)


@shows("pre_compute_text_embeddings")
def test_prompts_are_embedded_once_or_as_they_come(world: World) -> None:
    with pytest.raises(KeyError):
        world.load().encode(["a prompt of no photo"])
    late = world.load(pre_compute_text_embeddings=False)
    assert late.encode(["a prompt of no photo"]).sequence.shape[0] == 1


@shows("dataloader_num_workers")
def test_workers_load_what_is_not_cached(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    forks, fork = [], os.fork

    def counted() -> int:
        forks.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    run = world.run(cache_latents=False, dataloader_num_workers=2)
    assert len(forks) == 2
    assert run.trained == world.run(cache_latents=False).trained


@shows("strict", "follow_symlinks")
def test_files_that_are_not_used_are_said_or_refused(world: World) -> None:
    said = world.run(instance_data_dir="@mixed").said
    assert "not used: broken.png is empty" in said
    assert "not used: link.png is a link to" in said
    with pytest.raises(ValueError, match=r"broken\.png is empty \(0 bytes\)"):
        world.run_anew(instance_data_dir="@mixed", strict=True)
    assert "link.png" not in world.run(instance_data_dir="@mixed", follow_symlinks=True).said


@shows("prior_preservation", "num_class_images", "sample_batch_size", "prior_generation_precision")
def test_missing_class_images_are_drawn(world: World) -> None:
    drawing: Flags = CLASS_IMAGES | {"pretrained_model_name_or_path": "@drawing base", "max_train_steps": 1}
    write_drawing_base(world.folder / "drawing base")
    plain = world.run(**drawing | {"class_data_dir": "@plain"})
    one = world.run(**drawing | {"class_data_dir": "@one", "sample_batch_size": 1, "num_class_images": 3})
    world.run(**drawing | {"class_data_dir": "@coarse", "prior_generation_precision": "bf16"})
    drawn = {name: contents(world.folder / name) for name in ("plain", "one", "coarse")}
    assert [len(files) for files in drawn.values()] == [2, 3, 2]
    assert re.findall(r"class images: \d of \d", plain.said) == ["class images: 2 of 2"]
    assert re.findall(r"class images: (\d)", one.said) == ["1", "2", "3"]
    assert not drawn["coarse"].keys() & drawn["plain"].keys()


@shows("adapter")
@pytest.mark.parametrize(
    ("method", "found"),
    [("ether", "ETHER"), ("lora", "LORA"), ("oft", "OFT"), ("hra", "HRA"), ("full", "FULL")],
)
def test_the_adapter_is_of_the_method(world: World, method: str, found: str) -> None:
    run = world.run(adapter=method)
    assert run.adapter_config["peft_type"] == found
    assert run.shapes != world.run().shapes


@shows("num_blocks", "sides", "rank", "lora_alpha")
def test_sizes_of_the_adapter_are_as_asked(world: World) -> None:
    assert {shape[0] for shape in world.run(num_blocks=4).shapes.values()} == {4}
    assert len(world.run(sides="input").shapes) < len(world.run().shapes)
    assert {min(shape) for shape in world.run(adapter="lora", rank=2).shapes.values()} == {2}
    assert world.run(adapter="lora", lora_alpha=1).adapter_config["lora_alpha"] == 1


@shows("target_modules")
def test_modules_are_adapted_as_asked(world: World) -> None:
    assert {name.split(".")[-2] for name in world.run(target_modules="to_q, to_k").shapes} == {"to_q", "to_k"}
    wide = world.run(target_modules="attention_and_feedforward").shapes
    assert world.run().shapes.keys() < wide.keys()


@shows("train_text_encoder", "text_encoder_lr")
def test_the_text_encoder_is_trained_with_a_rate_of_its_own(world: World) -> None:
    def text_part(**flags: Json) -> bytes:
        run = world.run(train_text_encoder=True, **flags)
        return (run.folder / "text_encoder" / "adapter_model.safetensors").read_bytes()

    assert text_part() != text_part(text_encoder_lr=1e-4)
    assert world.run().names("text_encoder") == []


@shows("learning_rate", "scale_lr", "train_batch_size", "gradient_accumulation_steps")
def test_the_rate_is_the_one_given_and_scaled(world: World) -> None:
    assert world.run().rates == [1, 1, 1]
    assert world.run(learning_rate=3e-3).rates == [0.5, 0.5, 0.5]
    batches: Flags = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert world.run(scale_lr=True, **batches).rates == [4, 4, 4]


@shows("max_train_steps", "num_train_epochs", "repeats")
def test_a_run_is_as_long_as_asked(world: World) -> None:
    def steps(**flags: Json) -> int:
        return len(log_of(world.run(**flags).folder))

    assert steps(max_train_steps=2) == 2
    assert steps(max_train_steps=None, num_train_epochs=2) == 6
    assert steps(max_train_steps=None, num_train_epochs=1, repeats=2) == 6


@shows("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power")
def test_the_rate_goes_on_as_asked(world: World) -> None:
    def rates(name: str, **flags: Json) -> list[float]:
        return world.run(lr_scheduler=name, max_train_steps=4, **flags).rates

    assert rates("linear") == [1, 0.75, 0.5, 0.25]
    assert rates("constant_with_warmup", lr_warmup_steps=2) == [0, 0.5, 1, 1]
    assert rates("cosine_with_restarts", lr_num_cycles=2) == [1, 0.5, 1, 0.5]
    assert rates("polynomial", lr_power=2.0)[2] == pytest.approx(0.25, abs=1e-3)


@shows("optimizer")
def test_the_optimizer_is_the_one_asked_for_or_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(world.load().trainer.optimizer) is torch.optim.AdamW
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="adamw8bit needs a CUDA GPU, and there is none; use adamw"):
            world.load(optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match="prodigy needs the package prodigyopt; pip install prodigyopt"):
        world.load(optimizer="prodigy")
    stand_in = ModuleType("prodigyopt")
    stand_in.__dict__["Prodigy"] = torch.optim.NAdam
    monkeypatch.setitem(sys.modules, "prodigyopt", stand_in)
    optimizer = world.load(optimizer="prodigy").trainer.optimizer
    assert type(optimizer) is torch.optim.NAdam
    assert optimizer.param_groups[0]["lr"] == 1


@shows("use_ema")
def test_a_checkpoint_keeps_the_moving_average(world: World) -> None:
    assert world.run(use_ema=True).names("checkpoint-*/average*") == ["checkpoint-3/average.safetensors"]
    assert world.run().names("checkpoint-*/average*") == []


@shows("mixed_precision")
def test_the_base_is_held_in_the_precision_and_the_adapter_in_float32(world: World) -> None:
    unet = world.load(mixed_precision="bf16").unet
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in unet.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}


@shows("gradient_checkpointing")
def test_activations_are_computed_again_to_the_same_result(world: World) -> None:
    assert not world.load().unet.is_gradient_checkpointing
    run = world.load(gradient_checkpointing=True, train_text_encoder=True)
    assert all(part.model.is_gradient_checkpointing for part in run.trainer.parts)
    again, plain = world.run(gradient_checkpointing=True).tensors, world.run().tensors
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor)


@shows("attention")
@pytest.mark.parametrize(("attention", "kind"), [("sdpa", AttnProcessor2_0), ("eager", AttnProcessor)])
def test_attention_runs_on_the_kernels_asked_for(world: World, attention: str, kind: type) -> None:
    found = world.load(attention=attention).unet.attn_processors.values()
    assert {type(each) for each in found} == {kind}


@shows("enable_xformers_memory_efficient_attention", "allow_tf32")
def test_what_needs_a_gpu_is_said_without_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="xformers has kernels on CUDA only, and there is no CUDA GPU"):
        world.load(enable_xformers_memory_efficient_attention=True)
    assert not torch.backends.cuda.matmul.allow_tf32
    try:
        with listening() as said:
            world.load(allow_tf32=True)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert "allow_tf32 has no effect: there is no CUDA GPU" in said


@shows("quantize")
def test_four_bits_are_trained_beside_and_the_result_is_for_the_base_as_stored(world: World) -> None:
    if find_spec("bitsandbytes") is None:  # as in `make test`: see test_quantized.py
        with pytest.raises(ValueError, match=r"quantize=nf4 needs bitsandbytes, .* pip install"):
            world.load(quantize="nf4")
        return
    run = world.load(quantize="nf4")
    kinds = {type(module).__name__ for module in run.unet.modules()}
    assert "Linear4bit" in kinds
    assert "Linear4bit" not in {type(module).__name__ for module in world.load().unet.modules()}
    ours, plain = world.run(quantize="nf4").tensors, world.run().tensors
    assert ours.keys() == plain.keys()
    assert any(not torch.equal(ours[name], plain[name]) for name in ours)


@shows("torch_compile")
def test_the_blocks_of_the_unet_are_compiled(world: World) -> None:
    def compiled(run: Run) -> bool:
        return any(module._compiled_call_impl is not None for module in run.unet.modules())

    assert compiled(world.load(torch_compile=True))
    assert not compiled(world.load())


@shows("validation_prompt", "num_validation_images", "validation_steps", "validation_epochs")
def test_pictures_are_drawn_of_each_prompt_and_as_often_as_asked(world: World) -> None:
    assert world.run().names("samples") == []
    assert [name[-6:] for name in world.run(**DRAWN).names("samples/step-*")] == ["000000", "000003"]
    run = world.run(
        **DRAWN | {"validation_prompt": ["a cat", "a dog"], "num_validation_images": 2, "validation_steps": 2}
    )
    assert [name[-6:] for name in run.names("samples/step-*")] == ["000000", "000002", "000003"]
    assert len(run.names("samples/step-000002/*.png")) == 4
    by_epochs = world.run(**DRAWN, validation_epochs=1, train_batch_size=2, max_train_steps=4)
    assert [name[-6:] for name in by_epochs.names("samples/step-*")] == ["000000", "000002", "000004"]


@shows("validation_num_inference_steps", "validation_guidance_scale", "validation_negative_prompt")
@pytest.mark.parametrize(
    "flags",
    [
        {"validation_num_inference_steps": 3},
        {"validation_guidance_scale": 1.0},
        {"validation_negative_prompt": "a dog"},
    ],
)
def test_pictures_are_drawn_otherwise_and_the_adapter_is_the_same(world: World, flags: Flags) -> None:
    other, plain = world.run(**DRAWN | flags), world.run(**DRAWN)
    name = "samples/final/prompt-00_seed-0.png"
    assert (other.folder / name).read_bytes() != (plain.folder / name).read_bytes()
    assert other.trained == plain.trained == world.run().trained


@shows("eval_steps", "eval_prompt", "num_eval_images", "eval_encoder", "eval_num_inference_steps")
def test_scores_are_taken_as_often_and_of_what_was_asked_for(world: World) -> None:
    assert world.run().evaluations == []
    plain = world.run(**MEASURED)
    assert [line["step"] for line in plain.evaluations] == [0, 3]
    often = world.run(**MEASURED | {"eval_steps": 2})
    assert [line["step"] for line in often.evaluations] == [0, 2, 3]
    assert plain.evaluation["settings"]["prompts"][0] == "a sks cat in the snow"
    one = world.run(**MEASURED, eval_prompt=["a sks cat"])
    two = world.run(**MEASURED | {"num_eval_images": 2}, eval_prompt=["a sks cat"])
    drawn = world.run(**MEASURED, **DRAWN)
    assert one.evaluation["settings"]["prompts"] == drawn.evaluation["settings"]["prompts"] == ["a sks cat"]
    assert [len(run.evaluations[0]["evaluation"]["fidelity"]) for run in (plain, one, two)] == [4, 1, 2]
    others: list[Flags] = [{"eval_encoder": ["@dino", "@clip"]}, {"eval_num_inference_steps": 2}]
    for other in (world.run(**MEASURED | flags, eval_prompt=["a sks cat"]) for flags in others):
        assert other.evaluations[0]["eval_fidelity"] != one.evaluations[0]["eval_fidelity"]
    assert plain.trained == often.trained == world.run().trained


@shows("eval_max_drift", "eval_max_prompt_loss")
@pytest.mark.parametrize("name", ["eval_max_drift", "eval_max_prompt_loss"])
def test_a_step_out_of_bounds_is_not_the_best(world: World, name: str) -> None:
    beside: Flags = {"eval_prompt": ["a sks cat"], "learning_rate": 1.0}
    assert world.run(**MEASURED, **beside).evaluation["best_step"] == 3
    strict = world.run(**MEASURED | {name: 1e-9}, **beside)
    found = strict.evaluation["curve"][-1]
    base = strict.evaluation["curve"][0]
    is_out = name == "eval_max_drift" or found["prompt"]["mean"] < base["prompt"]["mean"]
    assert (strict.evaluation["best_step"] is None) == is_out
    assert bool(strict.names("best/*")) != is_out


@shows("keep")
def test_the_best_step_is_the_result_where_asked(world: World) -> None:
    for keep in ("best", "last"):
        flags: Flags = MEASURED | {"eval_steps": 1, "max_train_steps": 3, "output_dir": f"@{keep}"}
        run = world.run_by(lambda run: train_scripted(run, *RISING), flags | {"keep": keep})
        best = Outcome(run.folder / "best", "")
        assert (run.trained == best.trained) == (keep == "best")


@shows("stop_when_good", "eval_patience")
def test_a_run_ends_once_it_is_good(world: World) -> None:
    def last(name: str, **ends: Json) -> int:
        flags: Flags = MEASURED | {"eval_steps": 1, "max_train_steps": 8, "output_dir": f"@{name}"} | ends
        return len(world.run_by(lambda run: train_scripted(run, *RISING), flags).evaluations) - 1

    assert last("to the end", eval_patience=1) == 8
    assert last("patient", stop_when_good=True) == 5
    assert last("less patient", stop_when_good=True, eval_patience=1) == 3


@shows("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint")
def test_checkpoints_are_kept_where_and_as_often_as_asked(world: World) -> None:
    assert world.run().names("checkpoint-*") == ["checkpoint-3"]
    flags: Flags = {"output_dir": "@here", "checkpointing_steps": 1}
    assert world.run_anew(**flags).folder == world.folder / "here"
    assert world.run_anew(**flags).names("checkpoint-*") == ["checkpoint-2", "checkpoint-3"]
    again = world.run_anew(**flags, resume_from_checkpoint="checkpoint-2", checkpoints_total_limit=1)
    assert f"going on from step 2 of {world.folder / 'here' / 'checkpoint-2'}" in again.said
    assert again.names("checkpoint-*") == ["checkpoint-3"]


@shows("export_lora")
def test_a_lora_file_is_written_where_asked(world: World) -> None:
    assert world.run().names("*lora*") == []
    assert world.run(export_lora=True).names("*lora*") == ["pytorch_lora_weights.safetensors"]


def test_an_old_flag_trains_what_its_option_does(world: World) -> None:
    of_class = {name: value for name, value in CLASS_IMAGES.items() if name != "prior_preservation"}
    rows: Flags = {"instance_data_dir": None, "instance_prompt": "x", "caption_template": "a cat"}
    old: dict[str, tuple[Json, Flags]] = {
        "with_prior_preservation": (True, of_class),
        "offset_noise": (True, {}),
        "lora_dropout": (0.5, {}),
        "proportion_empty_prompts": (1.0, {}),
        "lora_layers": ("to_q, to_k", {}),
        "train_data_dir": ("@other photos", rows),
    }
    assert {*old, "use_8bit_adam"} == {name for name, each in OLD_NAMES.items() if each.sets}
    for name, (value, beside) in old.items():
        assert world.run(**translate_old_names(beside | {name: value})[0]).trained != world.run().trained


def test_every_option_has_a_test_here() -> None:
    assert DreamBoothConfig.options().keys() == SHOWN
