"""The configuration of a run: every bad value has its sentence, and no wish is dropped in silence."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import (
    AdapterConfig,
    ControlRunConfig,
    DataConfig,
    DreamBoothConfig,
    OptionsError,
    OutputConfig,
    ValidationConfig,
)
from ether_diffusion.training.config.presets import PRESET_VALUES, stack

OPTIONS = DreamBoothConfig.options()
KINDS = {name: each.kind for name, each in OPTIONS.items()}
THEIR_DEFAULTS = {name for name, each in OPTIONS.items() if each.theirs is not None}
CLASS_IMAGES: dict[str, Json] = {
    "prior_preservation": "class_images",
    "class_data_dir": "class",
    "class_prompt": "a photo of a dog",
}


def config(**values: Json) -> DreamBoothConfig:
    return DreamBoothConfig.from_flat({"instance_data_dir": "photos"} | values)


def problems(**values: Json) -> tuple[str, ...]:
    with pytest.raises(OptionsError) as error:
        config(**values)
    return error.value.problems


def test_no_two_options_have_one_name() -> None:
    sections = ControlRunConfig.sections().values()
    assert len(ControlRunConfig.options()) == sum(len(section.model_fields) for section in sections)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_help_line(name: str) -> None:
    line = OPTIONS[name].help
    assert line.endswith(".")
    assert line[0].isupper() or line.split()[0].rstrip(":") in (*KINDS[name].choices, "'latest',")


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().data.token = "x"


def test_a_flat_configuration_makes_the_same_one_again() -> None:
    made = config(validation_prompt=["a", "b"], learning_rate=1, output_dir="out", **CLASS_IMAGES)
    assert DreamBoothConfig.from_flat(made.flat()) == made
    assert made.validation.validation_prompt == ("a", "b")
    assert made.output.output_dir == Path("out")
    assert made.optimization.learning_rate == 1.0
    assert set(made.flat()) == set(OPTIONS)


NUMBERS = [name for name, kind in KINDS.items() if kind.base in (int, float)]
REALS = [name for name, kind in KINDS.items() if kind.base is float]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_below_zero_is_refused(name: str) -> None:
    assert problems(**{name: -1})[0].startswith(f"{name}=-1")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", REALS)
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    (sentence,) = problems(**{name: value})
    assert sentence.startswith(f"{name}={value!r} is not finite; use a number")


METHODS = "ether, ether_plus, lora, oft, hra, delora, boft, full, none"
MAY_BE_ZERO = {
    "dataloader_num_workers",
    "seed",
    "lr_warmup_steps",
    "caption_dropout",
    "unmasked_weight",
    "dropout",
    "prior_loss_weight",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "noise_offset",
    "ema_decay",
    "eval_steps",
    "validation_guidance_scale",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_is_refused_where_it_means_nothing(name: str) -> None:
    if name in MAY_BE_ZERO:
        config(**{name: 0})
    else:
        assert "is out of range" in problems(**{name: 0})[0]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("caption_dropout", 1.01, "caption_dropout=1.01 is out of range; use a number from 0 to 1"),
        ("dropout", 1, "dropout=1 is out of range; use a number from 0 to below 1"),
        ("learning_rate", 0, "learning_rate=0 is out of range; use a number above 0"),
        ("learning_rate", "6e-3", "learning_rate='6e-3' does not fit; use a number above 0"),
        ("resolution", 65, "resolution=65 is out of range; use a whole number from 8 to 8192 divisible by 8"),
        ("rank", 2.5, "rank=2.5 does not fit; use a whole number from 1"),
        ("rank", True, "rank=True does not fit; use a whole number from 1"),
        ("center_crop", 1, "center_crop=1 does not fit; use true or false"),
        (
            "adapter",
            "lokr",
            f"adapter='lokr' is not known; use one of {METHODS}",
        ),
        (
            "adapter",
            None,
            f"adapter=None does not fit; use one of {METHODS}",
        ),
        ("mixed_precision", False, "mixed_precision=False does not fit; use one of no, fp16, bf16"),
        ("instance_prompt", " ", "instance_prompt=' ' is empty; use text"),
        ("instance_prompt", "a\0b", r"instance_prompt='a\x00b' holds bytes that are not text; use text"),
        ("output_dir", "", "output_dir='' is empty; use a path"),
        ("output_dir", "\udcff", r"output_dir='\udcff' holds bytes that are not text; use a path"),
        ("validation_prompt", ["a", 1], "validation_prompt=1 does not fit; use a list of texts"),
        ("hub_model_id", "a b", "hub_model_id='a b' is not a repository of the hub; use owner/name"),
        ("seed", 2**63, f"seed={2**63} is out of range; use a whole number from 0 to {2**63 - 1}"),
        ("target_modules", "a,,b", "target_modules='a,,b' has an empty name; delete a comma"),
        (
            "instance_data_dir",
            None,
            "there is nothing to train on; give instance_data_dir, a folder of photos, or dataset_name",
        ),
        ("dataset_name", "x", "instance_data_dir and dataset_name are two sources of photos; give one"),
        (
            "caption_template",
            "{token} {x}",
            "caption_template='{token} {x}' has {x}; use {token} and {caption}",
        ),
        (
            "instance_prompt",
            "a {token}",
            "instance_prompt='a {token}' asks for {token}; give the trigger word as token",
        ),
        (
            "aspect_ratio_buckets",
            "64",
            "aspect_ratio_buckets='64' is not a list of sizes; write 'height,width;…'",
        ),
        (
            "aspect_ratio_buckets",
            "64,65",
            "aspect_ratio_buckets='64,65' has sides not divisible by 8 px; round them",
        ),
        (
            "prior_preservation",
            "frozen",
            "prior_preservation=frozen needs class_prompt, as 'a photo of a dog'; give it, or token and an "
            "instance_prompt that holds it and more, so that the class prompt is what is left",
        ),
        (
            "class_data_dir",
            "photos",
            "instance_data_dir and class_data_dir are the same folder, 'photos'; give two folders",
        ),
        ("learning_rat", 1, "'learning_rat' is not an option; did you mean learning_rate?"),
        ("zzz", 1, "'zzz' is not an option; see train-dreambooth --help for the names"),
        ("cache_dir", "x", "'cache_dir' is not an option; set the environment variable HF_HUB_CACHE"),
    ],
)
def test_a_bad_value_has_its_sentence(name: str, value: Json, sentence: str) -> None:
    assert sentence in problems(**{name: value})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"mask_from_alpha": True, "mask_data_dir": "m"},
            "mask_from_alpha and mask_data_dir are two sources",
        ),
        ({"prior_preservation": "class_images", "class_prompt": "x"}, "needs class_data_dir"),
        ({"prior_preservation": "class_images", "class_data_dir": "x"}, "needs class_prompt"),
        ({"train_text_encoder": True, "pre_compute_text_embeddings": True}, "switch one of them off"),
        ({"aspect_ratio_buckets": "64,64", "use_aspect_ratio_buckets": False}, "switch it on"),
        ({"attention": "sdpa", "enable_xformers_memory_efficient_attention": True}, "two kinds of kernels"),
        ({"target_modules": "to_(q"}, "is no regex"),
    ],
)
def test_options_that_exclude_each_other_are_refused(values: dict[str, Json], sentence: str) -> None:
    assert any(sentence in problem for problem in problems(**values))


def test_problems_of_all_sections_are_said_at_once() -> None:
    found = problems(rank=0, learning_rate=-1, resolution=3, nonsense=1, seed=-5)
    assert len(found) == 5


def test_python_callers_are_checked_too() -> None:
    with pytest.raises(ValueError, match="output_dir=1 does not fit; use a path"):
        OutputConfig(output_dir=1)  # type: ignore[arg-type]


def test_training_the_text_encoder_switches_its_embeddings_off() -> None:
    assert config(train_text_encoder=True).data.pre_compute_text_embeddings is False
    assert config().data.pre_compute_text_embeddings is True


def test_listing_buckets_switches_them_on() -> None:
    data = config(aspect_ratio_buckets="64,96; 96,64;").data
    assert data.use_aspect_ratio_buckets
    assert data.bucket_sizes == ((64, 96), (96, 64))


@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        ("ether", 6e-3),
        ("ether_plus", 6e-3),
        ("lora", 6e-4),
        ("oft", 6e-5),
        ("hra", 1e-4),
        ("boft", 1e-4),
        ("delora", 1e-3),
        ("full", 5e-6),
    ],
)
def test_each_method_has_its_learning_rate(adapter: str, rate: float) -> None:
    assert config(adapter=adapter).learning_rate == rate
    assert config(adapter=adapter, learning_rate=0.5).learning_rate == 0.5
    assert config(adapter=adapter, optimizer="prodigy").learning_rate == 1.0
    assert config(adapter=adapter, train_text_encoder=True).text_encoder_learning_rate == rate
    given = config(adapter=adapter, train_text_encoder=True, text_encoder_lr=0.25)
    assert given.text_encoder_learning_rate == 0.25


@pytest.mark.parametrize(
    ("prompt", "token", "expected"),
    [
        ("a photo of sks dog", "sks", "a photo of dog"),
        ("a photo of {token} dog", "sks", "a photo of dog"),
        ("a photo of sksy dog", "sks", None),
        ("sks", "sks", None),
        ("a photo of sks dog", None, None),
        (None, "sks", None),
    ],
)
def test_the_class_prompt_is_the_instance_prompt_without_its_token(
    prompt: str | None, token: str | None, expected: str | None
) -> None:
    assert config(instance_prompt=prompt, token=token).class_prompt == expected
    assert config(instance_prompt=prompt, token=token, class_prompt="a dog").class_prompt == "a dog"


def test_validation_by_epochs_becomes_steps() -> None:
    assert ValidationConfig(validation_steps=7).steps_between(5) == 7
    assert ValidationConfig(validation_steps=7, validation_epochs=3).steps_between(5) == 15


IDLE: list[tuple[str, dict[str, Json]]] = [
    ("revision", {"revision": "main"}),
    ("revision", {"revision": "main", "pretrained_model_name_or_path": "/"}),
    ("variant", {"variant": "fp16"}),
    ("dataset_config_name", {"dataset_config_name": "x"}),
    ("image_column", {"image_column": "x"}),
    ("caption_column", {"caption_column": "x"}),
    ("crops_per_photo", {"crops_per_photo": 2, "cache_latents": False}),
    ("crops_per_photo", {"crops_per_photo": 2, "center_crop": True}),
    ("unmasked_weight", {"unmasked_weight": 0.5}),
    ("class_data_dir", {"class_data_dir": "x"}),
    ("class_prompt", {"class_prompt": "x"}),
    ("prior_loss_weight", {"prior_loss_weight": 0.5}),
    ("num_class_images", {"num_class_images": 5}),
    ("num_class_images", {"num_class_images": 5, "prior_preservation": "frozen", "class_prompt": "x"}),
    ("rank", {"rank": 8}),
    ("lora_alpha", {"lora_alpha": 8}),
    ("lora_alpha", {"lora_alpha": 8, "adapter": "hra"}),
    ("num_blocks", {"num_blocks": 2, "adapter": "lora"}),
    ("sides", {"sides": "input", "adapter": "oft"}),
    ("dropout", {"dropout": 0.1, "adapter": "hra"}),
    ("text_encoder_lr", {"text_encoder_lr": 1e-4}),
    ("num_train_epochs", {"num_train_epochs": 2, "max_train_steps": 3}),
    ("lr_warmup_steps", {"lr_warmup_steps": 500}),
    ("lr_num_cycles", {"lr_num_cycles": 2, "lr_scheduler": "cosine"}),
    ("lr_power", {"lr_power": 2.0, "lr_scheduler": "linear"}),
    ("ema_decay", {"ema_decay": 0.9}),
    ("validation_steps", {"validation_steps": 5, "validation_epochs": 5, "validation_prompt": "x"}),
    ("target_modules", {"adapter": "full", "target_modules": "to_q"}),
    ("validation_steps", {"validation_steps": 5}),
    ("validation_negative_prompt", {"validation_negative_prompt": "x"}),
    ("logging_dir", {"logging_dir": "x"}),
    ("tracker_project_name", {"tracker_project_name": "x"}),
    ("hub_model_id", {"hub_model_id": "a/b"}),
    ("hub_private_repo", {"hub_private_repo": True}),
]


@pytest.mark.parametrize(("name", "values"), IDLE)
def test_an_option_without_effect_is_named_once(name: str, values: dict[str, Json]) -> None:
    sentences = [sentence for sentence in config(**values).ignored() if sentence.startswith(f"{name} ")]
    assert len(sentences) == 1
    assert "has no effect: " in sentences[0]


def test_defaults_are_no_wishes_unless_they_were_given() -> None:
    assert config().ignored() == ()
    (sentence,) = config(rank=4).ignored({"rank"})
    assert sentence.startswith(
        "rank has no effect: it is for adapter=lora or hra or delora, and ether_plus is used"
    )


@pytest.mark.parametrize(
    "values",
    [
        {"adapter": "lora", "rank": 8, "lora_alpha": 4, "dropout": 0.1},
        {"adapter": "boft", "num_blocks": 2},
        {"lr_warmup_steps": 5, "lr_scheduler": "constant_with_warmup"},
        {"num_class_images": 5, "prior_loss_weight": 0.5, **CLASS_IMAGES},
        {"use_ema": True, "ema_decay": 0.9},
        {"report_to": "tensorboard", "logging_dir": "x"},
    ],
)
def test_options_with_an_effect_are_not_doubted(values: dict[str, Json]) -> None:
    assert config(**values).ignored() == ()


@pytest.mark.parametrize("preset", PRESET_VALUES)
def test_a_preset_is_a_configuration_whose_options_all_have_an_effect(preset: str) -> None:
    values = PRESET_VALUES[preset]  # type: ignore[index]  # the keys are what the preset can be
    made = config(**(values | (CLASS_IMAGES if preset == "faithful" else {})))
    assert with_images(made).ignored() == ()


def with_images(made: DreamBoothConfig) -> DreamBoothConfig:
    """The same run with images in between."""
    return made.replace(validation=made.validation.replace(validation_prompt=("a dog",)))


def test_what_only_a_preset_sets_is_no_wish() -> None:
    values = PRESET_VALUES["fast"]
    assert len(config(**values).ignored()) == 2
    assert config(**values).ignored(preset=values.keys()) == ()


def test_the_balanced_preset_is_the_defaults() -> None:
    defaults = config().flat() | {"max_train_steps": 800}
    assert {name: defaults[name] for name in PRESET_VALUES["balanced"]} == PRESET_VALUES["balanced"]


def test_the_faithful_preset_is_the_papers_setting() -> None:
    made = config(class_data_dir="class", class_prompt="a dog", **PRESET_VALUES["faithful"])
    optimization = made.optimization
    assert (optimization.max_train_steps, optimization.train_batch_size, made.learning_rate) == (
        1400,
        1,
        6e-3,
    )
    assert (made.prior.num_class_images, made.prior.prior_loss_weight) == (200, 1.0)


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ({"rank": 1, "seed": 2}, {"rank": 3}, {"rank": 3, "seed": 2}),
        ({"max_train_steps": 800}, {"num_train_epochs": 3}, {"num_train_epochs": 3}),
        (
            {"max_train_steps": 800},
            {"num_train_epochs": None},
            {"max_train_steps": 800, "num_train_epochs": None},
        ),
        ({"instance_data_dir": "x"}, {"dataset_name": "y"}, {"dataset_name": "y"}),
        ({"pre_compute_text_embeddings": True}, {"train_text_encoder": True}, {"train_text_encoder": True}),
        (
            {"pre_compute_text_embeddings": True},
            {"train_text_encoder": False},
            {"pre_compute_text_embeddings": True, "train_text_encoder": False},
        ),
    ],
)
def test_a_higher_layer_outranks_what_stands_in_its_way(
    below: dict[str, Json], above: dict[str, Json], expected: dict[str, Json]
) -> None:
    assert stack(below, above) == expected


def test_every_default_that_differs_from_diffusers_is_told() -> None:
    line = config().changed_defaults()
    for name in THEIR_DEFAULTS:
        assert f"{name} " in line
    assert "learning_rate 0.006 (0.0005)" in line
    assert "learning_rate" not in config(learning_rate=1).changed_defaults({"learning_rate"})


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
    assert plain.ignored() == ()
    assert config(num_train_epochs=3).resolved().optimization.max_train_steps is None
    assert config().resolved().ignored() == ()


def test_nothing_is_told_of_defaults_where_all_were_given() -> None:
    given = {*THEIR_DEFAULTS}
    assert config().changed_defaults(given) == ""


def test_a_section_can_be_made_by_itself() -> None:
    made = DreamBoothConfig(
        data=DataConfig(instance_data_dir=Path("x")), adapter=AdapterConfig(adapter="lora")
    )
    assert made.learning_rate == 6e-4
