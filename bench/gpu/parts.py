"""The three parts of the day: their steps, the most wanted first, and their limits.

The first part needs no DALI. Kernels are compared with their twins before anything compiled by torch runs. A step
`prepare` makes what later ones need where it is not there yet, and takes a second where it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from vitscore.bench.gpu.day import Day
from vitscore.bench.gpu.runner import Part, Step

QUICK_TUNING = {"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS": "ATEN"}
"""For tests, whose models are tiny: torch.compile tries no Triton kernels for products, a minute a model."""
PREPARE = Step("prepare", 35)
PARTS: Mapping[int, Part] = {
    1: Part(
        240,
        (
            Step("probe", 45),
            Step("twins", 50),
            PREPARE,
            Step("forwards", 55, needs=("prepare",)),
            Step("forward tests", 50),
        ),
    ),
    2: Part(
        360,
        (
            Step("dali", 25),
            PREPARE,
            Step("tests", 55, needs=("dali",)),
            Step("whole", 45, needs=("prepare",)),
            Step("decoding", 40, needs=("dali", "prepare")),
            Step("predictions", 45, needs=("prepare",)),
            Step("profile", 35, needs=("prepare",)),
            Step("peers", 45, needs=("prepare",)),
            Step("streams", 35, needs=("prepare",)),
        ),
    ),
    3: Part(
        300,
        (
            PREPARE,
            Step("L/14 run", 35, needs=("prepare",)),
            Step("B/32 run", 25, needs=("prepare",)),
            Step("compiled B/16", 55, needs=("prepare",)),
            Step("little memory", 30, needs=("prepare",)),
            Step("two processes", 15),
            Step("augment", 25, needs=("prepare",)),
            Step("compiled L/14", 50, needs=("prepare",)),
            Step("compiled tests", 30, env=QUICK_TUNING),
        ),
    ),
}
FUNCTIONS: Mapping[str, str] = {
    "probe": "probe:probe",
    "twins": "testing:twins",
    "prepare": "prepare:prepare",
    "forwards": "forwards:eager",
    "forward tests": "testing:run",
    "dali": "decoding:dali",
    "tests": "testing:run",
    "whole": "wholes:base",
    "decoding": "decoding:rates",
    "predictions": "wholes:predictions",
    "profile": "profiled:profile",
    "peers": "wholes:peers",
    "streams": "wholes:streams",
    "L/14 run": "wholes:large",
    "B/32 run": "wholes:small",
    "compiled B/16": "forwards:compiled_base",
    "compiled L/14": "forwards:compiled_large",
    "little memory": "refusals:little_memory",
    "two processes": "refusals:two_processes",
    "augment": "wholes:augmented",
    "compiled tests": "testing:run",
}


def function_of(step: str) -> Callable[[Day], None]:
    """Import the function of a step."""
    module, _, name = FUNCTIONS[step].partition(":")
    function: Callable[[Day], None] = getattr(importlib.import_module(f"vitscore.bench.gpu.{module}"), name)
    return function
