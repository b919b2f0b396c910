"""The training loop: update after update, each a function of its number and of what was learned before."""

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ether_diffusion.strict_json import Json
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.config import OptimizationConfig
from ether_diffusion.training.methods import TrainedPart, prepared
from ether_diffusion.training.objective import Denoising, Predict, losses_of_batches
from ether_diffusion.training.randomness import stream
from ether_diffusion.wording import listed

logger = logging.getLogger(__name__)

T = TypeVar("T")

OPTIMIZER, AVERAGE = STATE_FILES = ("optimizer.safetensors", "average.safetensors")
"""The files of a trainer's tensors beside the adapter; the second is there if an average is kept."""
CONFIGURED = ("lr", "initial_lr", "betas", "eps", "weight_decay")
"""Entries of a parameter group that are settings of the run; the others are what the optimizer found."""
_OTHER_OPTIMIZERS = {"prodigy": ("prodigyopt", "Prodigy"), "adamw8bit": ("bitsandbytes.optim", "AdamW8bit")}
"""Module and class."""


@dataclass(frozen=True)
class StepReport:
    """What an update did; `step` counts from 1, loss and gradient norm are those of all processes."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


class NonFiniteError(ValueError):
    """Training cannot go on: a loss or a gradient is not finite. The adapter is as before the step."""


@dataclass(frozen=True)
class Progress:
    """How far a run is to go and how a step's samples are split: micro-batches of each process in turn."""

    num_steps: int
    batch_size: int
    num_accumulations: int
    num_processes: int

    @property
    def effective_batch(self) -> int:
        """Samples of one update."""
        return self.batch_size * self.num_accumulations * self.num_processes

    def steps_per_epoch(self, num_samples: int) -> int:
        """Return how many updates it takes until all samples of an epoch were used."""
        return -(-num_samples // self.effective_batch)

    def samples(self, first_step: int, process_index: int) -> Iterator[list[int]]:
        """Return the samples of each micro-batch of a process, from the update with index first_step on."""
        for step in range(first_step, self.num_steps):
            for turn in range(self.num_accumulations):
                place = turn * self.num_processes + process_index
                start = step * self.effective_batch + place * self.batch_size
                yield list(range(start, start + self.batch_size))


@dataclass(frozen=True)
class Share:
    """A micro-batch whose gradient a trainer wants, and its turn in the update."""

    trainer: "Trainer"
    turn: int
    batch: Batch
    is_shadow: bool = False
    """Whether it only keeps its place: what it was told in an earlier process."""

    @property
    def seed(self) -> int:
        """What dropout draws from; all else has streams of its own."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        turn = self.turn * accelerator.num_processes + accelerator.process_index
        return stream(trainer.seed, "dropout", trainer.step, turn).initial_seed()

    def weigh(self, losses: Tensor) -> Tensor:
        """Return the share in the update's loss that each row's make up."""
        loss = (losses * self.batch.weights.to(losses.device)).sum() / len(set(self.batch.samples))
        return loss / self.trainer.progress.num_accumulations


Work: TypeAlias = Generator[Share, tuple[Tensor, Tensor], T]
"""Work of a run that asks for gradients, and is told its share of the loss and each row's (b,)."""
Answering: TypeAlias = Callable[[Sequence[Share]], AbstractContextManager[Predict]]


def add_gradients(shares: Sequence[Share], answering: Answering) -> list[tuple[Tensor, Tensor]]:
    """Add the gradients of micro-batches, each of another trainer, by one forward and one backward.

    Returns each one's share of its update's loss, and the loss of each row. A shadow gets no gradient.
    """
    with ExitStack() as stack:
        with shares[0].trainer.accelerator.autocast():
            torch.manual_seed(shares[0].seed)
            predict = stack.enter_context(answering(shares))
            work = [(share.trainer.denoising, share.batch) for share in shares]
            losses = losses_of_batches(work, predict)
        found = [share.weigh(own) for share, own in zip(shares, losses, strict=True)]
        scaled = list[Tensor]()
        for share, loss in zip(shares, found, strict=True):
            scaler = share.trainer.accelerator.scaler
            if not share.is_shadow:
                scaled.append(loss if scaler is None else scaler.scale(loss))
        torch.autograd.backward(scaled)
    for share in shares:
        if share.is_shadow:
            share.trainer.prepared_optimizer.zero_grad()
    return [(loss.detach(), own.detach()) for loss, own in zip(found, losses, strict=True)]


def alone(work: Work[T]) -> T:
    """Do the work of one run, and return what it returns."""
    with closing(work):
        try:
            share = next(work)
            while True:
                found = add_gradients([share], share.trainer.answering)
                share = work.send(found[0])
        except StopIteration as end:
            result: T = end.value
            return result


class Trainer:
    """Adapters in training: their models, the optimizer, the schedule and the average of one process."""

    def __init__(
        self,
        accelerator: Accelerator,
        parts: Sequence[TrainedPart],
        denoising: Denoising,
        progress: Progress,
        *,
        control_learning_rate: float = 0.0,
    ) -> None:
        self.accelerator, self.parts, self.denoising = accelerator, list(parts), denoising
        self.config, self.seed, self.control = denoising.config, denoising.seed, denoising.control
        self.progress, self.step, config = progress, 0, denoising.config
        scale = progress.effective_batch if config.scale_lr else 1
        groups = [(list(part.parameters), part.learning_rate * scale) for part in parts]
        if self.control is not None:
            groups.append((list(self.control.parameters()), control_learning_rate * scale))
        self.parameters = [parameter for group, _ in groups for parameter in group]
        self.optimizer: Optimizer = find_optimizer(config)(
            [{"params": group, "lr": rate} for group, rate in groups],
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.schedule: LambdaLR = get_scheduler(
            config.lr_scheduler,
            optimizer=self.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=progress.num_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.average = EMAModel(self.parameters, decay=config.ema_decay) if config.use_ema else None
        self.prepared_optimizer = accelerator.prepare(self.optimizer)

    def steps(self, batches: Iterator[Batch]) -> Iterator[StepReport]:
        """Do one update after another, up to the last; batches are this process's, from this step on."""
        while self.is_unfinished:
            yield alone(self.update(batches))

    @property
    def is_unfinished(self) -> bool:
        """Whether there are updates left."""
        return self.step < self.progress.num_steps

    def train_step(self, micro_batches: Sequence[Batch]) -> StepReport:
        """Do one update with the gradients of the micro-batches, as `update`."""
        return alone(self.update(iter(micro_batches)))

    def update(self, batches: Iterator[Batch]) -> Work[StepReport]:
        """Do one update with the gradients of the next micro-batches, which whoever goes on with this adds.

        A NonFiniteError leaves all as it was.
        """
        shares, losses, names = [], [], list[str]()
        for turn in range(self.progress.num_accumulations):
            batch = next(batches)
            share, of_rows = yield Share(self, turn, batch)
            shares.append(share)
            losses.append(of_rows)
            names += batch.names
        self._share_gradients()
        loss = self.accelerator.reduce(torch.stack(shares).sum(), reduction="mean").item()
        rate = float(self.schedule.get_last_lr()[0])
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        # with float16 it is the scaler's work to pass over gradients that overflow
        may_overflow = self.accelerator.scaler is not None
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or may_overflow):
            self.prepared_optimizer.zero_grad()
            own = [n for n, v in zip(names, torch.cat(losses).tolist(), strict=True) if not math.isfinite(v)]
            photos = dict.fromkeys(gather_object(own) or gather_object(names))  # whichever process has them
            raise NonFiniteError(
                f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {self.step + 1} is not finite, "
                f"at learning rate {rate:g}, with {listed(photos, len(photos))}; the adapter is as before; "
                "go on from an older checkpoint with a lower learning rate (--resume_from_checkpoint, "
                "--allow_changes), or look at what was shown"
            )
        self.prepared_optimizer.step()
        self.schedule.step()
        self.prepared_optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.parameters)
        self.step += 1
        return StepReport(self.step, loss, grad_norm, rate)

    @contextmanager
    def answering(self, shares: Sequence["Share"]) -> Iterator[Predict]:
        """Give what answers the questions of this trainer's own share, fast inside."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(prepared(part.model, part.config))
            yield self.denoising.predict

    def _share_gradients(self) -> None:
        """Give all processes the mean of their gradients: at once, for an adapter's are few."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = self.accelerator.reduce(torch.cat([grad.view(-1) for grad in gradients]), reduction="mean")
        for grad, mean in zip(gradients, flat.split([grad.numel() for grad in gradients]), strict=True):
            grad.copy_(mean.view_as(grad))

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Json]]:
        """Return all that the rest of the run depends on but the adapter: tensors by file, and JSON."""
        slots, numbers = optimizer_state(self.optimizer)
        tensors = {OPTIMIZER: slots}
        kind = type(self.optimizer).__name__
        state: dict[str, Json] = {"step": self.step, "optimizer_kind": kind, "optimizer": numbers}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.average is not None:
            shadows = self.average.shadow_params
            tensors[AVERAGE] = {f"{i:05d}": tensor for i, tensor in enumerate(shadows)}
            state["average_steps"] = self.average.optimization_step
        return tensors, state

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Put back what `state` returned; the adapter is put back by itself, before.

        What the configuration sets stays as it is now, and what it did not ask for then begins anew.
        """
        self.step = state["step"]
        if state["optimizer_kind"] == type(self.optimizer).__name__:
            load_optimizer_state(self.optimizer, {**tensors[OPTIMIZER], **state["optimizer"]})
        else:
            logger.warning("the optimizer was another then; its state begins anew")
        factors = [factor(self.step) for factor in self.schedule.lr_lambdas]
        rates = [rate * factor for rate, factor in zip(self.schedule.base_lrs, factors, strict=True)]
        place = {"last_epoch": self.step, "_step_count": self.step + 1, "_last_lr": rates}
        self.schedule.load_state_dict(self.schedule.state_dict() | place)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None and AVERAGE not in tensors:
            logger.warning("no average was kept then; it begins with the adapter of step %d", self.step)
            self.average = EMAModel(self.parameters, decay=self.config.ema_decay)
        elif self.average is not None:
            shadows = tensors[AVERAGE]
            for shadow, name in zip(self.average.shadow_params, sorted(shadows), strict=True):
                shadow.copy_(shadows[name])
            self.average.optimization_step = state["average_steps"]


@contextmanager
def averaged(trainer: Trainer) -> Iterator[None]:
    """Give the adapter its averaged values inside, if it has any."""
    if trainer.average is None:
        yield
        return
    trainer.average.store(trainer.parameters)
    trainer.average.copy_to(trainer.parameters)
    try:
        yield
    finally:
        trainer.average.restore(trainer.parameters)


def find_optimizer(config: OptimizationConfig) -> Any:
    """Return the class of the optimizer; a ValueError says what package or GPU is missing."""
    name = config.optimizer
    if name == "adamw":
        return torch.optim.AdamW
    if name == "adamw8bit" and not torch.cuda.is_available():
        raise ValueError("optimizer=adamw8bit needs a CUDA GPU, and there is none; use adamw")
    module, kind = _OTHER_OPTIMIZERS[name]
    package = module.partition(".")[0]
    try:
        return getattr(import_module(module), kind)
    except ImportError:
        raise ValueError(f"optimizer={name} needs the package {package}; pip install {package}") from None


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Return an optimizer's state: tensors by "slots.0.exp_avg" or "groups.0.d", the rest as JSON alike."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Json] = {}
    owners = [(f"slots.{index}", slot) for index, slot in state["state"].items()]
    owners += [(f"groups.{index}", group) for index, group in enumerate(state["param_groups"])]
    for owner, values in owners:
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}.{name}"] = value
            elif name != "params":
                numbers[f"{owner}.{name}"] = list(value) if isinstance(value, tuple) else value
    return tensors, numbers


def load_optimizer_state(optimizer: Optimizer, values: Mapping[str, Tensor | Json]) -> None:
    """Put back what `optimizer_state` returned, but for what the configuration sets."""
    state = optimizer.state_dict()
    for key, value in values.items():
        owner, index, name = key.split(".", 2)
        if owner == "slots":
            state["state"].setdefault(int(index), {})[name] = value
        elif name not in CONFIGURED:
            group = state["param_groups"][int(index)]
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value  # type: ignore[arg-type]
    optimizer.load_state_dict(state)
