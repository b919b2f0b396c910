"""The README, the pages of docs/ and the examples: their commands and their code run."""

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import tiny_unet
from diffusers import StableDiffusionPipeline
from forked_runs import exit_code, fork
from PIL import Image
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.scripts import ether, train_control, train_dreambooth
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import photos_of, write_photos
from recipes.tiny_world.control_pairs import Pair, write_pairs

ROOT = Path(__file__).parent.parent
PAGES = {
    path.stem: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
TASKS = ("README", "train", "generate", "control", "evaluate", "adapters", "bases")
"""The pages whose commands are run, one after the other in one folder."""

PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "ether": ether.main,
    "train-dreambooth": train_dreambooth.main,
    "train-control": train_control.main,
}
BASES = re.compile(r"stable-diffusion-v1-5/\S+|stabilityai/\S+")
QUICK = {
    "generate": ["--steps", "2"],
    "evaluate": ["--steps", "1", "--num_images", "2"],
    "train-dreambooth": [
        *("--max_train_steps", "1", "--mixed_precision", "no", "--num_validation_images", "1"),
        *("--validation_num_inference_steps", "1", "--eval_num_inference_steps", "1"),
        *("--num_eval_images", "1", "--eval_steps", "1"),
    ],
    "train-control": ["--max_train_steps", "1"],
}
"""What makes the pages' commands short; later flags win."""


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", TEXTS[page], flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if shlex.split(line, comments=True)]


