"""The command lines that train: every flag that users of diffusers know, and one for each option."""

import argparse
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ether_diffusion.flags import add_flags
from ether_diffusion.options import declared
from ether_diffusion.scripts import train_control, train_dreambooth
from ether_diffusion.scripts.train_control import CONTROL
from ether_diffusion.scripts.train_dreambooth import (
    DREAMBOOTH,
    Call,
    CallFlags,
    make_parser,
    parse_flags,
    read_call,
)
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import ControlRunConfig, DreamBoothConfig
from ether_diffusion.training.config.presets import OLD_NAMES, PRESET_VALUES, PRESETS
from recipes.tiny_world.evaluate import EvaluationConfig, parse_config
from recipes.tiny_world.loop import RunConfig

ROOT = Path(__file__).parent.parent
OPTIONS = DreamBoothConfig.options()
NEEDED = ["--instance_data_dir", "photos"]
PAIRS = ["--dataset_name", "pairs"]

SWITCHES = """
    with_prior_preservation center_crop train_text_encoder gradient_checkpointing scale_lr use_8bit_adam
    push_to_hub allow_tf32 enable_xformers_memory_efficient_attention pre_compute_text_embeddings
    text_encoder_use_attention_mask set_grads_to_none"""
DREAMBOOTH_FLAGS = """
    pretrained_model_name_or_path=x revision=x variant=x tokenizer_name=x instance_data_dir=x
    class_data_dir=x instance_prompt=x class_prompt=x validation_prompt=x num_validation_images=1
    validation_epochs=1 with_prior_preservation prior_loss_weight=1 num_class_images=1 output_dir=x seed=1
    resolution=512 center_crop train_text_encoder train_batch_size=1 sample_batch_size=1 num_train_epochs=1
    max_train_steps=1 checkpointing_steps=1 checkpoints_total_limit=1 resume_from_checkpoint=latest
    gradient_accumulation_steps=1 gradient_checkpointing learning_rate=1 scale_lr
    lr_scheduler=cosine_with_restarts lr_warmup_steps=1 lr_num_cycles=1 lr_power=1 dataloader_num_workers=1
    use_8bit_adam adam_beta1=0.9 adam_beta2=0.99 adam_weight_decay=1 adam_epsilon=1 max_grad_norm=1
    push_to_hub hub_token=x hub_model_id=x logging_dir=x allow_tf32 report_to=tensorboard mixed_precision=fp16
    prior_generation_precision=fp32 local_rank=1 enable_xformers_memory_efficient_attention
    pre_compute_text_embeddings tokenizer_max_length=1 text_encoder_use_attention_mask validation_images=x
    class_labels_conditioning=timesteps rank=1 lora_dropout=0.1 image_interpolation_mode=bicubic"""
"""Every flag of train_dreambooth_lora.py in diffusers' examples (0.40)."""
CONTROLNET_FLAGS = """
    pretrained_model_name_or_path=x revision=x variant=fp16 tokenizer_name=x output_dir=x seed=1
    resolution=256 train_batch_size=2 num_train_epochs=3 max_train_steps=5 checkpointing_steps=7
    checkpoints_total_limit=3 resume_from_checkpoint=latest gradient_accumulation_steps=2
    gradient_checkpointing learning_rate=0.5 scale_lr lr_scheduler=polynomial lr_warmup_steps=5
    lr_num_cycles=2 lr_power=2 dataloader_num_workers=2 adam_beta1=0.5 adam_beta2=0.5 adam_weight_decay=0.5
    adam_epsilon=0.5 max_grad_norm=0.5 push_to_hub hub_model_id=me/x logging_dir=x allow_tf32
    report_to=tensorboard mixed_precision=bf16 enable_xformers_memory_efficient_attention dataset_name=x
    dataset_config_name=x image_column=x conditioning_image_column=x caption_column=x max_train_samples=9
    validation_prompt=a validation_image=a.png num_validation_images=2 validation_steps=9
    tracker_project_name=x"""
"""Those of train_controlnet.py that are options here; the others are below."""
CONTROLNET_OTHERWISE = {
    *("train_data_dir", "proportion_empty_prompts", "use_8bit_adam", "set_grads_to_none", "cache_dir"),
    *("controlnet_model_name_or_path", "hub_token"),
}


