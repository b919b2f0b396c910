"""Many runs at once: adapters on one frozen base, trained in batches whose rows are of several runs."""

import fnmatch
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ether_diffusion.bases import Base, Denoiser, stack_embeddings
from ether_diffusion.console import Unbroken
from ether_diffusion.durable_files import write_files
from ether_diffusion.metrics.encoders import Encoder
from ether_diffusion.options import shown
from ether_diffusion.strict_json import Json
from ether_diffusion.training import processes
from ether_diffusion.training.config import DreamBoothConfig, control_of
from ether_diffusion.training.loop import Share, Trainer, add_gradients
from ether_diffusion.training.objective import Predict, Question
from ether_diffusion.training.ray_jobs import train_with_ray
from ether_diffusion.training.result import EVALUATION_NAME, UPLOADED, write_adapters
from ether_diffusion.training.run import Session, begin, shortages_explained, train_dreambooth
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.setup import Run, check_run, load_runs
from ether_diffusion.tuner.together import Joined
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

RATES_NAME = "learning_rates.json"
"""What a comparison of learning rates found, in the folder of the best."""
MAX_ROWS, MAX_GPU_ROWS = 4, 16
"""Of several jobs that go through the denoiser at once: a core computes more hardly faster than in turn."""


def check_jobs(configs: Sequence[DreamBoothConfig]) -> None:
    """Check that no job writes into a folder of another; a ValueError names one that does."""
    for number, config in enumerate(configs):
        folder = config.output.output_dir
        others = [each for k, other in enumerate(configs) if k != number for each in other.folders]
        outer = [other.output.output_dir for k, other in enumerate(configs) if k != number]
        is_there = folder.resolve() in {each.resolve() for each in others}
        if is_there or any(each.resolve() in folder.resolve().parents for each in outer):
            found = f"{shown(folder)} is the output_dir of one job and a folder of another"
            raise ValueError(f"{found}, or lies in one; give each job an output_dir of its own")


def groups_of(configs: Sequence[DreamBoothConfig]) -> list[list[DreamBoothConfig]]:
    """Return the jobs that can be trained in one batch: on one base in one precision and size.

    By itself is a job with dropout, whose draws would mix, one that trains or compiles more than the adapter
    of a denoiser, and one with a tracker of one run a process.
    """
    groups = dict[object, list[DreamBoothConfig]]()
    for number, config in enumerate(configs):
        adapter, compute = config.adapter, config.compute
        is_own = (
            control_of(config) or adapter.dropout or adapter.train_text_encoder or adapter.adapter == "full"
        )
        is_own = is_own or compute.torch_compile or config.output.report_to not in (None, "tensorboard")
        shared = config.base, compute.replace(seed=0), config.quantize, config.data.resolution
        groups.setdefault(number if is_own else shared, []).append(config)
    return list(groups.values())


def train_jobs(
    configs: Sequence[DreamBoothConfig],
    spread: Mapping[Path, Sequence[DreamBoothConfig]] = MappingProxyType({}),
    *,
    allow_changes: bool = False,
    ray: bool = False,
    hub_token: str | None = None,
) -> int:
    """Train many adapters, those on one base together; return the exit code as `train_dreambooth`.

    Each is the run that it would be by itself, in a folder of its own: it goes on from its own checkpoint,
    and what ends one ends no other. At the end a ValueError says which could not go on, and why. Those that
    are `spread` below a folder are of one subject, whose best that folder gets, where they ask for it.
    """
    configs = [config.resolved() for config in configs]
    check_jobs(configs)
    kept = {folder: of for folder, of in spread.items() if of[0].evaluation.keep == "best"}
    for folder in kept:
        _check_for_best(folder)
    flags: dict[str, Any] = {"allow_changes": allow_changes, "hub_token": hub_token}
    code, failed = (
        train_with_ray(groups_of(configs), **flags) if ray else train_groups(groups_of(configs), **flags)
    )
    if code:
        return code
    for folder, of in kept.items():
        try:
            keep_best(folder, [each for each in of if each.output.output_dir not in failed])
            failed = {path: why for path, why in failed.items() if path.parent != folder}
        except ValueError as error:
            failed[folder] = str(error)
    if failed:
        told = f"{len(failed)} of {len(configs)} jobs could not be trained to their ends:"
        raise ValueError("\n".join((told, *(f"{printable(path)}: {why}" for path, why in failed.items()))))
    return 0


