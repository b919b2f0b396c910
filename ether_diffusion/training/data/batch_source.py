"""From visits to batches: views are made or remembered, encoded, sampled and stacked."""

import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.utils.data import DataLoader, Dataset

from ether_diffusion.training.data.batch import Batch
from ether_diffusion.training.data.latents import Codec, EncodedView, encode_view
from ether_diffusion.training.data.plan import VisitPlan
from ether_diffusion.training.data.rows import class_row, frozen_row, instance_row, stack_rows
from ether_diffusion.training.data.views import View, ViewKey, ViewMaker
from ether_diffusion.training.data.visits import Schedule, Visit
from ether_diffusion.training.interrupts import release_signals, signals_held
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A visit and its views in pixels."""

    visit: Visit
    views: tuple[View, ...]


@dataclass(frozen=True)
class VisitSamples(Dataset[Sample | str]):
    """The part of a batch source that workers run: photos in, pixels out; no model is in it.

    Where a photo cannot be read any more, the sentence on it comes in place of the sample: an exception would
    come out of a worker as a traceback.
    """

    schedule: Schedule
    maker: ViewMaker

    def __getitem__(self, visit: int) -> Sample | str:
        """Return a visit's sample."""
        planned = self.schedule.visit(visit)
        try:
            return Sample(planned, tuple(next(self.maker.make([key])) for key in _keys(planned)))
        except ValueError as error:
            return str(error)


class BatchSource:
    """Batches of a run. With cached latents, every view that the visits ask for is encoded here, once.

    Raises:
        ValueError: a photo is gone or was changed since it was checked, or its latents are not finite.
    """

    def __init__(
        self,
        plan: VisitPlan,
        codec: Codec,
        *,
        num_visits: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.plan = plan
        self.codec = codec
        self._data = plan.schedule.config
        self._samples = VisitSamples(plan.schedule, plan.maker)
        self._warned: set[str] = set()
        self._cache: dict[ViewKey, EncodedView] | None = None
        if self._data.cache_latents:
            self._cache = self._encode_views(plan.schedule.views(range(num_visits)), on_progress)

    @property
    def num_samples(self) -> int:
        """Visits of an epoch."""
        return self.plan.num_samples

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt that can occur."""
        return self.plan.prompts

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every photo, prompt, mask and class image by its name."""
        return self.plan.fingerprint()

    def batch(self, visits: Sequence[int]) -> Batch:
        """Return the batch of some visits, which must be of one size.

        Raises:
            ValueError: a photo that is not cached is gone or was changed.
        """
        if self._cache is None:
            return self._finish([self._samples[visit] for visit in visits])
        planned = [self.plan.schedule.visit(visit) for visit in visits]
        return self._stack(planned, [[self._cache[key] for key in _keys(visit)] for visit in planned])

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Return the batches of lists of visits, in their order; workers load what is not cached.

        Raises:
            ValueError: a photo that is not cached is gone or was changed.
        """
        num_workers = self._data.dataloader_num_workers
        if self._cache is not None or num_workers == 0:
            return (self.batch(visits) for visits in schedule)
        loader: DataLoader[Sample | str] = DataLoader(
            self._samples,
            batch_sampler=schedule,  # type: ignore[arg-type]  # any iterable of lists will do
            num_workers=num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_leave_interrupts_to_main,
            generator=torch.Generator(),  # else the global one is drawn from
        )
        with signals_held():  # a worker that is still starting could not outlive one
            found = iter(loader)
        return (self._finish(samples) for samples in found)

    def _encode_views(
        self, keys: Sequence[ViewKey], on_progress: Callable[[int, int], None] | None
    ) -> dict[ViewKey, EncodedView]:
        cache: dict[ViewKey, EncodedView] = {}
        for _, group in groupby(keys, key=lambda key: (key.is_class, key.item, key.size)):
            for view in self.plan.maker.make(list(group)):
                cache[view.key] = self._encode(view)
                if on_progress is not None:
                    on_progress(len(cache), len(keys))
        return cache

    def _encode(self, view: View) -> EncodedView:
        if view.is_moved and self._data.center_crop and view.name not in self._warned:
            self._warned.add(view.name)
            logger.warning(
                "the middle of %s shows nothing of its mask; it is cropped around the mask instead",
                printable(view.name),
            )
        return encode_view(view, self.codec)

    def _finish(self, samples: Sequence[Sample | str]) -> Batch:
        found: list[Sample] = []
        for sample in samples:
            if isinstance(sample, str):
                raise ValueError(sample)
            found.append(sample)
        views = [[self._encode(view) for view in sample.views] for sample in found]
        return self._stack([sample.visit for sample in found], views)

    def _stack(self, visits: Sequence[Visit], views: Sequence[Sequence[EncodedView]]) -> Batch:
        seed, prior = self.plan.schedule.seed, self.plan.prior
        rows = [
            instance_row(
                found[0],
                prompt=visit.prompt,
                visit=visit.number,
                seed=seed,
                unmasked_weight=self._data.unmasked_weight,
                control_dropout=self.plan.control_dropout,
            )
            for visit, found in zip(visits, views, strict=True)
        ]
        prompt, weight = prior.class_prompt or "", prior.prior_loss_weight
        if prior.prior_preservation == "frozen":
            rows += [frozen_row(row, prompt=prompt, weight=weight) for row in rows]
        elif prior.prior_preservation == "class_images":
            rows += [
                class_row(found[1], prompt=prompt, visit=visit.number, seed=seed, weight=weight)
                for visit, found in zip(visits, views, strict=True)
            ]
        return stack_rows(
            rows,
            self.codec.scale,
            has_masks=self.plan.has_masks,
            has_size_ids=self.plan.needs.has_size_ids,
        )


def _keys(visit: Visit) -> tuple[ViewKey, ...]:
    return (visit.view,) if visit.class_view is None else (visit.view, visit.class_view)


def _leave_interrupts_to_main(worker: int) -> None:
    """Let a worker outlive Ctrl-C, which it gets too: the step in progress needs its samples.

    SIGTERM ends it as ever, whatever handler it was forked with: that is how it is stopped at last.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    release_signals()


def _unchanged(samples: list[Sample | str]) -> list[Sample | str]:
    return samples
