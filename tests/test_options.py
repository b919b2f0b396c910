"""The options of a run: every bad value has its sentence, and no wish is dropped in silence."""

import argparse
import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ether_diffusion.flags import add_flags
from ether_diffusion.options import Options, Texts, option
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import (
    AdapterConfig,
    ControlConfig,
    ControlRunConfig,
    DataConfig,
    DreamBoothConfig,
    OptionsError,
    OutputConfig,
)
from ether_diffusion.training.config.presets import PRESET_VALUES, stack

Values = dict[str, Json]

OPTIONS = DreamBoothConfig.options()
NUMBERS = [name for name, each in OPTIONS.items() if each.kind.base in (int, float)]
CLASS_IMAGES: Values = {
    "prior_preservation": "class_images",
    "class_data_dir": "class",
    "class_prompt": "a photo of a dog",
}


def config(**values: Json) -> DreamBoothConfig:
    return DreamBoothConfig.from_flat({"instance_data_dir": "photos"} | values)


def control(**values: Json) -> ControlRunConfig:
    return ControlRunConfig.from_flat({"dataset_name": "pairs", **values})


def problems(**values: Json) -> tuple[str, ...]:
    with pytest.raises(OptionsError) as error:
        config(**values)
    return error.value.problems


def problems_of_control(**values: Json) -> tuple[str, ...]:
    with pytest.raises(OptionsError) as error:
        ControlRunConfig.from_flat({"instance_data_dir": "photos"} | values)
    return error.value.problems


def test_each_option_has_a_name_of_its_own_and_a_help_line() -> None:
    sections = ControlRunConfig.sections().values()
    assert len(ControlRunConfig.options()) == sum(len(section.model_fields) for section in sections)
    for name, each in ControlRunConfig.options().items():
        assert each.help.endswith("."), name
        first = each.help.split()[0].rstrip(":")
        assert first[0].isupper() or first in (*each.kind.choices, "'latest',"), name
        needs = [need.removeprefix("no ").split("=")[0] for need in each.needs.split(", ") if need]
        for other in (*needs, each.instead_of, *each.implies):
            assert {*(other or name).split(" or ")} <= ControlRunConfig.options().keys(), name


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().data.token = "x"


def test_a_flat_configuration_makes_the_same_one_again() -> None:
    made = config(validation_prompt=["a", "b"], learning_rate=1, output_dir="out", **CLASS_IMAGES)
    assert DreamBoothConfig.from_flat(made.flat()) == made
    assert made.validation.validation_prompt == ("a", "b")
    assert made.output.output_dir == Path("out")
    assert isinstance(made.optimization.learning_rate, float)
    assert made.flat().keys() == OPTIONS.keys()
    of_control = control(detector="canny", validation_prompt=["a", "b"], validation_image=["x.png"])
    assert ControlRunConfig.from_flat(of_control.flat()) == of_control


MAY_BE_ZERO = {
    *("dataloader_num_workers", "seed", "lr_warmup_steps", "caption_dropout", "unmasked_weight", "dropout"),
    *("prior_loss_weight", "adam_beta1", "adam_beta2", "adam_weight_decay", "noise_offset", "ema_decay"),
    *("eval_steps", "validation_guidance_scale"),
}