def snippet(page: str, containing: str) -> str:
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL) if containing in code
    ]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take for granted: photos, pairs, adapters, and a benchmark of two machines."""
    monkeypatch.chdir(tmp_path)
    photos = write_photos(find_concept("fox"), Path("photos"), count=2)
    shutil.copy(photos[0], "photo.png")
    Path("photos/metadata.jsonl").unlink()
    for name in ("fox-photos", "cat-photos"):
        shutil.copytree("photos", name)
    (jobs,) = re.findall(r"```yaml\n(.*?)```", TEXTS["train"], flags=re.DOTALL)
    Path("jobs.yaml").write_text(jobs, encoding="utf-8")
    for seed, name in enumerate(("my-adapter", "other-adapter")):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_world_path("tiny_world_2"))
        torch.manual_seed(seed)
        pipe.unet.add_adapter(EtherConfig())
        save_ether(pipe, name, trigger="a sks animal")
    shape = Image.new("RGB", (64, 64))
    shape.paste((255, 255, 255), (16, 16, 48, 48))
    shape.save("shape.png")
    Path("words").mkdir()
    Path("words/place.txt").write_text("in the snow\nin space\n", encoding="utf-8")
    scenes = [photo.scene for photo in photos_of(find_concept("cat"))[:2]]
    write_pairs([Pair(scene, "silhouette") for scene in scenes], Path("pairs"))
    write_pairs([Pair(scene, "palette") for scene in scenes], Path("maps"))
    measured = json.loads((ROOT / "docs/results/benchmark.json").read_text(encoding="utf-8"))
    for name, subjects in (("here", measured["subjects"][:4]), ("there", measured["subjects"][4:])):
        runs = [each for each in measured["runs"] if each["subject"] in subjects]
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "benchmark.json").write_text(json.dumps(measured | {"runs": runs}))
    return tmp_path


def run(command: list[str]) -> int:
    if command[:3] == ["accelerate", "launch", "-m"]:
        command = ["train-dreambooth", *command[4:]]
    name, arguments = command[0], [BASES.sub("tiny_world_2", each) for each in command[1:]]
    kind = arguments[0] if name == "ether" else name
    extra = QUICK.get(kind, [])
    if "--eval_steps" in extra and "--eval_steps" not in arguments:
        extra = extra[:-2]  # which would be idle without it
    return PROGRAMS[name]([*arguments, *extra])


@pytest.mark.parametrize("page", TASKS)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
def test_the_commands_of_a_page_run_one_after_the_other(
    page: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = [command for command in commands(page) if command[0] not in ("make", "pip")]
    assert ran
    for command in ran:
        assert run(command) == 0, f"{shlex.join(command)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_made_and_installed_exists(page: str) -> None:
    for command in commands(page):
        if command[0] == "make":
            done = subprocess.run(
                ["make", "--dry-run", *command[1:]], cwd=ROOT, capture_output=True, check=False
            )
            assert done.returncode == 0
        assert command[0] in {"make", "pip", "accelerate", *PROGRAMS}


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    of_ether = [("ether", name) for name in ("generate", "evaluate", "benchmark", "plan", "ui", "export")]
    helped = io.StringIO()
    for program, *arguments in [("train-dreambooth",), ("train-control",), *of_ether]:
        with contextlib.redirect_stdout(helped), pytest.raises(SystemExit, match="0"):
            PROGRAMS[program]([*arguments, "--help"])
    return set(re.findall(r"--(\w+)", helped.getvalue()))


@pytest.mark.parametrize("page", [*TASKS, "studio"])
def test_every_flag_that_a_page_mentions_exists(page: str, known_flags: set[str]) -> None:
    of_others = r"python -m research.*?`|torchrun.*?`|--architecture"
    text = re.sub(of_others, "", TEXTS[page], flags=re.DOTALL)
    mentioned = set(re.findall(r"(?<![\w-])--([a-z]\w+)", text))
    assert mentioned <= known_flags, mentioned - known_flags


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page]):
        assert (PAGES[page].parent / target).exists(), target


@pytest.mark.parametrize(
    "module",
    sorted(set(re.findall(r"python -m ((?:tools|research|recipes)\.\w+)", " ".join(TEXTS.values())))),
)
def test_every_module_of_the_checkout_that_a_page_runs_starts(module: str, tmp_path: Path) -> None:
    def start() -> int:
        warnings.simplefilter("ignore")
        sys.argv = [module, "--help"]
        sys.modules.pop(module, None)  # to be run as `python -m` runs it
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return 0 if end.code is None else int(end.code)
        return 1

    assert exit_code(fork(start, tmp_path / "said")) == 0, (tmp_path / "said").read_text()


def test_the_readme_fits_on_a_few_screens_and_an_example_on_one() -> None:
    assert len(TEXTS["README"].splitlines()) <= 150
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path


def test_the_tree_names_what_is_there() -> None:
    tree = re.search(r"^    ether_diffusion/ .*?\n\n", TEXTS["README"], flags=re.MULTILINE | re.DOTALL)
    assert tree is not None
    folder = ROOT
    for line in tree[0].strip("\n").splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folder = ROOT if indent == 4 else folder
        assert (folder / name).exists(), f"the README's tree names {name}, which is not in {folder}"
        if indent == 4:
            folder = ROOT / name


def test_the_readmes_ten_lines_train_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, there = snippet("README", "save_ether(pipe").split("load_ether(pipe")
    scope: dict[str, Any] = {}
    exec(here, scope)
    # "in another process, on the same base"
    fresh = type(scope["pipe"]).from_pretrained(tiny_world_path("tiny_world_2"))
    fresh.set_progress_bar_config(disable=True)
    exec("load_ether(pipe" + there, scope | {"pipe": fresh})
    assert fresh.get_active_adapters() == ["fox"]
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (128, 128)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
def test_the_snippet_of_the_pipelines_draws_weighs_and_gives_the_base_back(folder: Path) -> None:
    scope: dict[str, Any] = {}
    code = snippet("generate", "read_image_metadata")
    exec(code.replace('"num_inference_steps": 20', '"num_inference_steps": 2'), scope)
    assert scope["image"].tobytes() != scope["base"].tobytes()
    assert len(scope["pair"]) == 2
    assert scope["pipe"].active_adapters == []
    metadata = read_image_metadata("fox.png")
    assert metadata is not None
    assert [use.name for use in metadata.adapters] == ["fox", "cat"]


def test_the_configuration_of_the_page_is_accepted() -> None:
    code, scope = snippet("adapters", "num_blocks_pattern"), dict[str, Any]()
    exec(code.replace("\nEtherConfig(", "\nconfig = EtherConfig("), scope)
    tiny_unet().add_adapter(scope["config"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
def test_the_snippet_of_mixed_adapters_gives_a_row_each() -> None:
    pipe = tiny_sd()
    for name in ("dog", "cat"):
        pipe.unet.add_adapter(EtherConfig(), name)
    scope: dict[str, Any] = {"torch": torch, "pipe": pipe, "latents": torch.randn(3, 4, 8, 8)}
    scope |= {"timesteps": torch.tensor([1, 2, 3]), "text": torch.randn(3, 7, 32)}
    exec(snippet("adapters", "mixed_adapters"), scope)
    assert scope["noise"].shape == (3, 4, 8, 8)


def test_the_snippet_of_prepared_adapters_reaches_the_vectors() -> None:
    unet = tiny_unet()
    unet.add_adapter(EtherConfig())
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 7, 32))
    scope = {"unet": unet, "batch": inputs, "compute_loss": lambda m, b: m(*b)[0].mean()}
    exec(snippet("adapters", "prepared_adapters"), scope)
    assert all(p.grad is not None for p in unet.parameters() if p.requires_grad)


def test_fused_attention_can_be_adapted_as_the_page_says() -> None:
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    targets = re.search(r'`target_modules=r"(.*)"`', TEXTS["adapters"])
    assert targets is not None
    unet.add_adapter(EtherConfig(target_modules=targets[1]))
    unet(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 7, 32))[0].mean().backward()
    missing = [name for name, p in unet.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at a second adapter
def test_the_examples_train_and_mix(folder: Path) -> None:
    example("train_by_hand").train(Path("photos"), Path("by-hand"), steps=2)
    assert example("dreambooth_from_python").main("photos", "run", max_train_steps=1) == 0
    paths = example("mix_adapters").main("by-hand", "run", "pictures", steps=2)
    pictures = [Image.open(path).tobytes() for path in paths]
    assert len(set(pictures)) == 4


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "fox.ipynb").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace('_steps": 200', '_steps": 1')
            exec(code.replace('_steps": 20,', '_steps": 2,'), scope)
    assert scope["pair"].size == (256, 128)