def call(*words: str) -> Call:
    return read_call(parse_flags([*NEEDED, *words]))


def call_control(*words: str) -> Call:
    return read_call(parse_flags(words, CONTROL), CONTROL)


def test_every_flag_of_dreambooth_lora_is_accepted_as_there() -> None:
    flags = DREAMBOOTH_FLAGS.split()
    assert len(flags) == 59
    for flag in flags:
        name, _, value = flag.partition("=")
        assert bool(value) == (name not in SWITCHES.split())
        assert getattr(parse_flags([f"--{name}", value] if value else [f"--{name}"]), name) is not None


def test_every_flag_of_controlnet_is_an_option_translated_or_explained() -> None:
    flags = dict(flag.partition("=")[::2] for flag in CONTROLNET_FLAGS.split())
    assert len({*flags, *CONTROLNET_OTHERWISE}) == 52
    beside = {
        "dataset_name": [],
        "validation_prompt": [*PAIRS, "--validation_image", "a.png"],
        "validation_image": [*PAIRS, "--validation_prompt", "a"],
    }
    for name, value in flags.items():
        made = call_control(*beside.get(name, PAIRS), f"--{name}", *filter(None, [value]))
        kind = ControlRunConfig.options()[name].kind
        meant = float(value) if kind.base is float else int(value) if kind.base is int else value or True
        assert made.config.flat()[name] == ([meant] if kind.is_many else meant)
        assert made.warnings == ()


def test_validation_flags_may_be_given_once_with_several_words_or_several_times() -> None:
    one = call_control(*PAIRS, "--validation_prompt", "a", "b", "--validation_image", "x.png", "y.png")
    other = call_control(
        *(*PAIRS, "--validation_prompt", "a", "--validation_prompt", "b"),
        *("--validation_image", "x.png", "--validation_image", "y.png"),
    )
    assert one.config == other.config


def other_value(name: str) -> tuple[list[str], Json]:
    """A value that is not the option's default: as words of a command line, and as JSON."""
    kind, default = OPTIONS[name].kind, OPTIONS[name].default
    if kind.base is bool:
        return [f"--no-{name}" if default else f"--{name}"], not default
    if kind.is_many:
        return [f"--{name}", "a b", f"--{name}", "c"], ["a b", "c"]
    if kind.choices:
        choice = next(choice for choice in kind.choices if choice not in (default, "class_images"))
        return [f"--{name}", choice], choice
    if kind.base in (int, float):
        return [f"--{name}", "16" if kind.base is int else "0.125"], 16 if kind.base is int else 0.125
    text = {"aspect_ratio_buckets": "64,96", "timestep_shift": "2.5"}.get(name, "else")
    return [f"--{name}", text], text


BESIDE: dict[str, list[str]] = {
    "dataset_name": [],
    "instance_data_dir": [],
    "prior_preservation": [*NEEDED, "--class_prompt", "a dog"],
    "eval_steps": [*NEEDED, "--eval_prompt", "a sks dog"],
    "stop_when_good": [*NEEDED, "--eval_prompt", "a sks dog", "--eval_steps", "50"],
    "keep": [*NEEDED, "--eval_prompt", "a sks dog", "--eval_steps", "50"],
}
CHANGED_TOO = {
    "dataset_name": {"instance_data_dir"},
    "prior_preservation": {"class_prompt"},
    "eval_steps": {"eval_prompt"},
    "stop_when_good": {"eval_prompt", "eval_steps"},
    "keep": {"eval_prompt", "eval_steps"},
    "train_text_encoder": {"pre_compute_text_embeddings"},
    "aspect_ratio_buckets": {"use_aspect_ratio_buckets"},
}


def test_every_flag_reaches_its_option_and_no_other() -> None:
    defaults = call().config.flat()
    for name in OPTIONS:
        words, value = other_value(name)
        made = read_call(parse_flags([*words, *BESIDE.get(name, NEEDED)])).config.flat()
        assert made[name] == value
        changed = {option for option in OPTIONS if made[option] != defaults[option]}
        assert changed == {name} | CHANGED_TOO.get(name, set())


