"""The processes that `accelerate launch` has started, or this one alone."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from ..errors import Qwen35Error, extra

# What torchrun (`accelerate launch` with GPUs) and MPI (on CPUs) say of how many processes there are.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """rank, count: which of how many this one is. device: where it computes."""

    def __init__(self, device: str):
        self.state: Any = None
        self.rank, self.count, self.device = 0, 1, device
        if any(os.environ.get(name, "1") != "1" for name in SIZES):
            with extra("placement"):
                from accelerate import PartialState
            try:  # the fastest waits for the slowest, for hours
                self.state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
            except (ValueError, RuntimeError, KeyError) as error:
                said = ", ".join(f"{name}={os.environ[name]}" for name in SIZES if name in os.environ)
                what, do = "cannot join the other processes", "use `accelerate launch`, or unset it"
                raise Qwen35Error(what, where="the environment", found=f"{said}: {error}", do=do) from error
            self.rank, self.count = self.state.process_index, self.state.num_processes
            if device == "cuda":
                self.device = str(self.state.device)

    def own(self, groups: int) -> range:
        """Which of the groups are this process's."""
        first, after = (-(-rank * groups // self.count) for rank in (self.rank, self.rank + 1))
        return range(first, after)

    def gather(self, names: set[str]) -> set[str]:
        """The union over all processes, once all of them have come here."""
        if self.state is None:
            return names
        from accelerate.utils import gather_object

        return set(gather_object(sorted(names)))

    def wait(self) -> None:
        """Returns once all processes have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def close(self) -> None:
        self.wait()
        if self.state is not None:
            self.state.destroy_process_group()
