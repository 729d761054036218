"""The fixed vocabulary of reasons why a sample or a shard is bad.

A reason is one of these constants, optionally followed by `": "` and details. The ledger counts reasons by constant and
ignores the details. Reasons are values, not exceptions: a bad sample is a row, a bad shard an entry in the ledger.

Parts store reasons with their details, and `metrics --check` compares both with those of the shards. So rewording the
details of a shard's or a label's reason makes the check refuse folders of older versions.
"""

from __future__ import annotations

# A sample, before its image is decoded.
NO_IMAGE = "no image"
EMPTY_IMAGE = "empty image"
DUPLICATE_KEY = "duplicate key"
TRUNCATED = "truncated"
SPARSE_MEMBER = "sparse member"
READ_ERROR = "read error"

# A sample's label.
LABEL_OUT_OF_RANGE = "label out of range"
LABEL_UNKNOWN = "label is not a class"
LABEL_AMBIGUOUS = "label is ambiguous"
LABEL_UNREADABLE = "label unreadable"

# A sample's image, while it is decoded.
UNDECODABLE_IMAGE = "undecodable image"
TRUNCATED_IMAGE = "truncated image"
IMAGE_TOO_LARGE = "image too large"

# A sample's predictions.
NONFINITE_LOGITS = "logits not finite"

LABEL_REASONS = frozenset({LABEL_OUT_OF_RANGE, LABEL_UNKNOWN, LABEL_AMBIGUOUS, LABEL_UNREADABLE})

# A shard. `TRUNCATED` and `READ_ERROR` serve here too.
MISSING = "missing"
EMPTY_FILE = "empty file"
NOT_A_TAR = "not a tar"
DAMAGED = "damaged"
UNREACHABLE = "unreachable"

SAMPLE_REASONS = LABEL_REASONS | frozenset(
    {
        NO_IMAGE,
        EMPTY_IMAGE,
        DUPLICATE_KEY,
        TRUNCATED,
        SPARSE_MEMBER,
        READ_ERROR,
        UNDECODABLE_IMAGE,
        TRUNCATED_IMAGE,
        IMAGE_TOO_LARGE,
        NONFINITE_LOGITS,
    }
)
SHARD_REASONS = frozenset({MISSING, EMPTY_FILE, NOT_A_TAR, TRUNCATED, DAMAGED, READ_ERROR, UNREACHABLE})


def with_details(reason: str, details: str) -> str:
    """Return `reason: details`, with the details on one line and cut to 200 characters."""
    line = " ".join(details.split())
    return f"{reason}: {line[:200]}" if line else reason


def reason_kind(reason: str) -> str:
    """Return the constant that a reason starts with, without its details."""
    return reason.split(": ", 1)[0]
