"""The command line of train-dreambooth: all flags that users of diffusers know, and one for each option."""

import ast
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ether_diffusion.options import declared
from ether_diffusion.scripts import train_dreambooth
from ether_diffusion.scripts.train_dreambooth import Call, CallFlags, make_parser, parse_flags, read_call
from ether_diffusion.strict_json import Json
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.presets import OLD_NAMES, PRESET_VALUES, PRESETS

ROOT = Path(__file__).parent.parent
OPTION_NAMES = [*DreamBoothConfig.options()]
KINDS = {name: each.kind for name, each in DreamBoothConfig.options().items()}
NEEDED = ["--instance_data_dir", "photos"]

DIFFUSERS_FLAGS = [
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "tokenizer_name",
    "instance_data_dir",
    "class_data_dir",
    "instance_prompt",
    "class_prompt",
    "validation_prompt",
    "num_validation_images",
    "validation_epochs",
    "with_prior_preservation",
    "prior_loss_weight",
    "num_class_images",
    "output_dir",
    "seed",
    "resolution",
    "center_crop",
    "train_text_encoder",
    "train_batch_size",
    "sample_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "scale_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "dataloader_num_workers",
    "use_8bit_adam",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "logging_dir",
    "allow_tf32",
    "report_to",
    "mixed_precision",
    "prior_generation_precision",
    "local_rank",
    "enable_xformers_memory_efficient_attention",
    "pre_compute_text_embeddings",
    "tokenizer_max_length",
    "text_encoder_use_attention_mask",
    "validation_images",
    "class_labels_conditioning",
    "rank",
    "lora_dropout",
    "image_interpolation_mode",
]
"""Every flag of train_dreambooth_lora.py in diffusers' examples (0.40)."""

THEIR_SWITCHES = [
    "with_prior_preservation",
    "center_crop",
    "train_text_encoder",
    "gradient_checkpointing",
    "scale_lr",
    "use_8bit_adam",
    "push_to_hub",
    "allow_tf32",
    "enable_xformers_memory_efficient_attention",
    "pre_compute_text_embeddings",
    "text_encoder_use_attention_mask",
]

THEIR_VALUES = {
    "resolution": "512",
    "lr_scheduler": "cosine_with_restarts",
    "report_to": "tensorboard",
    "mixed_precision": "fp16",
    "prior_generation_precision": "fp32",
    "image_interpolation_mode": "bicubic",
    "class_labels_conditioning": "timesteps",
    "resume_from_checkpoint": "latest",
    "lora_dropout": "0.1",
    "adam_beta1": "0.9",
    "adam_beta2": "0.99",
}


def call(*words: str) -> Call:
    return read_call(parse_flags([*NEEDED, *words]))


def test_there_are_the_59_flags_of_diffusers() -> None:
    assert len(set(DIFFUSERS_FLAGS)) == 59


@pytest.mark.parametrize("name", DIFFUSERS_FLAGS)
def test_a_flag_of_diffusers_is_accepted_as_there(name: str) -> None:
    words = [f"--{name}"] if name in THEIR_SWITCHES else [f"--{name}", THEIR_VALUES.get(name, "1")]
    parsed = parse_flags(words)
    assert getattr(parsed, name) is not None


def other_value(name: str) -> tuple[list[str], Json]:
    """A value that is not the option's default: as words of a command line, and as JSON."""
    kind = KINDS[name]
    defaults = DreamBoothConfig.from_flat({"instance_data_dir": "photos"}).flat()
    if kind.base is bool:
        is_on = bool(defaults[name])
        return [f"--no-{name}" if is_on else f"--{name}"], not is_on
    if kind.is_many:
        return [f"--{name}", "a b", f"--{name}", "c"], ["a b", "c"]
    if kind.choices:
        choice = next(choice for choice in kind.choices if choice not in (defaults[name], "class_images"))
        return [f"--{name}", choice], choice
    if kind.base is int:
        return [f"--{name}", "16"], 16
    if kind.base is float:
        return [f"--{name}", "0.125"], 0.125
    text = {"aspect_ratio_buckets": "64,96"}.get(name, "else")
    return [f"--{name}", text], text


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_every_flag_reaches_its_option_and_no_other(name: str) -> None:
    words, value = other_value(name)
    beside: dict[str, list[str]] = {
        "dataset_name": [],
        "instance_data_dir": [],
        "prior_preservation": [*NEEDED, "--class_prompt", "a dog"],
        "eval_steps": [*NEEDED, "--eval_prompt", "a sks dog"],
        "stop_when_good": [*NEEDED, "--eval_prompt", "a sks dog", "--eval_steps", "50"],
    }
    parsed = parse_flags([*words, *beside.get(name, NEEDED)])
    made = read_call(parsed).config.flat()
    defaults = read_call(parse_flags(NEEDED)).config.flat()
    assert made[name] == value
    expected_too = {
        "dataset_name": {"instance_data_dir"},
        "prior_preservation": {"class_prompt"},
        "eval_steps": {"eval_prompt"},
        "stop_when_good": {"eval_prompt", "eval_steps"},
        "train_text_encoder": {"pre_compute_text_embeddings"},
        "aspect_ratio_buckets": {"use_aspect_ratio_buckets"},
    }
    changed = {option for option in OPTION_NAMES if made[option] != defaults[option]}
    assert changed == {name} | expected_too.get(name, set())


