"""Profiling of chosen steps: a torch trace (and a memory snapshot) per rank under logs/."""

from __future__ import annotations

from pathlib import Path

import torch

from megascale.config.schema import Profile
from megascale.parallel.device import accelerator_profiling, record_memory_history


class StepProfiler:
    """Starts before the first step asked for and writes after the last one. Does nothing when no step is asked for."""

    def __init__(self, profile: Profile, logs: Path, rank: int):
        self.first, self.last = profile.steps or (0, -1)
        self.memory, self.logs, self.rank = profile.memory, logs, rank
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call before each step."""
        if step == self.first and self.profiler is None and self.last >= self.first:
            if self.memory:
                record_memory_history(None)
            self.profiler = torch.profiler.profile(activities=accelerator_profiling(), record_shapes=True, with_stack=False)
            self.profiler.start()

    def after(self, step: int) -> None:
        """Call after each step."""
        if self.profiler is None or step != self.last:
            return
        self.profiler.stop()
        stem = f"steps-{self.first}-{self.last}-rank-{self.rank}"
        self.profiler.export_chrome_trace(str(self.logs / f"trace-{stem}.json.gz"))
        (self.logs / f"profile-{stem}.txt").write_text(
            self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        )
        if self.memory:
            record_memory_history(str(self.logs / f"memory-{stem}.pickle"))
        self.profiler = None
