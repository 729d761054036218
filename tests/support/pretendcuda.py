"""A GPU that is not there: torch.cuda with streams that remember what was put on them; loaded by path.

The device of a run is `cuda`, its models stay on the CPU, and `streams.Late` does the work that the streams order. What
each stream was given is in `done`, so that a test can say where everything happened.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch


class Stream:
    """A stream of `torch.cuda`."""

    def __init__(self, gpu: PretendCuda, name: str) -> None:
        self._gpu = gpu
        self.name = name
        self.cuda_stream = 0 if name == "default" else 7

    def wait_stream(self, other: Stream) -> None:
        self._gpu.done.append((self.name, f"waits for {other.name}"))


class PretendCuda:
    """Takes the place of torch.cuda's streams, and of what asks for a GPU by name, as long as a test lasts."""

    def __init__(self, patch: pytest.MonkeyPatch, device: Any, *, capability: tuple[int, int] = (9, 0)) -> None:
        self.done: list[tuple[str, str]] = []
        """The stream, and what was put on it or happened while it was the current one."""
        self.default = self.current = Stream(self, "default")
        gpu, numbers = self, itertools.count(1)

        class Own(Stream):
            def __init__(self, index: int | None = None) -> None:
                super().__init__(gpu, f"own {next(numbers)}")

        answers: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "set_device": lambda index: None,
            "get_device_name": lambda index: "Pretend",
            "get_device_capability": lambda device=None: capability,
            "Stream": Own,
            "default_stream": lambda index=None: self.default,
            "current_stream": lambda index=None: self.current,
            "stream": self._on,
            "empty_cache": lambda: None,
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        for name in ("copy", "mark", "ranking", "times", "graphed", "free_memory"):
            self.note(patch, device, name)
        patch.setattr("vitscore.engine.cuda_device.CudaDevice", lambda index: device)
        # The run's stream is kept for as long as the process: this one for as long as the test.
        patch.setattr("vitscore.engine.cuda_device._own_stream", functools.lru_cache(torch.cuda.Stream))
        self._keep_on_cpu(patch)

    def note(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        """Remember under which stream something is called."""
        real = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            self.done.append((self.current.name, name))
            return real(*arguments, **options)

        patch.setattr(owner, name, noted)

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _keep_on_cpu(self, patch: pytest.MonkeyPatch) -> None:
        """Models, decoders and operators of a run stay where they can be."""
        from vitscore.engine import loop as engine
        from vitscore.engine import prefetch as intake
        from vitscore.models import load as models

        places: tuple[tuple[Any, str, dict[str, Any]], ...] = (
            (intake, "make_decoder", {"device_id": None}),
            (engine, "Stage", {"device_id": None}),
        )
        for module, name, place in places:
            patch.setattr(module, name, placed(getattr(module, name), place))
        load_model = models.load_model

        def load_on_cpu(*given: Any, placement: models.Placement, **options: Any) -> Any:
            return load_model(*given, placement=replace(placement, device="cpu"), **options)

        patch.setattr(models, "load_model", load_on_cpu)


def placed(real: Callable[..., Any], place: dict[str, Any]) -> Callable[..., Any]:
    return lambda *given, **options: real(*given, **{**options, **place})