def train_groups(groups: Sequence[Sequence[DreamBoothConfig]], **flags: Any) -> tuple[int, dict[Path, str]]:
    """Train groups in turn; return an exit code, and why jobs could not go on by their folders."""
    failed = dict[Path, str]()
    for group in groups:
        if code := Jobs(group, failed, **flags).train():
            return code, failed
    return 0, failed


class Jobs:
    """The jobs of a group; where one cannot go on, `failed` says why by its folder."""

    def __init__(
        self,
        configs: Sequence[DreamBoothConfig],
        failed: dict[Path, str],
        *,
        allow_changes: bool,
        hub_token: str | None,
    ) -> None:
        self.configs, self.failed, self.code, self.stopped = configs, failed, 0, set[Path]()
        self.allow_changes, self.hub_token = allow_changes, hub_token

    def train(self) -> int:
        """Train them; return 0, or 130 or 143 where a signal stopped them."""
        paths = [config.output.output_dir for config in self.configs]
        flags: dict[str, Any] = {"allow_changes": self.allow_changes, "hub_token": self.hub_token}
        if len(paths) == 1:
            with self._part_of(paths[0]):
                self.code = train_dreambooth(self.configs[0], **flags)
            return self.code
        with processes.Interrupts() as interrupts, ExitStack() as every:
            held = {path: every.enter_context(ExitStack()) for path in paths}
            runs, encoders, folders = self._checked(interrupts), dict[str, Encoder](), dict[Run, RunFolder]()
            for path, run in runs.items():
                with self._part_of(path):
                    folders[run] = begin(run, held[path], encoders, **flags)
            sessions = self._loaded([*folders], folders, interrupts) if folders else {}
            if sessions and not self.code:
                self._train(sessions, held)
        if self.code:
            logger.warning("the jobs were stopped; the same command goes on from here")
        return self.code

    def _checked(self, interrupts: processes.Interrupts) -> dict[Path, Run]:
        """Look for all that is wrong with any of them, before anything is written."""
        runs = dict[Path, Run]()
        for config in self.configs:
            with self._part_of(config.output.output_dir):
                accelerator = processes.make_accelerator(config.compute, config.output)
                if accelerator.num_processes > 1:
                    raise ValueError("jobs are trained together by one process; launch without others")
                run = runs[config.output.output_dir] = check_run(config, accelerator)
                run.check = interrupts.check
        for run in runs.values():
            run.phases = next(iter(runs.values())).phases
        return runs

    def _loaded(
        self, runs: list[Run], folders: Mapping[Run, RunFolder], interrupts: processes.Interrupts
    ) -> dict[Path, Session]:
        denoiser = load_runs(runs, part_of=lambda run: self._part_of(run.config.output.output_dir))
        sessions = dict[Path, Session]()
        for run in runs:
            path = run.config.output.output_dir
            if path not in self.failed and not self.code:
                with self._part_of(path):
                    session = Session(run, interrupts, folders[run], has_bar=False)
                    session.restore(allow_changes=self.allow_changes)
                    sessions[path] = session
        self.together = Together(runs[0].base, denoiser, [each.run for each in sessions.values()])
        return sessions

    def _train(self, sessions: Mapping[Path, Session], held: Mapping[Path, ExitStack]) -> None:
        """Go round after round: in each, all jobs that are so far have one micro-batch in common batches.

        In a round that some had done when the process was killed, or do later as a signal stopped them, these
        keep their places. So all batches are as large as they would have been, and what is learned from them
        the same to the bit.
        """
        work, waiting = {path: session.train() for path, session in sessions.items()}, dict[Path, Share]()
        trainers = {path: session.trainer for path, session in sessions.items()}
        answers: dict[Path, tuple[Tensor, Tensor] | None] = dict.fromkeys(work)
        total, done = sum(trainer.progress.num_steps for trainer in trainers.values()), list[Path]()
        phases = next(iter(sessions.values())).run.phases
        with ExitStack() as stack:
            bar = tqdm(total=total, desc=f"training {len(work)} jobs", unit="step", file=Unbroken(sys.stderr))
            stack.enter_context(closing(bar))
            stack.enter_context(phases.measure("train"))
            while True:
                for path, answer in answers.items():
                    waiting.pop(path, None)
                    with self._part_of(path):
                        try:
                            waiting[path] = work[path].send(answer)  # type: ignore[arg-type]  # None begins
                        except StopIteration:
                            done.append(path)
                rounds = {path: _round_of(trainers[path], share.turn) for path, share in waiting.items()}
                now = min(rounds.values(), default=math.inf)
                for path in [each for each in done if _round_of(trainers[each]) <= now and not self.code]:
                    done.remove(path)
                    with self._part_of(path):
                        sessions[path].finish(self.hub_token)
                        sessions[path].accelerator.end_training()
                for path in sessions.keys() - waiting.keys() - set(done):
                    held[path].close()
                bar.update(sum(trainer.step for trainer in trainers.values()) - bar.n)
                if not waiting:
                    break
                shares = {path: share for path, share in waiting.items() if rounds[path] == now}
                unstopped = {path for path in self.stopped if trainers[path].is_unfinished}
                for path in ({*done, *waiting, *unstopped} & sessions.keys()) - shares.keys():
                    with self._part_of(path):
                        shares[path] = _shadow(sessions[path].run, int(now))
                answers = {**self._answered({path: shares[path] for path in sessions if path in shares})}
        for line in phases.lines:
            logger.info("%s", line)

    def _answered(self, shares: Mapping[Path, Share]) -> dict[Path, tuple[Tensor, Tensor]]:
        """Add the gradients of a round, those of one shape of latents together, as many as memory bears."""
        answers, shapes = dict[Path, tuple[Tensor, Tensor]](), dict[torch.Size, list[Path]]()
        for path, share in shares.items():
            shapes.setdefault(share.batch.latents.shape[1:], []).append(path)
        for paths in (part for of_shape in shapes.values() for part in _parts(of_shape, shares)):
            own = [shares[path] for path in paths]
            if any(not share.is_shadow for share in own):
                found = zip(paths, add_gradients(own, self.together.answering), strict=True)
                answers |= {path: each for path, each in found if not shares[path].is_shadow}
        return answers

    @contextmanager
    def _part_of(self, path: Path) -> Iterator[None]:
        """Do a part of one job inside, and say whose it is: what it cannot do ends that job alone."""
        with _said_of(path):
            try:
                with shortages_explained(path):
                    yield
            except processes.StoppedAtOnceError:
                raise
            except processes.InterruptedRunError as stop:
                self.code = stop.exit_code
                self.stopped.add(path)
            except (ValueError, OSError) as error:
                self.failed[path] = str(error)
                logger.error("%s", error)