def test_numbers_are_finite_not_negative_and_zero_only_where_that_means_something() -> None:
    for name in NUMBERS:
        assert problems(**{name: -1})[0].startswith(f"{name}=-1 is out of range; use a")
        for value in (math.nan, math.inf, -math.inf) if OPTIONS[name].kind.base is float else ():
            assert problems(**{name: value}) == (
                problems(**{name: -1})[0].replace("-1 is out of range", f"{value} is not finite"),
            )
        if name in MAY_BE_ZERO:
            config(**{name: 0})
        else:
            assert "is out of range" in problems(**{name: 0})[0]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("caption_dropout", 1.01, "caption_dropout=1.01 is out of range; use a number from 0 to 1"),
        ("dropout", 1, "dropout=1 is out of range; use a number from 0 to below 1"),
        ("learning_rate", "6e-3", "learning_rate='6e-3' does not fit; use a number above 0"),
        ("learning_rate", 10**400, "… does not fit; use a number above 0"),
        ("resolution", 65, "resolution=65 is out of range; use a whole number from 8 to 8192 divisible by 8"),
        ("rank", 2.5, "rank=2.5 does not fit; use a whole number from 1"),
        ("rank", True, "rank=True does not fit"),
        ("center_crop", 1, "center_crop=1 does not fit; use true or false"),
        ("adapter", "lokr", "adapter='lokr' is not known; use one of ether, ether_plus, lora, oft, hra"),
        ("adapter", None, "adapter=None does not fit; use one of ether"),
        ("mixed_precision", False, "mixed_precision=False does not fit; use one of no, fp16, bf16"),
        ("instance_prompt", " ", "instance_prompt=' ' is empty; use text"),
        ("class_prompt", "a" * 2_000_000, "… is longer than 10000 characters; use text"),
        ("instance_prompt", "a\0b", r"instance_prompt='a\x00b' holds bytes that are not text"),
        ("output_dir", "", "output_dir='' is empty; use a path"),
        ("output_dir", "\udcff", r"output_dir='\udcff' holds bytes that are not text"),
        ("validation_prompt", ["a", 1], "validation_prompt=1 does not fit; use a list of texts"),
        ("hub_model_id", "a b", "hub_model_id='a b' is not a repository of the hub; use owner/name"),
        ("seed", 2**63, f"is out of range; use a whole number from 0 to {2**63 - 1}"),
        ("target_modules", "a,,b", "target_modules='a,,b' has an empty name"),
        ("target_modules", "to_(q", "is no regex"),
        ("instance_data_dir", None, "there is nothing to train on; give instance_data_dir"),
        ("dataset_name", "x", "instance_data_dir and dataset_name are two sources of photos"),
        ("caption_template", "{token} {x}", "has {x}; use {token} and {caption}"),
        ("instance_prompt", "a {token}", "asks for {token}; give the trigger word as token"),
        ("aspect_ratio_buckets", "64", "is not a list of sizes; write 'height,width;…'"),
        ("aspect_ratio_buckets", "64,65", "has sides not divisible by 8 px"),
        ("aspect_ratio_buckets", "8,80000", "has sides over 8192 px"),
        ("prior_preservation", "frozen", "prior_preservation=frozen needs class_prompt"),
        ("class_data_dir", "photos", "instance_data_dir and class_data_dir are the same folder, 'photos'"),
        ("stop_when_good", True, "give eval_steps"),
        ("eval_steps", 2, "eval_steps needs prompts with the subject; give eval_prompt"),
        ("adapter", "none", "nothing is trained; choose a method"),
        ("conditioning_data_dir", "maps", "'conditioning_data_dir' is not an option"),
        ("learning_rat", 1, "'learning_rat' is not an option; did you mean learning_rate?"),
        ("zzz", 1, "'zzz' is not an option; see train-dreambooth --help for the names"),
        ("cache_dir", "x", "'cache_dir' is not an option; set the environment variable HF_HUB_CACHE"),
    ],
)
def test_a_bad_value_has_its_sentence(name: str, value: Json, sentence: str) -> None:
    assert any(sentence in problem for problem in problems(**{name: value}))


EXCLUDING: list[tuple[Values, str]] = [
    ({"mask_from_alpha": True, "mask_data_dir": "m"}, "mask_data_dir are two sources"),
    ({"prior_preservation": "class_images", "class_prompt": "x"}, "needs class_data_dir"),
    ({"prior_preservation": "class_images", "class_data_dir": "x"}, "needs class_prompt"),
    ({"train_text_encoder": True, "pre_compute_text_embeddings": True}, "switch one of them off"),
    ({"aspect_ratio_buckets": "64,64", "use_aspect_ratio_buckets": False}, "switch it on"),
    ({"attention": "sdpa", "enable_xformers_memory_efficient_attention": True}, "two kinds of kernels"),
]


