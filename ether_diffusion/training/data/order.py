"""Which item a visit uses: a permutation per epoch, a pure function of the visit's number."""

from collections.abc import Sequence

import torch

from ether_diffusion.training.randomness import stream


def chosen_samples(number: int, limit: int | None) -> list[int]:
    """Return which of so many samples a run trains on, in their order: all, or as many as the limit."""
    if limit is None or limit >= number:
        return list(range(number))
    drawn = torch.randperm(number, generator=stream(0, "chosen samples", number))
    return sorted(drawn[:limit].tolist())


class VisitOrder:
    """The items of all visits, in epochs of `num_visits_per_epoch`.

    Without buckets, visit v is sample v mod n of epoch v div n, and an epoch is a permutation of n samples:
    each item `repeats` times. With buckets (of each item, its bucket), the `effective_batch` visits of one
    step come from one bucket: each bucket's permutation is cut into chunks of that many, a short last chunk
    is filled up by going round in the bucket, and the chunks are shuffled. Then an epoch uses each item at
    least `repeats` times. Items may have `repeats` of their own.
    """

    def __init__(
        self,
        num_items: int,
        effective_batch: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        *,
        repeats: int | Sequence[int] = 1,
    ) -> None:
        assert num_items > 0
        assert effective_batch > 0
        counts = [repeats] * num_items if isinstance(repeats, int) else repeats
        assert min(counts) > 0
        assert len(counts) == num_items
        assert buckets is None or len(buckets) == num_items
        self.num_items = num_items
        self.effective_batch = effective_batch
        self.seed = seed
        turns = range(max(counts))
        self._items = [item for turn in turns for item in range(num_items) if turn < counts[item]]
        num_samples = len(self._items)
        self._buckets: list[list[int]] | None = None
        self.num_visits_per_epoch = num_samples
        if buckets is not None:
            self._buckets = [
                [sample for sample, item in enumerate(self._items) if buckets[item] == bucket]
                for bucket in sorted(set(buckets))
            ]
            num_chunks = sum(-(-len(members) // effective_batch) for members in self._buckets)
            self.num_visits_per_epoch = num_chunks * effective_batch
        self._last: tuple[int, list[int]] | None = None

    def item(self, visit: int) -> int:
        """Return the index of the item that a visit uses."""
        epoch, place = divmod(visit, self.num_visits_per_epoch)
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._samples(epoch))
        return self._items[self._last[1][place]]

    def _samples(self, epoch: int) -> list[int]:
        if self._buckets is None:
            return _shuffled(self.num_visits_per_epoch, stream(self.seed, "order", epoch))
        chunks: list[list[int]] = []
        for number, members in enumerate(self._buckets):
            places = _shuffled(len(members), stream(self.seed, "bucket order", epoch, number))
            for start in range(0, len(places), self.effective_batch):
                stop = start + self.effective_batch
                chunks.append([members[places[index % len(places)]] for index in range(start, stop)])
        order = _shuffled(len(chunks), stream(self.seed, "order", epoch))
        return [sample for chunk in order for sample in chunks[chunk]]


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    return [int(index) for index in torch.randperm(count, generator=generator)]
