"""The Grain graph: planned rows, built by threads or processes, batched in order.

The rows are a random-access source to Grain, so its threads and processes can build them out of order while they
arrive in order. The planner runs in each process: at a few microseconds an image that is cheaper than shipping plans,
and every process then knows every row. A batch carries the planner's snapshot behind its last row, so a checkpoint
is the step and a few KB, and resuming replays nothing. Rows are planned a whole step at a time, because the texts of
a contrastive step are packed together.
"""

import functools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from input_pipeline.packed import Batch, Pairs, stack
from input_pipeline.packing import Planner, RowPlan
from input_pipeline.pairing import StepTexts
from input_pipeline.rows import Row, RowBuilder, empty_row

log = logging.getLogger(__name__)


class Info(NamedTuple):
    """What the host knows of a batch: the planner's snapshot behind it and its unusable images (index, reason)."""

    snapshot: dict
    bad: tuple[tuple[int, str], ...]


class _Planned(NamedTuple):
    """A row to build. snapshot: behind the whole step, of the last local row of a step; None of others."""

    plan: RowPlan | None
    texts: StepTexts | None
    snapshot: dict | None


class _Rows:
    """Random access to the rows that this process addresses; row numbers count from the step `start`."""

    def __init__(self, builder: RowBuilder, plan: dict, *, rows: int, local: Sequence[int], start: int, steps: int):
        self.builder, self.plan, self.rows, self.local = builder, plan, rows, list(local)
        self.start, self.steps = start, steps
        self._reset()

    def _reset(self) -> None:
        self._planner = Planner(self.builder.draw, **self.plan)
        self._ready: dict[int, _Planned] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self.steps * len(self.local)

    def __repr__(self) -> str:  # Grain prints its source
        return f"Rows(L={self.builder.length}, K={self.builder.slots})"

    def __getitem__(self, i: int) -> tuple[Row | Exception, dict | None]:
        # An exception that leaves a Grain source ends or desynchronises the iterator, so it travels as a value.
        try:
            step, place = divmod(int(i), len(self.local))
            plan, texts, snapshot = self._plan((self.start + step) * self.rows + self.local[place])
            row = empty_row(self.builder) if plan is None else self.builder(plan)
            if texts is not None:
                row = row._replace(pairs=self.builder.pairs(texts, self.local[place], row.index))
            return row, snapshot
        except Exception as error:
            return error, None

    def _plan(self, row: int) -> _Planned:
        with self._lock:
            if row not in self._ready and row < self._planner.row:
                self._reset_to_start()
            while self._planner.row <= row:
                self._plan_step()
            return self._ready.pop(row)

    def _plan_step(self) -> None:
        first = self._planner.row
        plans = [next(self._planner, None) for _ in range(self.rows)]
        self._planner.row = first + self.rows  # which rows behind the last image do not count
        texts, snapshot = self.builder.plan_texts(plans), self._planner.snapshot()
        for place in self.local:
            self._ready[first + place] = _Planned(plans[place], texts, snapshot if place == self.local[-1] else None)
        for row in range(first, first + self.rows):  # what the readers of other processes were given is not asked for
            self._ready.pop(row - 64 * self.rows - 4096, None)

    def _reset_to_start(self) -> None:
        self._planner, self._ready = Planner(self.builder.draw, **self.plan), {}


def _stack(
    rows: Sequence[tuple[Row | Exception, dict | None]], capacity: Capacity | None
) -> tuple[Batch, Info] | Exception:
    for row, _ in rows:
        if isinstance(row, Exception):
            return row
    built = [row for row, _ in rows]
    images = stack([row.images for row in built], capacity)
    pairs = None
    if built[0].pairs is not None:
        texts, *ids = zip(*(row.pairs for row in built), strict=True)
        pairs = Pairs(stack(texts), *map(np.stack, ids))
    batch = Batch(images, np.stack([row.labels for row in built]), np.stack([row.index for row in built]), pairs)
    return batch, Info(rows[-1][1], tuple(bad for row in built for bad in row.bad))


class Loader:
    """Iterates (Batch, Info) from `start` to `steps`.

    builder: makes rows. plan: options of `Planner` (with `snapshot` when resuming at `start`). rows: B over all
    processes; local: which of a step's rows this process builds. Raises UserError above `max_bad_share`
    of the images that this process read.
    """

    def __init__(
        self,
        builder: RowBuilder,
        plan: dict,
        *,
        rows: int,
        steps: int,
        start: int = 0,
        local: Sequence[int] | None = None,
    ):
        self.builder, self.steps, self.start = builder, steps, start
        local = range(rows) if local is None else local
        self.rows = _Rows(builder, plan, rows=rows, local=local, start=start, steps=steps - start)
        self.bad: dict[int, str] = {}
        self.seen = 0

    def __iter__(self) -> Iterator[tuple[Batch, Info]]:
        data = self.builder.config.data
        threads = data.num_threads if data.num_threads >= 0 else min(16, os.cpu_count() or 1)
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2 * len(self.rows.local)))
        dataset = grain.MapDataset.source(self.rows).to_iter_dataset(read)
        if data.num_workers:
            if not flags.FLAGS.is_parsed():  # grain reads absl flags in its workers
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=4))
        stack_rows = functools.partial(_stack, capacity=self.rows.plan.get("capacity"))
        iterator = iter(dataset.batch(len(self.rows.local), batch_fn=stack_rows))
        try:
            for item in iterator:
                if isinstance(item, Exception):
                    raise item
                self._count(*item)
                yield item
        finally:
            iterator.close()  # or threads and worker processes go on until the program ends

    def _count(self, batch: Batch, info: Info) -> None:
        self.seen += int((batch.index >= 0).sum()) + len(info.bad)
        for index, reason in info.bad:
            if index not in self.bad:
                log.warning("skipped %s: %s", self.builder.source.describe(index), reason)
            self.bad[index] = reason
        share, data = self.builder.config.data.max_bad_share, len(self.builder.source)
        if len(self.bad) > share * min(data, max(self.seen, 1000)):
            index, reason = next(iter(self.bad.items()))
            raise UserError(
                f"{len(self.bad)} of the first {min(self.seen, data)} images cannot be used, above "
                f"data.max_bad_share={share:g}; "
                f"the first is {self.builder.source.describe(index)}: {reason}. Remove or repair them (each was "
                "logged), "
                "or raise --config.data.max_bad_share."
            )
