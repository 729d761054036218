"""Write and read tars of samples; locations and names of the demo's digits."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEMO_SHARDS = ROOT / "vitscore" / "demo" / "shards"
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Sample = tuple[str, Mapping[str, bytes]]
Member = tuple[str, bytes]


def write_tar(path: Path, samples: Sequence[Sample]) -> Path:
    """Write a tar of samples: (key, {extension: content})."""
    members = [(f"{key}.{extension}", data) for key, parts in samples for extension, data in parts.items()]
    return write_members(path, members)


def write_members(path: Path, members: Sequence[Member], *, mode: str = "w", **options: int) -> Path:
    """Write a tar of members: (name, content); `mode` and `options` are `tarfile.open`'s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read_tar(path: Path) -> list[Sample]:
    """Read the samples of a tar whose members are adjacent."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return list(samples.items())