def test_options_that_exclude_each_other_are_refused() -> None:
    for values, sentence in EXCLUDING:
        assert any(sentence in problem for problem in problems(**values))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "there is nothing to follow; give conditioning_data_dir"),
        ({"detector": "palette"}, "there is nothing to follow"),
        ({"detector": "cany"}, "there is no detector 'cany'; did you mean canny?"),
        ({"conditioning_data_dir": "y", "detector": "canny"}, "detector=canny both give control images"),
        ({"detector": "canny", "control_type": "palette"}, "control_type=palette contradict each other"),
        ({"detector": "palette", "control_type": "edges"}, "control_type=edges contradict each other"),
        ({"detector": "canny", "canny_low_threshold": 300.0}, "is above canny_high_threshold=200; exchange"),
        ({"detector": "depth_midas", "cache_latents": False}, "leave cache_latents on"),
        ({"detector": "canny", "eval_steps": 5}, "control images teach no subject"),
        ({"adapter": "none", "train_text_encoder": True}, "adapter=none trains the encoder"),
        ({"control_learning_rate": 2e-4}, "control_learning_rate=0.0002 is out of range"),
        ({"control_dropout": 1.5}, "control_dropout=1.5 is out of range"),
        ({"control_type": "a b"}, "control_type='a b' is no name"),
        (
            {"detector": "canny", "validation_prompt": ["a"]},
            "found 0 of validation_image and 1 of",
        ),
        ({"conditioning_data": "x"}, "did you mean conditioning_data_dir"),
    ],
)
def test_what_control_cannot_mean_is_refused(values: Values, sentence: str) -> None:
    assert sentence in "\n".join(problems_of_control(**values))


def test_problems_of_all_sections_are_said_at_once() -> None:
    assert len(problems(rank=0, learning_rate=-1, resolution=3, nonsense=1, seed=-5)) == 5


