"""The command line of train-control: every flag of diffusers' train_controlnet.py, taken or explained."""

from pathlib import Path

import pytest

from ether_diffusion.options import OptionsError
from ether_diffusion.scripts.train_control import CONTROL
from ether_diffusion.scripts.train_dreambooth import Call, parse_flags, read_call
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import ControlConfig, ControlRunConfig

TAKEN: dict[str, tuple[list[str], Json]] = {
    "pretrained_model_name_or_path": (["x"], "x"),
    "revision": (["x"], "x"),
    "variant": (["fp16"], "fp16"),
    "tokenizer_name": (["x"], "x"),
    "output_dir": (["x"], "x"),
    "seed": (["1"], 1),
    "resolution": (["256"], 256),
    "train_batch_size": (["2"], 2),
    "num_train_epochs": (["3"], 3),
    "max_train_steps": (["5"], 5),
    "checkpointing_steps": (["7"], 7),
    "checkpoints_total_limit": (["3"], 3),
    "resume_from_checkpoint": (["latest"], "latest"),
    "gradient_accumulation_steps": (["2"], 2),
    "gradient_checkpointing": ([], True),
    "learning_rate": (["0.5"], 0.5),
    "scale_lr": ([], True),
    "lr_scheduler": (["polynomial"], "polynomial"),
    "lr_warmup_steps": (["5"], 5),
    "lr_num_cycles": (["2"], 2),
    "lr_power": (["2"], 2.0),
    "dataloader_num_workers": (["2"], 2),
    "adam_beta1": (["0.5"], 0.5),
    "adam_beta2": (["0.5"], 0.5),
    "adam_weight_decay": (["0.5"], 0.5),
    "adam_epsilon": (["0.5"], 0.5),
    "max_grad_norm": (["0.5"], 0.5),
    "push_to_hub": ([], True),
    "hub_model_id": (["me/x"], "me/x"),
    "logging_dir": (["x"], "x"),
    "allow_tf32": ([], True),
    "report_to": (["tensorboard"], "tensorboard"),
    "mixed_precision": (["bf16"], "bf16"),
    "enable_xformers_memory_efficient_attention": ([], True),
    "dataset_name": (["x"], "x"),
    "dataset_config_name": (["x"], "x"),
    "image_column": (["x"], "x"),
    "conditioning_image_column": (["x"], "x"),
    "caption_column": (["x"], "x"),
    "max_train_samples": (["9"], 9),
    "validation_prompt": (["a b", "c"], ["a b", "c"]),
    "validation_image": (["a.png", "b.png"], ["a.png", "b.png"]),
    "num_validation_images": (["2"], 2),
    "validation_steps": (["9"], 9),
    "tracker_project_name": (["x"], "x"),
}
"""Options here, with the same meaning: the words behind the flag, and the option's value."""

TRANSLATED: dict[str, tuple[list[str], str, Json]] = {
    "train_data_dir": (["pairs"], "dataset_name", "pairs"),
    "proportion_empty_prompts": (["0.25"], "caption_dropout", 0.25),
    "use_8bit_adam": ([], "optimizer", "adamw8bit"),
}
NEEDLESS = {"set_grads_to_none": "gradients are always set to none"}
REFUSED = {
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "controlnet_model_name_or_path": "no ControlNet is trained or gone on from",
}
OF_THE_CALL = {"hub_token"}
REFUSED_OF_SDXL = {
    "crops_coords_top_left_h": "SDXL is told how each photo was cropped",
    "crops_coords_top_left_w": "SDXL is told how each photo was cropped",
}
"""What train_controlnet_sdxl.py has besides; its pretrained_vae_model_name_or_path is taken."""
NEEDED = ["--dataset_name", "pairs"]


def call(*words: str) -> Call:
    return read_call(parse_flags(words, CONTROL), CONTROL)


def config(**values: Json) -> ControlRunConfig:
    return ControlRunConfig.from_flat({"dataset_name": "pairs", **values})


def problems(**values: Json) -> str:
    with pytest.raises(OptionsError) as caught:
        ControlRunConfig.from_flat(values)
    return "\n".join(caught.value.problems)


def test_every_flag_of_train_controlnet_is_taken_translated_or_explained() -> None:
    # counted in examples/controlnet/train_controlnet.py of diffusers
    assert len({*TAKEN, *TRANSLATED, *NEEDLESS, *REFUSED, *OF_THE_CALL}) == 52


@pytest.mark.parametrize("name", TAKEN)
def test_a_flag_has_the_meaning_that_it_has_there(name: str) -> None:
    words, value = TAKEN[name]
    beside: dict[str, list[str]] = {
        "dataset_name": [],
        "validation_prompt": [*NEEDED, "--validation_image", "a.png", "b.png"],
        "validation_image": [*NEEDED, "--validation_prompt", "a", "b"],
    }
    made = call(*beside.get(name, NEEDED), f"--{name}", *words)
    assert made.config.flat()[name] == value
    assert made.warnings == ()


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_flag_of_another_name_here_is_said_to_be(name: str) -> None:
    words, option, value = TRANSLATED[name]
    made = call(*([] if option == "dataset_name" else NEEDED), f"--{name}", *words)
    assert made.config.flat()[option] == value
    (line,) = made.warnings
    assert line.startswith(f"{name} is deprecated; use {option}")


@pytest.mark.parametrize("name", NEEDLESS)
def test_a_flag_that_is_not_needed_says_why(name: str) -> None:
    (line,) = call(*NEEDED, f"--{name}").warnings
    assert NEEDLESS[name] in line


