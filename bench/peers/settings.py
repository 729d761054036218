"""The settings at which each peer is fastest, found by sweeps (see `bench/LOG.md`)."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("pipeline", "loop", "timm", "open_clip")


@dataclass(frozen=True)
class Settings:
    """Settings of a peer that change its predictions by rounding only."""

    batch_size: int = 64
    precision: str = "fp32"
    """fp32; `autocast`, or `half` for weights in it too: fp16 on CUDA, bf16 on a CPU."""
    workers: int = 0
    """Of the DataLoader; 0 reads in the process itself."""
    threads: int = 0
    """Of torch; 0 leaves it alone."""
    transform: str = "torchvision"
    """The loop's: `torchvision`'s v2 transforms, or transformers' own `processor`."""
    attention: str = "sdpa"
    """transformers' implementation: sdpa, its default, or eager."""
    compile: bool = False

    def __str__(self) -> str:
        words = [f"batch {self.batch_size}", self.precision, f"{self.workers} worker{'s' * (self.workers != 1)}"]
        words += [f"{self.threads} thread{'s' * (self.threads != 1)}"] if self.threads else []
        words += [word for word in (self.transform, self.attention) if word not in ("torchvision", "sdpa")]
        return ", ".join([*words, *(["compiled"] if self.compile else [])])


# What sweeps on two cores found (see LOG.md): small batches stay in the cache; a DataLoader's workers beside torch's
# threads make these wait for each other. Where CPUs differ (AVX512-BF16 alone, AMX beside it) both are measured.
BEST_WITH_HALF: dict[str, tuple[Settings, ...]] = {
    "pipeline": (Settings(32, "half"), Settings(16, "half")),
    "loop": (Settings(16, "half"), Settings(32, "half"), Settings(16, "half", attention="eager")),
    "timm": (Settings(16, "half"),),
    "open_clip": (Settings(16, "half"),),
}
BEST_WITHOUT: dict[str, tuple[Settings, ...]] = {
    "pipeline": (Settings(32),),
    "loop": (Settings(16), Settings(16, workers=2, threads=1)),
    "timm": (Settings(16),),
    "open_clip": (Settings(16),),
}
BEST_ON_CUDA: dict[str, tuple[Settings, ...]] = {
    "pipeline": (Settings(256, "half", workers=1),),
    "loop": (Settings(256, "half", workers=14), Settings(256, "half", workers=14, compile=True)),
    "timm": (Settings(256, "autocast", workers=14),),
    "open_clip": (Settings(256, "autocast", workers=14),),
}
"""Not swept yet; 14 workers for the 16 cores that come with one GPU."""


def best_settings(name: str) -> tuple[Settings, ...]:
    """The settings at which a peer is fastest on this kind of machine, best first."""
    import torch

    from vitscore.plan.choices import has_bf16_instructions

    if torch.cuda.is_available():
        return BEST_ON_CUDA[name]
    return (BEST_WITH_HALF if has_bf16_instructions() else BEST_WITHOUT)[name]
