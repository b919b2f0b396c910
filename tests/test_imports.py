"""What importing this package costs, and that ETHER is known to PEFT once a name of it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "peft", "diffusers", "transformers", "accelerate", "datasets", "gradio", "numpy", "PIL")


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


WAITING = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"
SCRIPTS = "ether_diffusion.scripts"


@pytest.mark.parametrize("module", ["ether_diffusion", "research.study", "recipes.tiny_world.demo_control"])
def test_importing_imports_no_library_before_it_is_needed(module: str) -> None:
    assert run(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    ("module", "commands"),
    [
        (f"{SCRIPTS}.ether", [[], ["generate"], ["evaluate"]]),
        (f"{SCRIPTS}.train_dreambooth", [[]]),
        (f"{SCRIPTS}.train_control", [[]]),
        ("recipes.tiny_world.demo", [[]]),
        ("research.learn_subjects", [[]]),
    ],
)
def test_help_imports_no_library_and_lets_threads_sleep(
    module: str, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    said = run(
        f"import sys\nfrom {module} import main\nfor words in {commands}:\n"
        "    try: main([*words, '--help'])\n    except SystemExit as end: assert not end.code\n"
        f"print([m for m in {HEAVY} if m in sys.modules])\n{WAITING}"
    )
    assert said.splitlines()[-2:] == ["[]", "PASSIVE"]


def test_a_users_own_wish_on_waiting_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    started = f"from {SCRIPTS}.ether import main\ntry: main(['--help'])\nexcept SystemExit: pass\n{WAITING}"
    assert run(started).splitlines()[-1] == "ACTIVE"


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("2", "2")])
def test_the_embedded_base_is_trained_by_one_thread_unless_asked_otherwise(
    given: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    ended = "main(['--instance_data_dir', 'not_there', '--instance_prompt', 'a cat', '--output_dir', 'run'])"
    said = run(
        f"from ether_diffusion.scripts.train_dreambooth import main\nassert {ended} == 2\n"
        "import os; print(os.environ['OMP_NUM_THREADS'])"
    )
    assert said.splitlines()[-1] == used


def test_the_library_leaves_the_threads_of_its_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert (
        run(f"from ether_diffusion import load_ether; import ether_diffusion.pipelines; {WAITING}") == "None"
    )


def test_starting_says_nothing_of_libraries_that_nothing_here_uses() -> None:
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            "from ether_diffusion.console import share_machine; share_machine()\n"
            "import ether_diffusion.training.run, diffusers\n"
            "diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_peft_knows_ether_once_a_name_of_it_is_used() -> None:
    uses = [
        "import ether_diffusion.tuner",
        "import peft; from ether_diffusion import EtherConfig",
        "from ether_diffusion import load_ether",
        "import ether_diffusion; ether_diffusion.TARGET_PRESETS",
    ]
    said = run(
        # each in a process of its own, all of which share what is slow to import
        f"import os, sys, diffusers, peft, transformers\nfor use in {uses}:\n    if not os.fork():\n"
        "        try: exec(use); print('ETHER' in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)\n"
        "        finally: sys.stdout.flush(); os._exit(0)\n    os.wait()"
    )
    assert said.split() == ["True"] * len(uses)


def test_the_package_by_itself_leaves_the_import_of_others_alone() -> None:
    code = "import sys; before = list(sys.meta_path); import ether_diffusion; print(sys.meta_path == before)"
    assert run(code) == "True"


def test_the_package_lists_what_it_offers() -> None:
    names = run("import ether_diffusion as e; print(*dir(e)); [getattr(e, n) for n in dir(e)]").split()
    assert {"EtherConfig", "load_ether", "save_ether", "mixed_adapters"} <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    said = run("import ether_diffusion\ntry: ether_diffusion.nothing\nexcept AttributeError as e: print(e)")
    assert "nothing" in said