def test_the_help_has_every_flag_under_a_title() -> None:
    for program in (DREAMBOOTH, CONTROL):
        text, kind = make_parser(program).format_help(), program.config_type
        for name in (*kind.options(), *declared(CallFlags)):
            assert f"--{name}" in text
        for title in (*(section.title for section in kind.sections().values()), *PRESETS):
            assert title
            assert f"{title}:" in text
    assert all(f"--{name}" in make_parser().format_help() for name in OLD_NAMES)


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        (["--use_8bit_adam"], "optimizer", "adamw8bit"),
        (["--offset_noise"], "noise_offset", 0.1),
        (["--lora_dropout", "0.25"], "dropout", 0.25),
        (["--proportion_empty_prompts", "0.5"], "caption_dropout", 0.5),
        (["--lora_layers", "to_q,to_k"], "target_modules", "to_q,to_k"),
        (
            ["--with_prior_preservation", "--class_data_dir", "c", "--class_prompt", "a dog"],
            "prior_preservation",
            "class_images",
        ),
    ],
)
def test_an_old_flag_keeps_its_meaning_with_one_line(words: list[str], option: str, value: Json) -> None:
    made = call(*words)
    assert made.config.flat()[option] == value
    (line,) = made.warnings
    assert line.startswith(f"{words[0][2:]} is deprecated; use {option}")


def test_a_flag_that_has_nothing_to_do_here_is_accepted_with_one_line() -> None:
    for name, old in OLD_NAMES.items():
        if old.sets is None:
            made = call(f"--{name}", *([] if old.kind.base is bool else ["1"]))
            assert made.config == call().config
            (line,) = made.warnings
            assert line.startswith(f"{name} is accepted and has no effect: ")


def test_a_folder_of_training_data_is_a_data_set() -> None:
    made = call_control("--train_data_dir", "pairs")
    assert made.config.data.dataset_name == "pairs"
    assert made.warnings[0].startswith("train_data_dir is deprecated; use dataset_name")


def test_an_old_switch_is_on_or_off_and_no_other_wish() -> None:
    assert call("--no-use_8bit_adam").config == call().config
    with pytest.raises(
        ValueError, match=r"use_8bit_adam means optimizer='adamw8bit', and 'prodigy' is given"
    ):
        call("--use_8bit_adam", "--optimizer", "prodigy")


def test_validation_by_epochs_is_honoured_and_called_old() -> None:
    made = call("--validation_epochs", "5")
    assert made.config.validation.steps_between(3) == 15
    assert made.warnings == ("validation_epochs is deprecated; use validation_steps",)


def test_flags_outrank_the_file_which_outranks_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("validation_steps: 7\nnum_validation_images: 3\nuse_8bit_adam: true\n")
    made = call("--preset", "fast", "--config", str(path), "--num_validation_images", "5")
    flat = made.config.flat()
    assert flat["max_train_steps"] == PRESET_VALUES["fast"]["max_train_steps"]
    assert (flat["validation_steps"], flat["num_validation_images"]) == (7, 5)
    assert flat["optimizer"] == "adamw8bit"
    assert made.lines[0].startswith("preset fast sets max_train_steps=200, ")
    assert made.lines[0].endswith("; outranked: validation_steps, num_validation_images")
    epochs = call("--preset", "fast", "--num_train_epochs", "3").config.optimization
    assert (epochs.max_train_steps, epochs.num_train_epochs) == (None, 3)


def test_a_number_that_may_be_absent_is_turned_off_by_none(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"snr_gamma": 5, "report_to": "wandb"}')
    config = call("--config", str(path), "--snr_gamma", "none", "--report_to", "none").config
    assert (config.optimization.snr_gamma, config.output.report_to) == (None, None)
    assert call("--optimizer", "AdamW").config.optimization.optimizer == "adamw"


def test_what_is_about_one_call_is_not_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("dry_run: true\nhub_token: secret\n")
    with pytest.raises(ValueError, match=r"dry_run, hub_token in .* give it as a flag") as error:
        call("--config", str(path))
    assert "secret" not in str(error.value)


