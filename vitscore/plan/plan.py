"""From options to a plan: the shards, the models, the classes and every automatic choice.

Rank 0 plans before the first image and before writing anything, and raises every error that can be detected by then.
The other ranks receive the plan as a record (`to_record`); run.json keeps its identity and choices for a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitscore.augment import operators
from vitscore.augment.conditions import Condition, cell_name
from vitscore.classes import matching as classes
from vitscore.classes.groups import Groups, read_groups
from vitscore.classes.matching import HeadMap
from vitscore.errors import SetupError, UsageError
from vitscore.models import checkpoint as checkpoints
from vitscore.models import zeroshot
from vitscore.models.checkpoint import Checkpoint
from vitscore.plan import identity
from vitscore.plan.choices import Choices, Execution, Measured, resolve
from vitscore.plan.options import RunOptions, make_options
from vitscore.rundir.parts import ModelColumns
from vitscore.shards.labels import LabelRule, load_labels
from vitscore.shards.locate import locate
from vitscore.shards.preview import look
from vitscore.shards.reasons import UNREACHABLE, reason_kind
from vitscore.shards.remote.cache import Cache
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Corpus, Shard, corpus_names


@dataclass(frozen=True)
class PlannedModel:
    """One model of a run: its checkpoint, and the mapping of its outputs to the data set's classes."""

    name: str
    checkpoint: Checkpoint
    fingerprint: str
    head: HeadMap | None
    """None for a zero-shot model, whose head is made from the classes."""


