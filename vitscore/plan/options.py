"""Options of a run: one frozen dataclass, its checks, and the TOML file that can set it.

The command line, `--config FILE.toml` and `vitscore.score(...)` all produce a `RunOptions`; no later stage reads flags.
`None` and `auto` mean an automatic choice, which `plan.choices` resolves and records with its reason.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscore.augment import operators
from vitscore.errors import TooManyBadError, UsageError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
DECODERS = ("auto", "dali", "torchvision")
SAVEABLE = ("logits", "embeddings")
VIEWS = {"none": 1, "hflip": 2}
"""Values of `--tta`, and the number of forwards that an image costs with them."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `vitscore run`, under the same names; one attribute per option."""

    shards: tuple[str, ...]
    """Shards in any form that the command accepts."""
    model: tuple[str, ...]
    """`[NAME=]CHECKPOINT` for every model."""
    output: Path
    """The run's folder."""
    classes: Path | None = None
    templates: Path | None = None
    label_map: tuple[str, ...] = ()
    """`[NAME=]FILE` or `[NAME=]by-position`."""
    labels: Path | None = None
    """CSV or Parquet (key, label) that overrides the labels in the shards."""
    groups: Path | None = None
    """JSON file of superclasses that are scored too."""
    label_key: str = "cls"
    image_key: str | None = None
    split: str = "test"
    allow_pipe: bool = False
    """Run `pipe:COMMAND` shards; without it they are refused."""
    cache_dir: Path | None = None
    """Folder for remote and compressed shards while they are read; None is the system's folder for temporary files."""
    cache_size: int = 3
    """Most shards in the cache, for each rank."""
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: bool | None = None
    decoder: str = "auto"
    decode_threads: int | None = None
    max_pixels: int = 178_956_970
    """Largest declared width x height of an image; the default is Pillow's limit."""
    top_k: int = 5
    on_bad_sample: str = "skip"
    on_bad_shard: str = "fail"
    max_bad: str = "10%"
    save: tuple[str, ...] = ()
    tta: str = "none"
    """Test-time views that a prediction is averaged over."""
    augment: tuple[str, ...] = ()
    """`OP:ARG=V,...`, applied in this order to the resized images."""
    augment_seed: int = 0
    cells: tuple[str, ...] = ()
    """`OP:severity=N`: further conditions to score every image under; set by `vitscore robustness`."""
    limit: int | None = None
    overwrite: bool = False

    def to_record(self) -> dict[str, Any]:
        """Return the options as JSON values by name; `make_options` reads them back."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    def __post_init__(self) -> None:
        if not self.shards:
            raise UsageError("no shards given", next_step="Name shards, or `demo` for the built-in ones.")
        if not self.model:
            raise UsageError("no model given", next_step="Name one with -m, for example -m demo-vit.")
        choose("--device", self.device, DEVICES)
        choose("--precision", self.precision, PRECISIONS)
        choose("--decoder", self.decoder, DECODERS)
        choose("--on-bad-sample", self.on_bad_sample, ("skip", "fail", "wrong"))
        choose("--on-bad-shard", self.on_bad_shard, ("fail", "skip"))
        for item in self.save:
            choose("--save", item, SAVEABLE)
        choose("--tta", self.tta, tuple(VIEWS))
        for item in (*self.augment, *self.cells):
            operators.parse(item)
        if self.augment_seed < 0:
            raise UsageError("wrong value", where="--augment-seed", expected="from 0", got=str(self.augment_seed))
        for name, value in (
            ("--cache-size", self.cache_size),
            ("--batch-size", self.batch_size),
            ("--decode-threads", self.decode_threads),
            ("--top-k", self.top_k),
            ("--limit", self.limit),
            ("--max-pixels", self.max_pixels),
        ):
            if value is not None and value < 1:
                raise UsageError("wrong value", where=name, expected="a whole number from 1", got=str(value))
        if not (self.label_key == "cls" or (self.label_key.startswith("json:") and len(self.label_key) > 5)):
            raise UsageError("wrong value", where="--label-key", expected="cls or json:FIELD", got=self.label_key)
        BadLimit.parse(self.max_bad)


@dataclass(frozen=True)
class BadLimit:
    """How many bad samples a run accepts: `--max-bad COUNT|PERCENT%`."""

    count: int | None
    percent: float | None

    @classmethod
    def parse(cls, text: str) -> BadLimit:
        """Parse `12` or `2.5%`.

        Raises:
            UsageError: the text has neither form, or is out of range.
        """
        try:
            if text.endswith("%"):
                percent = float(text[:-1])
                if 0 <= percent <= 100:
                    return cls(None, percent)
            elif int(text) >= 0:
                return cls(int(text), None)
        except ValueError:
            pass
        raise UsageError("wrong value", where="--max-bad", expected="a count (12) or a share (2.5%)", got=text)

    def is_exceeded(self, *, bad: int, seen: int, at_end: bool) -> bool:
        """Return whether the limit is exceeded. A percentage is judged from 1,000 samples on, and at the end."""
        if self.count is not None:
            return bad > self.count
        assert self.percent is not None
        return (at_end or seen >= 1000) and 100 * bad > self.percent * seen


def choose(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError("wrong value", where=option, expected=" or ".join(choices), got=value)


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file whose keys are the long option names, with dashes or underscores.

    Raises:
        UsageError: the file cannot be read, or is not TOML.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("config not readable", where=str(path), got=error.strerror or "an error") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError("config is not TOML", where=str(path), got=str(error)) from error
    return {key.replace("-", "_"): value for key, value in document.items()}


def make_options(values: Mapping[str, Any]) -> RunOptions:
    """Build RunOptions from plain values (from the command line, a TOML file or Python), coercing lists and paths.

    Raises:
        UsageError: a key is unknown, or a value has the wrong type.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(RunOptions)}
    coerced: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise UsageError("unknown option", where=key, expected="one of " + ", ".join(sorted(fields)))
        coerced[key] = coerce(key, value, fields[key])
    missing = [name for name in ("shards", "model", "output") if name not in coerced]
    if missing:
        raise UsageError("missing option", where=", ".join(missing), next_step="See `vitscore run --help`.")
    return RunOptions(**coerced)


def coerce(key: str, value: Any, declared: str) -> Any:
    """Coerce a value to the type that its field declares."""
    if value is None and "None" in declared:
        return None
    if declared.startswith("tuple"):
        items = [value] if isinstance(value, str | Path) else value
        if key == "save" and isinstance(items, list | tuple):
            items = [part for item in items for part in str(item).split(",") if part]
        if isinstance(items, list | tuple) and all(isinstance(item, str | Path) for item in items):
            return tuple(str(item) for item in items)
    elif "Path" in declared and isinstance(value, str | Path):
        return Path(value)
    elif "bool" in declared and isinstance(value, bool):
        return value
    elif "int" in declared and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif declared == "str" and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    elif declared == "str | None" and isinstance(value, str):
        return value
    raise UsageError("wrong type", where=key, expected=declared, got=repr(value))


def judge_bad(limit: BadLimit, *, bad: int, seen: int, at_end: bool) -> None:
    """Raise TooManyBadError if `--max-bad` is exceeded."""
    if limit.is_exceeded(bad=bad, seen=seen, at_end=at_end):
        allowed = str(limit.count) if limit.count is not None else f"{limit.percent:g}%"
        raise TooManyBadError(
            "too many bad samples",
            where=f"{bad} of {seen}",
            expected=f"at most {allowed}",
            got=f"{100 * bad / max(seen, 1):.1f}%" if limit.count is None else str(bad),
            next_step="The finished parts stay; run again with a higher --max-bad to resume.",
        )