def test_the_help_has_every_flag_under_a_title() -> None:
    text = make_parser().format_help()
    for name in (*OPTION_NAMES, *declared(CallFlags), *OLD_NAMES):
        assert f"--{name}" in text
    for title in (*(section.title for section in DreamBoothConfig.sections().values()), *PRESETS):
        assert f"{title}:" in text


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


@pytest.mark.parametrize("name", [name for name, legacy in OLD_NAMES.items() if legacy.sets is None])
def test_a_flag_that_has_nothing_to_do_here_is_accepted_with_one_line(name: str) -> None:
    words = [f"--{name}"] if OLD_NAMES[name].kind.base is bool else [f"--{name}", "1"]
    made = call(*words)
    assert made.config == call().config
    (line,) = made.warnings
    assert line.startswith(f"{name} is accepted and has no effect: ")


def test_an_old_switch_that_is_off_changes_nothing() -> None:
    assert call("--no-use_8bit_adam").config == call().config


def test_an_old_flag_beside_another_wish_is_refused() -> None:
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
    line = made.lines[0]
    assert line.startswith("preset fast sets max_train_steps=200, ")
    assert line.endswith("; outranked: validation_steps, num_validation_images")


def test_epochs_by_flag_outrank_a_presets_steps() -> None:
    config = call("--preset", "fast", "--num_train_epochs", "3").config
    assert (config.optimization.max_train_steps, config.optimization.num_train_epochs) == (None, 3)


def test_a_number_that_may_be_absent_is_turned_off_by_none(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"snr_gamma": 5, "report_to": "wandb"}')
    config = call("--config", str(path), "--snr_gamma", "none", "--report_to", "none").config
    assert (config.optimization.snr_gamma, config.output.report_to) == (None, None)


def test_choices_may_be_written_large() -> None:
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


@pytest.fixture
def quiet_logging() -> None:
    """Keep the handlers that pytest has at the root: main() would add one."""
    assert logging.getLogger().handlers


@pytest.mark.usefixtures("quiet_logging")
def test_problems_are_lines_without_a_traceback_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_dreambooth.main(["--learning_rate", "nan", "--rank", "0"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "train-dreambooth: there is nothing to train on; give instance_data_dir, a folder of photos, or "
        "dataset_name",
        "train-dreambooth: rank=0 is out of range; use a whole number from 1",
        "train-dreambooth: learning_rate=nan is not finite; use a number above 0",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quiet_logging")
def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        train_dreambooth.main(["--debug"])


@pytest.mark.usefixtures("quiet_logging")
def test_a_missing_file_of_options_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_dreambooth.main([*NEEDED, "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


def test_the_notable_is_told_once() -> None:
    made = call("--preset", "fast", "--rank", "4", "--local_rank", "0")
    assert [
        line.split(":")[0].split(" sets")[0] for line in (*made.lines, *made.warnings, *made.ignored)
    ] == [
        "preset fast",
        "defaults here (diffusers' in brackets)",
        "local_rank is accepted and has no effect",
        "rank has no effect",
    ]
    assert "max_train_steps" not in made.lines[1]  # the preset set it


def test_the_console_script_is_this_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["train-dreambooth"] == f"{train_dreambooth.__name__}:main"


@pytest.mark.parametrize(
    "command",
    [["-m", "ether_diffusion.scripts.train_dreambooth"], [str(ROOT / "scripts/train_dreambooth.py")]],
)
def test_the_command_runs_as_a_module_and_as_a_file(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command, "--rank", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "rank=0 is out of range" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_is_imported_only_when_the_flags_are_right() -> None:
    """What is slow to import, the loop and diffusers' training parts, comes after parsing."""
    source = ast.parse((ROOT / "scripts" / "train_dreambooth.py").read_text())
    at_once = {node.module for node in source.body if isinstance(node, ast.ImportFrom)}
    assert "ether_diffusion.training.run" not in at_once