def test_python_callers_are_checked_too() -> None:
    with pytest.raises(ValueError, match="output_dir=1 does not fit; use a path"):
        OutputConfig(output_dir=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank=0 is out of range"):
        AdapterConfig().replace(rank=0)
    made = DreamBoothConfig(data=DataConfig(dataset_name="x"), adapter=AdapterConfig(adapter="lora"))
    assert made.learning_rate == 6e-4


def test_an_option_switches_what_it_implies() -> None:
    assert config(train_text_encoder=True).data.pre_compute_text_embeddings is False
    assert config().data.pre_compute_text_embeddings is True
    data = config(aspect_ratio_buckets="64,96; 96,64;").data
    assert data.use_aspect_ratio_buckets
    assert data.bucket_sizes == ((64, 96), (96, 64))


RATES = {"ether": 6e-3, "ether_plus": 6e-3, "lora": 6e-4, "oft": 6e-5, "hra": 1e-4, "boft": 1e-4, "ia3": 3e-3}


def test_each_method_has_its_learning_rate() -> None:
    for adapter, rate in (RATES | {"delora": 1e-3, "full": 5e-6}).items():
        assert config(adapter=adapter).learning_rate == rate
        assert config(adapter=adapter, learning_rate=0.5).learning_rate == 0.5
        assert config(adapter=adapter, optimizer="prodigy").learning_rate == 1.0
        both = config(adapter=adapter, train_text_encoder=True)
        assert both.text_encoder_learning_rate == rate
        assert config(adapter=adapter, text_encoder_lr=0.25).text_encoder_learning_rate == 0.25
    for adapter, rate in {
        "ether": 1e-3,
        "ether_plus": 1e-3,
        "oft": 1e-5,
    }.items():
        made = control(adapter=adapter).resolved()
        assert made.optimization.learning_rate == rate
        assert made.adapter.target_modules == "attention_and_feedforward"
        assert made.control.control_learning_rate == 1e-4


CLASS_PROMPTS = [
    ("a photo of sks dog", "sks", "a photo of dog"),
    ("a photo of {token} dog", "sks", "a photo of dog"),
    ("a photo of sksy dog", "sks", None),
    ("sks", "sks", None),
    ("a photo of sks dog", None, None),
    (None, "sks", None),
]


def test_the_class_prompt_is_the_instance_prompt_without_its_token() -> None:
    for prompt, token, expected in CLASS_PROMPTS:
        assert config(instance_prompt=prompt, token=token).class_prompt == expected
        assert config(instance_prompt=prompt, token=token, class_prompt="a dog").class_prompt == "a dog"


def test_what_control_leaves_out_follows_from_the_rest() -> None:
    assert control().data.caption_column == "text"
    assert control(caption_column="words").data.caption_column == "words"
    assert control(instance_prompt="a dog").data.caption_column is None
    folder = ControlRunConfig.from_flat({"instance_data_dir": "photos", "conditioning_data_dir": "maps"})
    assert folder.data.caption_column is None
    assert control(detector="depth_leres++").control.control_type == "depth_leres_boost"
    assert control(detector="canny", control_type="edges").control.control_type == "edges"
    assert control(palette="tiny_world").control.control_type == "palette"
    assert control().control.control_type is None


def test_one_validation_image_serves_all_prompts_and_one_prompt_all_images() -> None:
    one = control(validation_prompt=["a", "b"], validation_image=["x.png"])
    assert one.control == ControlConfig(validation_image=("x.png", "x.png"))
    one = control(validation_prompt=["a"], validation_image=["x.png", "y.png", "z.png"])
    assert one.validation.validation_prompt == ("a", "a", "a")
    several: Values = {"validation_prompt": ["a", "b"], "validation_image": ["1", "2", "3"]}
    found = problems_of_control(detector="canny", **several)
    assert "found 3 of validation_image and 2 of validation_prompt" in found[0]


IDLE = """
    revision=main variant=fp16 dataset_config_name=x image_column=x caption_column=x unmasked_weight=0.5
    revision=main,pretrained_model_name_or_path=/ crops_per_photo=2,cache_latents=false
    crops_per_photo=2,center_crop=true class_data_dir=x class_prompt=x prior_loss_weight=0.5
    num_class_images=5 num_class_images=5,prior_preservation=frozen,class_prompt=x rank=8 lora_alpha=8
    lora_alpha=8,adapter=hra
    num_blocks=2,adapter=lora sides=input,adapter=oft dropout=0.1,adapter=hra text_encoder_lr=0.1
    num_train_epochs=2,max_train_steps=3 lr_warmup_steps=500 lr_num_cycles=2,lr_scheduler=cosine
    lr_power=2.0,lr_scheduler=linear ema_decay=0.9 target_modules=to_q,adapter=full validation_steps=5
    validation_steps=5,validation_epochs=5,validation_prompt=x validation_negative_prompt=x eval_patience=5
    eval_patience=5,eval_steps=5,eval_prompt=x logging_dir=x tracker_project_name=x hub_model_id=a/b
    hub_private_repo=true"""
"""The first option of each word has no effect, with the others beside it."""
IDLE_IN_CONTROL = """
    canny_low_threshold=50.0 canny_high_threshold=250.0 palette=x,control_type=edges
    conditioning_image_column=c,detector=canny conditioning_image_column=c,conditioning_data_dir=maps"""


def test_an_option_without_effect_is_named_once() -> None:
    for make, cases in ((config, IDLE), (control, IDLE_IN_CONTROL)):
        for word in cases.split():
            pairs = dict(each.split("=") for each in word.split(","))
            values = {n: yaml.safe_load(v) for n, v in pairs.items()}
            name = next(iter(values))
            said = [sentence for sentence in make(**values).ignored() if sentence.startswith(f"{name} ")]
            assert len(said) == 1, word
            assert said[0].startswith(f"{name} has no effect: ")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"ema_decay": 0.9}, "it needs use_ema"),
        ({"rank": 8}, "it is for adapter=lora or hra or delora, and ether_plus is used"),
        ({"unmasked_weight": 0.5}, "it needs mask_from_alpha or mask_data_dir"),
        ({"crops_per_photo": 2, "center_crop": True}, "center_crop is given, which outranks it"),
        ({"revision": "x", "pretrained_model_name_or_path": "/"}, "/ is a folder, not a repository"),
    ],
)
def test_the_reason_is_what_the_option_lacks(values: Values, sentence: str) -> None:
    assert sentence in config(**values).ignored()[0]


def test_defaults_are_no_wishes_unless_they_were_given() -> None:
    assert config().ignored() == ()
    (sentence,) = config(rank=4).ignored({"rank"})
    assert sentence.startswith("rank has no effect: ")


def test_options_with_an_effect_are_not_doubted() -> None:
    wide: Values = {"num_class_images": 5, "prior_loss_weight": 0.5, **CLASS_IMAGES}
    assert config(adapter="lora", rank=8, lora_alpha=4, dropout=0.1).ignored() == ()
    assert config(adapter="boft", num_blocks=2).ignored() == ()
    assert config(lr_warmup_steps=5, lr_scheduler="constant_with_warmup").ignored() == ()
    assert (
        config(use_ema=True, ema_decay=0.9, report_to="tensorboard", logging_dir="x", **wide).ignored() == ()
    )
    assert control(conditioning_image_column="c", control_dropout=0.5).ignored() == ()
    assert control(detector="canny", canny_low_threshold=50.0, canny_high_threshold=250.0).ignored() == ()
    assert control(palette="tiny_world").ignored() == ()