def test_a_token_is_in_no_configuration_and_refused_beside_wandb() -> None:
    made = call("--hub_token", "secret")
    assert made.hub_token == "secret"
    assert "secret" not in str(made.config)
    for tracker in ("wandb", "all"):
        with pytest.raises(ValueError, match="would show the token to the tracker") as error:
            call("--hub_token", "secret", "--report_to", tracker)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--learning_rat", "1"], "'learning_rat' is not an option; did you mean learning_rate?"),
        (["--learning", "1"], "'learning' is not an option"),
        (["--dryrun"], "'dryrun' is not an option; did you mean dry_run?"),
        (["--cache_dir", "x"], "set the environment variable HF_HUB_CACHE"),
        (["--controlnet_model_name_or_path", "x"], "no ControlNet is trained or gone on from"),
        (["--crops_coords_top_left_h", "0"], "SDXL is told how each photo was cropped"),
        (["--rank", "x"], "argument --rank: 'x' does not fit; use a whole number"),
        (["--adapter", "x"], "'x' does not fit; use one of ether, ether_plus"),
        (["--output_dir", ""], "argument --output_dir: '' does not fit; use a path"),
        (["--rank"], "argument --rank: expected one argument"),
        (["photos"], "'photos' stands behind no flag"),
    ],
)
def test_a_word_that_is_no_flag_is_one_line_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_flags(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train-dreambooth: ")
    assert sentence in line


def test_problems_are_lines_without_a_traceback_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert logging.getLogger().handlers  # pytest's, or main() would add one
    monkeypatch.chdir(tmp_path)
    assert train_dreambooth.main(["--learning_rate", "nan", "--rank", "0"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("train-dreambooth: there is nothing to train on; give instance_data_dir")
    assert second == "train-dreambooth: rank=0 is out of range; use a whole number from 1"
    assert third == "train-dreambooth: learning_rate=nan is not finite; use a number above 0"
    assert train_dreambooth.main([*NEEDED, "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="nothing to train on"):
        train_dreambooth.main(["--debug"])


def test_the_notable_is_told_once() -> None:
    made = call("--preset", "fast", "--rank", "4", "--local_rank", "0")
    said = (*made.lines, *made.warnings, *made.ignored)
    assert [line.split(":")[0].split(" sets")[0] for line in said] == [
        "preset fast",
        "defaults here (diffusers' in brackets)",
        "local_rank is accepted and has no effect",
        "rank has no effect",
    ]
    assert "max_train_steps" not in made.lines[1]  # the preset set it


def test_the_console_scripts_are_these_commands() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["train-dreambooth"] == f"{train_dreambooth.__name__}:main"
    assert project["scripts"]["train-control"] == f"{train_control.__name__}:main"


@pytest.mark.parametrize(
    "command",
    [["-m", "ether_diffusion.scripts.train_dreambooth"], [str(ROOT / "scripts/train_dreambooth.py")]],
)
def test_the_command_runs_as_a_module_and_as_a_file(command: list[str], tmp_path: Path) -> None:
    """Without torch: what is wrong with flags needs no wait."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--rank", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "rank=0 is out of range" in done.stderr
    assert "Traceback" not in done.stderr
    assert not {"torch", "diffusers"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_the_recipe_of_tiny_world_has_a_flag_for_each_of_its_options() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=300))
    add_flags(parser, RunConfig)
    assert RunConfig(**vars(parser.parse_args([]))) == RunConfig()
    words = ["--pause_file", "quiet", "--compiled", "--seed", "3", "--time_budget_minutes", "2"]
    config = RunConfig(**vars(parser.parse_args(words)))
    assert (config.pause_file, config.compiled, config.seed) == (Path("quiet"), True, 3)
    assert config.time_budget_minutes == 2.0
    text = parser.format_help()
    assert "Last part of the budget over which the rate falls to 5 %; 0: constant." in text
    assert all(f"--{name}" in text for name in declared(RunConfig))
    assert parse_config(["--base", "elsewhere", "--outside"]) == EvaluationConfig(
        base="elsewhere", outside=True
    )


def test_the_recipe_of_tiny_world_runs_from_the_checkout() -> None:
    command = [sys.executable, "-m", "recipes.tiny_world"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m recipes.tiny_world ")
