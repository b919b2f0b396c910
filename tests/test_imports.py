"""What importing this package costs, and that ETHER is known to PEFT once a name of it is used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ether_diffusion.scripts import train_dreambooth

ROOT = Path(__file__).parent.parent
SCRIPTS = "ether_diffusion.scripts"
WAITING = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"


def run(code: str, **variables: str) -> list[str]:
    """Run code in a fresh process, which is to say nothing on stderr; return the lines that it prints."""
    left = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=left | {"PYTHONPATH": str(ROOT)} | variables,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


LAZY = f"""
import importlib, os, sys
HEAVY = ("torch", "peft", "diffusers", "transformers", "accelerate", "datasets", "gradio", "numpy", "PIL")
def light(what):
    found = [name for name in HEAVY if name in sys.modules]
    assert not found, (what, found)
before = list(sys.meta_path)
for module in ("ether_diffusion", "research.study", "recipes.tiny_world.demo_control"):
    importlib.import_module(module)
    light(module)
assert sys.meta_path == before
assert "OMP_WAIT_POLICY" not in os.environ
for module in ("ether", "ether generate", "ether evaluate", "train_dreambooth", "train_control",
               "recipes.tiny_world.demo", "research.learn_subjects"):
    name, *words = module.split()
    try: importlib.import_module(name if "." in name else "{SCRIPTS}." + name).main([*words, "--help"])
    except SystemExit as end: assert not end.code
    light(module)
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
"""


def test_imports_and_help_import_no_library_and_commands_let_threads_sleep() -> None:
    assert run(LAZY)


def test_a_users_own_wish_on_waiting_threads_stays() -> None:
    started = f"from {SCRIPTS}.ether import main\ntry: main(['--help'])\nexcept SystemExit: pass\n{WAITING}"
    assert run(started, OMP_WAIT_POLICY="ACTIVE")[-1] == "ACTIVE"


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("2", "2")])
def test_the_embedded_base_is_trained_by_one_thread_unless_asked_otherwise(
    given: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # so that what the command sets is taken back
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    arguments = ["--instance_data_dir", "not_there", "--instance_prompt", "a cat", "--output_dir", "run"]
    assert train_dreambooth.main(arguments) == 2
    assert os.environ["OMP_NUM_THREADS"] == used


LIBRARY = f"""
import logging, os, traceback
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
import diffusers, peft, torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
def in_a_process_of_its_own(code):
    child = os.fork()
    if not child:
        try:
            exec(code)
            assert "ETHER" in known, code
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
assert "ETHER" not in known
for code in ("import ether_diffusion.tuner", "from ether_diffusion import EtherConfig",
             "from ether_diffusion import load_ether", "import ether_diffusion as e; e.TARGET_PRESETS"):
    in_a_process_of_its_own(code)
import ether_diffusion as e
assert {{"EtherConfig", "load_ether", "save_ether", "mixed_adapters"}} <= set(dir(e))
for name in dir(e): getattr(e, name)
try: e.nothing
except AttributeError as error: assert "nothing" in str(error)
import ether_diffusion.pipelines
{WAITING}
"""


def test_peft_knows_ether_once_a_name_is_used_and_the_threads_of_a_host_are_left_alone() -> None:
    assert run(LIBRARY, PYTHONWARNINGS="ignore")[-1] == "None"


def test_starting_says_nothing_of_libraries_that_nothing_here_uses() -> None:
    code = "from ether_diffusion.console import share_machine; share_machine()\n"
    code += "import ether_diffusion.training.run, diffusers\n"
    assert run(code + "diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline") == []