@pytest.mark.parametrize("preset", PRESET_VALUES)
def test_a_preset_is_a_configuration_whose_options_all_have_an_effect(preset: str) -> None:
    values = PRESET_VALUES[preset]  # type: ignore[index]  # the keys are what the preset can be
    needed = CLASS_IMAGES if preset == "faithful" else {}
    assert config(validation_prompt="a dog", **(values | needed)).ignored() == ()


def test_what_only_a_preset_sets_is_no_wish() -> None:
    values = PRESET_VALUES["fast"]
    assert len(config(**values).ignored()) == 2
    assert config(**values).ignored(preset=values.keys()) == ()


def test_presets_are_what_they_are_called() -> None:
    defaults = config().flat() | {"max_train_steps": 800}
    assert {name: defaults[name] for name in PRESET_VALUES["balanced"]} == PRESET_VALUES["balanced"]
    paper = config(class_data_dir="class", class_prompt="a dog", **PRESET_VALUES["faithful"])
    assert (paper.optimization.max_train_steps, paper.optimization.train_batch_size) == (1400, 1)
    assert (paper.learning_rate, paper.prior.num_class_images, paper.prior.prior_loss_weight) == (
        6e-3,
        200,
        1,
    )


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ({"rank": 1, "seed": 2}, {"rank": 3}, {"rank": 3, "seed": 2}),
        ({"max_train_steps": 8}, {"num_train_epochs": 3}, {"num_train_epochs": 3}),
        (
            {"max_train_steps": 8},
            {"num_train_epochs": None},
            {"max_train_steps": 8, "num_train_epochs": None},
        ),
        ({"instance_data_dir": "x"}, {"dataset_name": "y"}, {"dataset_name": "y"}),
        ({"pre_compute_text_embeddings": True}, {"train_text_encoder": True}, {"train_text_encoder": True}),
        ({"use_aspect_ratio_buckets": False}, {"train_text_encoder": False}, None),
    ],
)
def test_a_higher_layer_outranks_what_stands_in_its_way(
    below: Values, above: Values, expected: Values | None
) -> None:
    assert stack(below, above) == (below | above if expected is None else expected)


def test_every_default_that_differs_from_diffusers_is_told() -> None:
    line = config().changed_defaults()
    theirs = {name for name, each in OPTIONS.items() if each.theirs is not None}
    assert len(theirs) == 12
    assert all(f"{name} " in line for name in theirs)
    assert "learning_rate 0.006 (0.0005)" in line
    assert "learning_rate" not in config(learning_rate=1).changed_defaults({"learning_rate"})
    assert config().changed_defaults(theirs) == ""
    line = control().changed_defaults()
    for words in ("learning_rate 0.001 (5e-06)", "center_crop off (on)", "train_batch_size 1 (4)"):
        assert words in line
    assert "validation_steps" not in line  # 100 in both


def test_a_resolved_run_is_the_same_run_and_says_what_follows() -> None:
    made = config(
        adapter="lora",
        train_text_encoder=True,
        prior_preservation="frozen",
        token="sks",
        instance_prompt="a sks dog",
    )
    plain = made.resolved()
    assert (plain.optimization.learning_rate, plain.optimization.text_encoder_lr) == (6e-4, 6e-4)
    assert (plain.optimization.max_train_steps, plain.prior.class_prompt) == (800, "a dog")
    assert plain.resolved() == plain
    assert plain.ignored() == config().resolved().ignored() == ()
    assert config(num_train_epochs=3).resolved().optimization.max_train_steps is None


class Stages(Options):
    stages: Texts = option(("all",), "Which stages.")


@pytest.mark.parametrize("only_given", [False, True])
def test_a_flag_of_several_values_may_be_given_again_and_replaces_its_default(only_given: bool) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Stages, only_given=only_given)
    parsed = parser.parse_args(["--stages", "a", "b", "--stages", "c"])
    assert Stages(**vars(parsed)).stages == ("a", "b", "c")
    assert Stages(**vars(parser.parse_args([]))).stages == ("all",)