class Together:
    """Answers what several runs ask by one denoiser, in which the adapters of all are in force."""

    def __init__(self, base: Base, denoiser: Denoiser, runs: Sequence[Run]) -> None:
        self._base, self._denoiser = base, denoiser
        self._joined = Joined(denoiser, [run.unet for run in runs])
        self._members = {run.trainer: number for number, run in enumerate(runs)}

    @contextmanager
    def answering(self, shares: Sequence[Share]) -> Iterator[Predict]:
        """Give what answers the questions of these shares, in one forward and its backward inside."""
        members = [self._members[share.trainer] for share in shares]
        with self._joined.at_work(members, [len(share.batch.latents) for share in shares]):
            yield self._predict

    def _predict(self, questions: Sequence[Question], *, of_base: bool = False) -> Sequence[Tensor]:
        model = self._denoiser if of_base else self._joined.model
        sizes, beside = [len(question.noisy) for question in questions], dict[str, Tensor | None]()
        for name in questions[0].beside:
            parts = [part for question in questions if (part := question.beside[name]) is not None]
            beside[name] = torch.cat(parts) if parts else None
        noisy = torch.cat([question.noisy for question in questions])
        timesteps = torch.cat([question.timesteps for question in questions])
        embeddings = stack_embeddings([question.embeddings for question in questions])
        prediction = self._base.predict(model, noisy, timesteps, embeddings, **beside)
        return list(torch.split(prediction, sizes))


