"""A trace of some steps of a run, as jax's profiler writes it: for the xprof and perfetto viewers.

The first steps of a run warm caches up, so the steps are named by the user; the device is idle before the first of
them starts and after the last is done, so that the trace holds these steps and nothing else.
"""

import re
from pathlib import Path

import jax
from tqdm import tqdm

from input_pipeline.errors import UserError
from navit_jax.distributed import is_lead


class Profile:
    """Traces the steps FIRST:LAST, both included, of process 0 into WORKDIR/profile; "": none.

    Raises UserError for anything else than two step numbers in order.
    """

    def __init__(self, steps: str, workdir: Path) -> None:
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        if steps and not (match and 1 <= int(match[1]) <= int(match[2])):
            raise UserError(f"--profile_steps={steps}: expected the first and the last step, such as 10:13")
        self._first, self._last = (int(match[1]), int(match[2])) if match else (0, 0)
        self._folder, self._running = Path(workdir) / "profile", False

    def check(self, step: int, total: int) -> None:
        """Raises UserError if the trace is not among the steps behind `step` of a run to `total`."""
        if self._first and not step < self._first <= self._last <= total:
            raise UserError(
                f"--profile_steps={self._first}:{self._last}: this run trains the steps {step + 1} to {total}"
            )

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends behind this step, so that it must be waited for."""
        return bool(self._first) and step in (self._first - 1, self._last)

    def between(self, step: int) -> None:
        """Behind a step that is done: start or end the trace, if it is time."""
        if self._first and step == self._first - 1 and is_lead():
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        elif step == self._last:
            self.close()

    def close(self) -> None:
        """End the trace, if one is under way, and say where it is."""
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        found = sorted(self._folder.rglob("perfetto_trace.json.gz"))
        where = f"{found[-1]} at https://ui.perfetto.dev, or " if found else ""
        tqdm.write(f"trace of steps {self._first} to {self._last}: open {where}xprof --logdir {self._folder}")