@pytest.mark.parametrize("name", REFUSED | REFUSED_OF_SDXL)
def test_a_flag_that_is_refused_says_what_to_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call(*NEEDED, f"--{name}", "x")
    assert stop.value.code == 2
    assert (REFUSED | REFUSED_OF_SDXL)[name] in capsys.readouterr().err


def test_captions_come_from_the_column_text_unless_something_else_is_named() -> None:
    assert config().data.caption_column == "text"
    assert config(caption_column="words").data.caption_column == "words"
    assert config(instance_prompt="a dog").data.caption_column is None
    folder = ControlRunConfig.from_flat({"instance_data_dir": "photos", "conditioning_data_dir": "maps"})
    assert folder.data.caption_column is None


def test_one_validation_image_serves_all_prompts_and_one_prompt_all_images() -> None:
    one = config(validation_prompt=["a", "b"], validation_image=["x.png"])
    assert one.control.validation_image == ("x.png", "x.png")
    one = config(validation_prompt=["a"], validation_image=["x.png", "y.png", "z.png"])
    assert one.validation.validation_prompt == ("a", "a", "a")
    assert "found 3 of validation_image and 2 of validation_prompt" in problems(
        dataset_name="x", validation_prompt=["a", "b"], validation_image=["1", "2", "3"]
    )


def test_validation_flags_may_be_given_once_with_several_words_or_several_times() -> None:
    one = call(*NEEDED, "--validation_prompt", "a", "b", "--validation_image", "x.png", "y.png")
    other = call(
        *(*NEEDED, "--validation_prompt", "a", "--validation_prompt", "b"),
        *("--validation_image", "x.png", "--validation_image", "y.png"),
    )
    assert one.config == other.config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"detector": "canny"}, "canny"),
        ({"detector": "depth_leres++"}, "depth_leres_boost"),
        ({"detector": "canny", "control_type": "edges"}, "edges"),
        ({"detector": "palette"}, "palette"),
        ({"palette": "tiny_world"}, "palette"),
        ({}, None),
    ],
)
def test_the_control_type_follows_from_the_detector_or_the_palette(
    values: dict[str, Json], expected: str | None
) -> None:
    assert config(**values).control.control_type == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"instance_data_dir": "x"}, "there is nothing to follow; give conditioning_data_dir"),
        ({"instance_data_dir": "x", "detector": "palette"}, "there is nothing to follow"),
        ({"dataset_name": "x", "detector": "cany"}, "there is no detector 'cany'; did you mean canny?"),
        (
            {"instance_data_dir": "x", "conditioning_data_dir": "y", "detector": "canny"},
            "conditioning_data_dir and detector=canny both give control images",
        ),
        (
            {"dataset_name": "x", "detector": "canny", "control_type": "palette"},
            "detector=canny and control_type=palette contradict each other",
        ),
        (
            {"dataset_name": "x", "detector": "palette", "control_type": "edges"},
            "detector=palette and control_type=edges contradict each other",
        ),
        (
            {"dataset_name": "x", "detector": "canny", "canny_low_threshold": 300.0},
            "canny_low_threshold=300 is above canny_high_threshold=200; exchange them",
        ),
        (
            {"dataset_name": "x", "detector": "depth_midas", "cache_latents": False},
            "detector=depth_midas is a model, which would look at every photo again each time",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Json], words: str) -> None:
    assert words in problems(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"canny_low_threshold": 50.0}, "canny_low_threshold has no effect: it is for detector=canny"),
        ({"canny_high_threshold": 250.0}, "canny_high_threshold has no effect: it is for detector=canny"),
        (
            {"palette": "x", "control_type": "edges"},
            "palette has no effect: it is for control_type=palette",
        ),
        (
            {"conditioning_image_column": "c", "detector": "canny"},
            "conditioning_image_column has no effect: detector=canny is given, which outranks it",
        ),
        (
            {"conditioning_image_column": "c", "conditioning_data_dir": "maps"},
            "conditioning_image_column has no effect: conditioning_data_dir is given, which outranks it",
        ),
    ],
)
def test_an_option_without_effect_is_said_by_name(values: dict[str, Json], words: str) -> None:
    assert any(sentence.startswith(words) for sentence in config(**values).ignored())


@pytest.mark.parametrize(
    "values",
    [
        {"conditioning_image_column": "c"},
        {"detector": "canny", "canny_low_threshold": 50.0, "canny_high_threshold": 250.0},
        {"palette": "tiny_world"},
        {"control_dropout": 0.5, "control_learning_rate": 1e-5},
    ],
)
def test_an_option_with_effect_is_not(values: dict[str, Json]) -> None:
    assert config(**values).ignored() == ()


def test_defaults_that_differ_from_train_controlnets_are_said() -> None:
    line = config().changed_defaults()
    for words in ("learning_rate 0.001 (5e-06)", "center_crop off (on)", "train_batch_size 1 (4)"):
        assert words in line
    assert "validation_steps" not in line  # 100 in both


def test_the_same_configuration_comes_back_from_its_flat_form(tmp_path: Path) -> None:
    made = config(detector="canny", validation_prompt=["a", "b"], validation_image=["x.png"])
    assert ControlRunConfig.from_flat(made.flat()) == made
    assert made.control == ControlConfig(
        detector="canny", control_type="canny", validation_image=("x.png", "x.png")
    )