def _parts(paths: Sequence[Path], shares: Mapping[Path, Share]) -> Iterator[list[Path]]:
    """Divide shares into parts of about as many rows, at most MAX_ROWS, but for a share that has more."""
    rows = [len(shares[path].batch.latents) for path in paths]
    most = MAX_ROWS if shares[paths[0]].trainer.accelerator.device.type == "cpu" else MAX_GPU_ROWS
    most, part, held = math.ceil(sum(rows) / math.ceil(sum(rows) / most)), list[Path](), 0
    for path, own in zip(paths, rows, strict=True):
        if part and held + own > most:
            yield part
            part, held = [], 0
        part.append(path)
        held += own
    yield part


def _round_of(trainer: Trainer, turn: int = 0) -> int:
    """Return how many micro-batches a trainer has had."""
    return trainer.step * trainer.progress.num_accumulations + turn


def _shadow(run: Run, number: int) -> Share:
    """Return the share that a run had in a round."""
    step, turn = divmod(number, run.trainer.progress.num_accumulations)
    batches = run.source.batches(islice(run.trainer.progress.samples(step, 0), turn, None))
    return Share(run.trainer, turn, next(batches), is_shadow=True)


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """Put in front of all that is logged inside which job it is of."""

    def name(record: logging.LogRecord) -> bool:
        if not hasattr(record, "job"):
            record.msg, record.args = f"[{printable(path.name)}] {record.getMessage()}", ()
            record.job = path
        return True

    handlers = [*logging.root.handlers]
    for handler in handlers:
        handler.addFilter(name)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(name)


def _check_for_best(folder: Path) -> None:
    """Check that a folder is free for the best of several runs in it; a ValueError says what it holds."""
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if not name.startswith((".", "learning_rate-"))]
    if others and RATES_NAME not in names:
        raise ValueError(
            f"{shown(folder)} holds {listed(others)}, which belong to no comparison of learning rates; give "
            "another output_dir, or empty this one"
        )


def keep_best(folder: Path, configs: Sequence[DreamBoothConfig]) -> None:
    """Give a folder the result of the best of several runs: of the highest likeness within the bounds.

    Each run's result is its best step's. A ValueError says that no run has one that keeps to the bounds.
    """
    rates, found = list[dict[str, Json]](), list[tuple[float, Path]]()
    for config in configs:
        path = config.output.output_dir
        report = json.loads((path / EVALUATION_NAME).read_bytes())
        best = next((each for each in report["curve"] if each["step"] == report["best_step"]), None)
        rates.append({"learning_rate": config.learning_rate, "folder": path.name, "best": best})
        if best is not None:
            found.append((best["fidelity"]["mean"], path))
    if not found:
        raise ValueError(
            "no learning rate kept to the bounds on drift and likeness to the prompts, so that none is the "
            "best; give lower ones, or raise --eval_max_drift"
        )
    kept = max(found, key=lambda each: each[0])[1]
    told = {"format": 1, "kept": kept.name, "learning_rates": rates}
    write_files(folder, {RATES_NAME: json.dumps(told, indent=1).encode() + b"\n"})
    names = {str(each.relative_to(kept)): each for each in sorted(kept.rglob("*")) if each.is_file()}
    chosen = {name for pattern in UPLOADED for name in fnmatch.filter(names, pattern)}
    write_adapters(folder, {name: names[name].read_bytes() for name in sorted(chosen)})
    logger.info("%s holds the best adapter, that of %s", printable(folder), kept.name)