@dataclass(frozen=True)
class Plan:
    """Every decision of a run, as all ranks use it."""

    options: RunOptions
    shards: tuple[Shard, ...]
    last_rows: int | None
    """Under --limit: the number of samples to score in the last shard; None for all."""
    classes: tuple[str, ...]
    classes_source: str
    templates: tuple[str, ...]
    models: tuple[PlannedModel, ...]
    choices: Choices
    identity: Mapping[str, Any]
    overrides: Mapping[str, str | int] | None = field(default=None, repr=False)
    """Labels by key, from `--labels`."""
    groups: Groups | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict, repr=False)
    """Choices measured at this start on this rank's GPU (see `engine.cuda_choices`)."""

    @property
    def identity_hash(self) -> str:
        return identity.digest(self.identity)

    def num_rows(self, position: int, num_samples: int) -> int:
        """Return how many of a shard's samples to score; `position` is the shard's index in `shards`."""
        if self.last_rows is not None and position == len(self.shards) - 1:
            return min(num_samples, self.last_rows)
        return num_samples

    def to_record(self) -> dict[str, Any]:
        """Return the plan as JSON for the joining ranks.

        It contains the shards' paths, which may hold credentials, so it must not be written to a file.
        """
        return {
            "options": self.options.to_record(),
            "shards": [[shard.ordinal, shard.name, shard.path, shard.num_bytes, shard.etag] for shard in self.shards],
            "last_rows": self.last_rows,
            "classes": self.classes,
            "classes_source": self.classes_source,
            "templates": self.templates,
            "models": [
                {
                    "name": model.name,
                    "source": model.checkpoint.source,
                    "fingerprint": model.fingerprint,
                    "head": vars(model.head) if model.head else None,
                }
                for model in self.models
            ],
            "choices": self.choices.to_record(),
            "identity": self.identity,
            "groups": self.groups.to_record() if self.groups else None,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """Build the plan from rank 0's record; only checkpoints and the labels file are read on this machine.

        Raises:
            VitscoreError: a checkpoint or the labels file cannot be read here.
        """
        options = make_options(record["options"])
        return cls(
            options=options,
            shards=tuple(Shard(*values) for values in record["shards"]),
            last_rows=record["last_rows"],
            classes=tuple(record["classes"]),
            classes_source=record["classes_source"],
            templates=tuple(record["templates"]),
            models=tuple(
                PlannedModel(
                    model["name"],
                    checkpoints.find(model["source"]),
                    model["fingerprint"],
                    HeadMap(**{**model["head"], "columns": tuple(map(tuple, model["head"]["columns"]))})
                    if model["head"]
                    else None,
                )
                for model in record["models"]
            ),
            choices=Choices.from_record(record["choices"]),
            identity=record["identity"],
            overrides=load_labels(options.labels) if options.labels else None,
            groups=Groups.from_record(record),
        )

    def execution(self, *, local_rank: int = 0, local_world_size: int = 1) -> Execution:
        """Return the device and threads of a rank; see `Execution.of`."""
        return Execution.of(
            self.choices,
            decode_threads=self.options.decode_threads,
            local_rank=local_rank,
            local_world_size=local_world_size,
        )

    def label_rule(self) -> LabelRule:
        return LabelRule(self.classes, label_key=self.options.label_key, overrides=self.overrides)

    def columns(self, embedding_dims: Mapping[str, int]) -> list[ModelColumns]:
        num_logits = len(self.classes) if "logits" in self.options.save else 0
        keeps_embeddings = "embeddings" in self.options.save
        full = [
            ModelColumns(
                name=model.name,
                top_k=self.choices.top_k,
                num_logits=num_logits,
                num_embedding=embedding_dims[model.name] if keeps_embeddings else 0,
            )
            for model in self.models
        ]
        names = [cell_name(text) for text in self.options.cells]
        return full + [ModelColumns(f"{own.name}@{name}", top_k=1, is_brief=True) for name in names for own in full]

    def conditions(self) -> tuple[Condition, ...]:
        """Return the conditions to score every image under: `--augment` (or no change), then every cell of the grid."""
        recipe = tuple(operators.parse(text) for text in self.options.augment)
        cells = {cell_name(text): operators.parse(text) for text in self.options.cells}
        first = Condition("", recipe)
        return (first, *(Condition(f"@{name}", (*recipe, operator)) for name, operator in cells.items()))


def make_plan(options: RunOptions, *, kept: Mapping[str, Any]) -> Plan:
    """Make the plan of a run, without writing anything.

    Args:
        options: the options of the run.
        kept: automatic choices of an earlier start of this run, by name (empty on the first start).

    Raises:
        VitscoreError: an error in shards, models or classes that can be detected before the first image.
    """
    named = checkpoints.parse_models(options.model)
    corpus = locate(options.shards, split=options.split, allow_pipe=options.allow_pipe, has_remote_sizes=True)
    checkpoint_of = {name: checkpoints.find(source) for name, source in named.items()}
    for checkpoint in checkpoint_of.values():
        checkpoints.require_loadable(checkpoint)
    head_names = {
        name: checkpoint.id2label for name, checkpoint in checkpoint_of.items() if checkpoint.kind == "classifier"
    }
    class_names, classes_source = resolve_class_names(options, corpus, head_names)
    label_maps = classes.parse_label_maps(options.label_map, checkpoint_of)
    templates = resolve_templates(options, corpus)
    models = tuple(
        PlannedModel(
            name=name,
            checkpoint=checkpoint,
            fingerprint=checkpoints.fingerprint(checkpoint),
            head=match(name, checkpoint, class_names, label_maps.get(name)),
        )
        for name, checkpoint in checkpoint_of.items()
    )
    choices = resolve(
        options,
        pixels_per_image=max(checkpoints.input_pixels(checkpoint) for checkpoint in checkpoint_of.values()),
        num_classes=len(class_names),
        kept=kept,
        preview=lambda: look(corpus.shards),
    )
    shards, last_rows = cut_to_limit(options, corpus, class_names)
    groups = read_groups(options.groups, class_names) if options.groups else None
    return Plan(
        options=options,
        shards=shards,
        last_rows=last_rows,
        classes=class_names,
        classes_source=classes_source,
        templates=templates,
        models=models,
        choices=choices,
        overrides=load_labels(options.labels) if options.labels else None,
        groups=groups,
        identity=run_identity(options, shards, class_names, templates, models, choices, groups),
    )


def resolve_class_names(
    options: RunOptions, corpus: Corpus, head_names: Mapping[str, tuple[str, ...] | None]
) -> tuple[tuple[str, ...], str]:
    """Return the class names and their source: `--classes`, else the side file, else the models' own names."""
    explicit = (classes.read_classes(options.classes), str(options.classes)) if options.classes else None
    side_file = (corpus.classes, corpus.classes_source or "side file") if corpus.classes else None
    return classes.resolve_classes(explicit, side_file, head_names)


def resolve_templates(options: RunOptions, corpus: Corpus) -> tuple[str, ...]:
    """Return the templates: `--templates`, else the side file, else the default."""
    if options.templates:
        return zeroshot.read_templates(options.templates)
    if corpus.templates:
        return zeroshot.check_templates(corpus.templates, where=corpus.templates_source or "side file")
    return zeroshot.DEFAULT_TEMPLATES


def match(name: str, checkpoint: Checkpoint, class_names: tuple[str, ...], label_map: Any) -> HeadMap | None:
    """Return the head's columns for the data set's classes; None for a zero-shot model."""
    if checkpoint.kind == "zero-shot":
        return None
    return classes.match_head(
        checkpoint.id2label, class_names, label_map=label_map, num_outputs=checkpoint.num_labels, model=name
    )


def cut_to_limit(
    options: RunOptions, corpus: Corpus, class_names: tuple[str, ...]
) -> tuple[tuple[Shard, ...], int | None]:
    """Return the first shards that hold `--limit` samples, and the samples to score in the last one.

    Only these shards are opened.

    Raises:
        SetupError: one of them cannot be reached, so the first samples are unknown.
    """
    if options.limit is None:
        return corpus.shards, None
    left = options.limit
    rule = LabelRule(class_names, label_key=options.label_key)
    cache = Cache(options.cache_dir, size=1)
    for count, shard in enumerate(corpus.shards, start=1):
        with OpenShard(shard, image_key=options.image_key, labels=rule, cache=cache) as opened:
            if opened.fault is not None and reason_kind(opened.fault) == UNREACHABLE:
                raise SetupError(
                    "shard cannot be reached",
                    where=shard.name,
                    expected="every shard that --limit covers",
                    got=opened.fault,
                    next_step="Try again later.",
                )
            if opened.num_samples >= left:
                return corpus.shards[:count], left
            left -= opened.num_samples
    return corpus.shards, None


def run_identity(
    options: RunOptions,
    shards: tuple[Shard, ...],
    class_names: tuple[str, ...],
    templates: tuple[str, ...],
    models: tuple[PlannedModel, ...],
    choices: Choices,
    groups: Groups | None,
) -> dict[str, Any]:
    """Return the run's identity: the values that must be equal for a resume."""
    has_zero_shot = any(model.checkpoint.kind == "zero-shot" for model in models)
    return {
        "corpus": {
            "shards": len(shards),
            "fingerprint": identity.corpus_fingerprint(
                corpus_names(shards), [shard.num_bytes for shard in shards], [shard.etag for shard in shards]
            ),
        },
        "models": {
            model.name: {
                "checkpoint": model.fingerprint,
                "label_map": identity.digest([list(ids) for ids in model.head.columns]) if model.head else None,
            }
            for model in models
        },
        "model_order": [model.name for model in models],
        "classes": identity.digest(list(class_names)),
        "templates": identity.digest(list(templates)) if has_zero_shot else None,
        "labels": identity.digest_file(options.labels) if options.labels else None,
        **({"groups": identity.digest(groups.to_record())} if groups else {}),
        **{name: choice.value for name, choice in choices.all().items()},
        "label_key": options.label_key,
        "image_key": options.image_key,
        "max_pixels": options.max_pixels,
        "limit": options.limit,
        "save": sorted(options.save),
        "on_bad_sample": options.on_bad_sample,
        "on_bad_shard": options.on_bad_shard,
        **pixels_identity(options),
    }


def pixels_identity(options: RunOptions) -> dict[str, Any]:
    """Return the identity's keys for changes of the images; none without changes, as in older runs."""
    keys: dict[str, Any] = {"tta": options.tta} if options.tta != "none" else {}
    if options.augment:
        keys["augment"] = [str(operators.parse(text)) for text in options.augment]
    if options.cells:
        keys["cells"] = {cell_name(text): str(operators.parse(text)) for text in options.cells}
    if options.augment or options.cells:
        keys["augment_seed"] = options.augment_seed
    return keys


def require_labels_file(options: RunOptions) -> None:
    """Raise UsageError if a file named by an option is missing."""
    files = {
        "--classes": options.classes,
        "--templates": options.templates,
        "--labels": options.labels,
        "--groups": options.groups,
    }
    for flag, path in files.items():
        if path is not None and not path.is_file():
            raise UsageError("file not found", where=f"{flag} {path}", next_step="Check the path.")


def known_bytes(plan: Plan) -> int | None:
    """Return the bytes of all shards; None if the size of one is unknown."""
    sizes = [shard.num_bytes for shard in plan.shards]
    return None if None in sizes else sum(size for size in sizes if size is not None)
