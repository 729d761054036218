"""Making shards from every source: contents are preserved, and the bytes are always the same, even after a kill."""

import csv
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitscore.errors import DataError, LabelError, OtherRunError, SetupError, UsageError
from vitscore.shards.labels import LabelRule
from vitscore.shards.locate import locate
from vitscore.shards.making.make import make_shards, read_source
from vitscore.shards.making.sources import Sample, Source
from vitscore.shards.samples import OpenShard

Row = tuple[str, bytes | None, int]


def image_bytes(seed: int, kind: str = "PNG", side: int = 6) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind)
    return stream.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def photo_folder(root: Path, per_class: int = 5) -> Path:
    classes = ("dog", "cat", "a bird")
    names = [f"{name}/{n}.png" for name in classes for n in range(per_class)]
    return write_files(root, {name: image_bytes(seed) for seed, name in enumerate(names)})


def rows_in(folder: Path) -> list[Row]:
    """Read back (key, image, label) of every sample, as a run does."""
    corpus = locate([str(folder)])
    rows: list[Row] = []
    for shard in corpus.shards:
        with OpenShard(shard, labels=LabelRule(corpus.classes)) as opened:
            assert opened.fault is None
            block = opened.read(0, opened.num_samples)
        assert block.reasons == [None] * len(block)
        images = [None if image is None else image.tobytes() for image in block.images]
        rows += zip(block.keys, images, block.labels.tolist(), strict=True)
    return rows


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_an_image_folder_is_copied_byte_for_byte(tmp_path: Path) -> None:
    files = {
        "dog/b.v2.png": image_bytes(1),
        "dog/b_v2.jpg": image_bytes(2, "JPEG"),
        "dog/deep/c.JPEG": image_bytes(3, "JPEG"),
        "cat/1.png": image_bytes(4),
        "__odd__/1.png": image_bytes(5),
        "caf\u00e9/\u732b.png": image_bytes(6),
        f"cat/{'long' * 50}.png": image_bytes(7),
    }
    source = write_files(tmp_path / "photos", {**files, "dog/notes.txt": b"x", "loose.png": b"x", "dog/.x.png": b"x"})
    made = make_shards(read_source(str(source)), str(tmp_path / "out"), workers=1)
    classes = ["__odd__", "caf\u00e9", "cat", "dog"]
    assert (tmp_path / "out/classes.txt").read_text().split("\n")[:-1] == sorted(classes)
    assert rows_in(tmp_path / "out") == [
        ("_odd__/1", files["__odd__/1.png"], 0),
        ("caf\u00e9/\u732b", files["caf\u00e9/\u732b.png"], 1),
        ("cat/1", files["cat/1.png"], 2),
        (f"cat/{'long' * 50}", files[f"cat/{'long' * 50}.png"], 2),
        ("dog/b_v2", files["dog/b.v2.png"], 3),
        ("dog/b_v2-2", files["dog/b_v2.jpg"], 3),
        ("dog/deep/c", files["dog/deep/c.JPEG"], 3),
    ]
    assert made.notes == ("1 files that are not images were skipped", "1 images outside class folders were skipped")
    assert (made.num_samples, made.num_shards, made.num_classes) == (7, 1, 4)


def test_class_ids_are_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    source = photo_folder(tmp_path / "photos")
    oracle = ImageFolder(str(source))
    made = read_source(str(source))
    assert made.classes == tuple(oracle.classes)
    assert [sample.label for sample in made.samples] == oracle.targets


def test_classes_may_be_given_in_another_order(tmp_path: Path) -> None:
    source = photo_folder(tmp_path / "photos", 1)
    assert [s.label for s in read_source(str(source), classes=["dog", "x", "cat", "a bird"]).samples] == [3, 2, 0]
    with pytest.raises(LabelError, match="folder is not a class"):
        read_source(str(source), classes=["dog"])


def test_a_folder_of_loose_images_is_unlabelled(tmp_path: Path) -> None:
    source = write_files(tmp_path / "photos", {"b.png": image_bytes(1), "a.png": image_bytes(2)})
    make_shards(read_source(str(source)), str(tmp_path / "out"), workers=1)
    assert [(key, label) for key, _, label in rows_in(tmp_path / "out")] == [("a", -1), ("b", -1)]
    assert not (tmp_path / "out/classes.txt").exists()


def test_bytes_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = photo_folder(tmp_path / "photos")
    for name, workers in (("one", 1), ("two", 2), ("again", 1)):
        made = make_shards(read_source(str(source)), str(tmp_path / name), per_shard=4, workers=workers)
        assert made.num_shards == 4
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "again")
    assert [len(rows_in(tmp_path / "one"))] == [15]


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    source = write_files(tmp_path / "photos", {f"c/{n}.png": os.urandom(9_000 + 100 * n) for n in range(20)})
    write_files(source, {"c/7x.png": os.urandom(90_000)})
    make_shards(read_source(str(source)), str(tmp_path / "out"), shard_bytes=50_000, workers=1)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    too_large = [path for path in shards if path.stat().st_size > 50_000]
    assert len(shards) > 4
    assert len(too_large) == 1
    assert len(rows_in(tmp_path / "out")) == 21


def test_shuffling_is_by_seed(tmp_path: Path) -> None:
    source = photo_folder(tmp_path / "photos")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_shards(read_source(str(source)), str(tmp_path / name), shuffle=seed, workers=1)
    rows = {name: rows_in(tmp_path / name) for name in "abc"}
    assert rows["a"] == rows["b"] != rows["c"]
    assert sorted(rows["a"]) == sorted(rows["c"])  # type: ignore[type-var]


def test_a_csv_names_images_and_labels(tmp_path: Path) -> None:
    write_files(tmp_path, {"x/1.png": image_bytes(1), "x/2.png": image_bytes(2), "3.png": image_bytes(3)})
    with open(tmp_path / "list.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["path", "label"], ["x/1.png", "dog"], ["x/2.png", "cat"], ["./3.png", ""]])
    source = read_source(str(tmp_path / "list.csv"))
    assert source.classes == ("cat", "dog")
    make_shards(source, str(tmp_path / "out"), workers=1)
    assert [(key, label) for key, _, label in rows_in(tmp_path / "out")] == [("x/1", 1), ("x/2", 0), ("3", -1)]


@pytest.mark.parametrize(
    ("text", "classes", "labels"),
    [("1.png,5\n", None, [5]), ("1.png,1\n", ["a", "b"], [1]), ("1.png,b\n1.png,0\n", ["a", "b"], [1, 0])],
)
def test_a_csvs_labels_are_ids_or_names(
    tmp_path: Path, text: str, classes: list[str] | None, labels: list[int]
) -> None:
    write_files(tmp_path, {"1.png": image_bytes(1), "list.csv": text.encode()})
    source = read_source(str(tmp_path / "list.csv"), classes=classes)
    assert [sample.label for sample in source.samples] == labels
    assert source.classes == (tuple(classes) if classes else None)


@pytest.mark.parametrize(
    ("text", "classes", "error"),
    [
        ("2.png,a\n", None, "no such image: .*line 1"),
        ("1.png\n", None, "row has fewer than two columns: .*line 1"),
        ("path,label\n1.png,a\n1.png,c\n", ["a"], "label is not a class: 'c': .*line 3"),
        ("1.png,7\n", ["a"], "label out of range"),
        ("path,label\n", None, "no rows"),
    ],
)
def test_bad_rows_of_a_csv_are_named(tmp_path: Path, text: str, classes: list[str] | None, error: str) -> None:
    write_files(tmp_path, {"1.png": image_bytes(1), "list.csv": text.encode()})
    with pytest.raises((DataError, UsageError), match=error):
        read_source(str(tmp_path / "list.csv"), classes=classes)


def cifar_10(folder: Path, num_images: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Write CIFAR-10's test set in the official binary format: a label byte, then red, green and blue planes."""
    rng = np.random.default_rng(0)
    images_NHWC = rng.integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, num_images, dtype=np.uint8)
    records = np.concatenate([labels[:, None], images_NHWC.transpose(0, 3, 1, 2).reshape(num_images, -1)], axis=1)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    write_files(folder, {"test_batch.bin": records.tobytes(), "batches.meta.txt": ("\n".join(names) + "\n\n").encode()})
    return images_NHWC, labels


def pixels_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(image or b""))) for _, image, _ in rows_in(folder)])


def test_cifar_10_is_read_back_pixel_for_pixel(tmp_path: Path) -> None:
    images_NHWC, labels = cifar_10(tmp_path / "cifar-10-batches-bin")
    for source in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        out = tmp_path / f"out-{source.name}"
        make_shards(read_source(str(source)), str(out), per_shard=8, workers=2)
        assert np.array_equal(pixels_in(out), images_NHWC)
        assert [label for _, _, label in rows_in(out)] == labels.tolist()
        assert rows_in(out)[0][0] == "test_batch/00000"
        assert (out / "classes.txt").read_text().split()[9] == "truck"


@pytest.mark.parametrize("coarse", [False, True])
def test_cifar_100_has_coarse_and_fine_labels(tmp_path: Path, coarse: bool) -> None:
    rng = np.random.default_rng(0)
    images_NHWC = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.stack([rng.integers(0, 20, 20), rng.integers(0, 100, 20)], axis=1).astype(np.uint8)
    records = np.concatenate([labels, images_NHWC.transpose(0, 3, 1, 2).reshape(20, -1)], axis=1)
    names = {
        "fine_label_names.txt": "".join(f"fine{n}\n" for n in range(100)).encode(),
        "coarse_label_names.txt": "".join(f"coarse{n}\n" for n in range(20)).encode(),
    }
    write_files(tmp_path / "cifar-100-binary", {"train.bin": records.tobytes(), **names})
    source = read_source(str(tmp_path), split="train", coarse=coarse)
    make_shards(source, str(tmp_path / "out"), workers=1)
    assert np.array_equal(pixels_in(tmp_path / "out"), images_NHWC)
    assert [label for _, _, label in rows_in(tmp_path / "out")] == labels[:, 0 if coarse else 1].tolist()


def test_damaged_cifar_batches_are_named(tmp_path: Path) -> None:
    cifar_10(tmp_path)
    with pytest.raises(DataError, match=r"cannot read the batch: .*data_batch_1.bin"):
        read_source(str(tmp_path), split="train")
    data = (tmp_path / "test_batch.bin").read_bytes()
    (tmp_path / "test_batch.bin").write_bytes(data[:-1])
    with pytest.raises(DataError, match="batch is truncated"):
        read_source(str(tmp_path))
    (tmp_path / "test_batch.bin").write_bytes(data[:3073] + b"\x0b" + data[3074:])
    with pytest.raises(DataError, match=r"label out of range: .*record 1 - expected 0..9, got 11"):
        read_source(str(tmp_path))


class Trap:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-100-python"])
def test_tampered_python_batches_are_refused_unread(tmp_path: Path, folder: str) -> None:
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta", "train", "test", "meta"]
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    write_files(tmp_path / folder, dict.fromkeys(names, trap))
    with pytest.raises(DataError, match="python batches refused"):
        read_source(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_python_batches_give_the_binary_batches_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pickles and torchvision's real reader; only its published checksums are replaced by theirs."""
    from torchvision.datasets import CIFAR10

    images_NHWC, labels = cifar_10(tmp_path / "cifar-10-batches-bin")
    names = (tmp_path / "cifar-10-batches-bin/batches.meta.txt").read_text().split()
    batch = {"data": images_NHWC.transpose(0, 3, 1, 2).reshape(len(labels), -1), "labels": labels.tolist()}
    files = {"test_batch": pickle.dumps(batch), "batches.meta": pickle.dumps({"label_names": names})}
    write_files(tmp_path / "py/cifar-10-batches-py", files)
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    make_shards(read_source(str(tmp_path / "cifar-10-batches-bin")), str(tmp_path / "a"), workers=1)
    make_shards(read_source(str(tmp_path / "py")), str(tmp_path / "b"), workers=1)
    assert rows_in(tmp_path / "a") == rows_in(tmp_path / "b")


def test_making_the_same_shards_again_writes_only_missing_ones(tmp_path: Path) -> None:
    source = read_source(str(photo_folder(tmp_path / "photos")))
    out = tmp_path / "out"
    make_shards(source, str(out), per_shard=4, workers=1)
    before = digests(out)
    (out / "shard-000002.tar").unlink()
    (out / ".shard-000002.tar.host.1.tmp").write_bytes(b"half")
    advanced: list[int] = []
    made = make_shards(source, str(out), per_shard=4, workers=1, on_shard=advanced.append)
    assert (made.num_already_there, sum(advanced)) == (3, 15)
    assert digests(out) == before


def test_a_different_plan_is_refused_with_its_differences(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    out = tmp_path / "out"
    make_shards(read_source(str(photos)), str(out), per_shard=2, workers=1)
    with pytest.raises(OtherRunError, match="shards 8 instead of 4; per shard 2 instead of 4"):
        make_shards(read_source(str(photos)), str(out), per_shard=4, workers=1)
    (photos / "cat/1.png").write_bytes(image_bytes(77, side=9))
    with pytest.raises(OtherRunError, match="got other images or labels"):
        make_shards(read_source(str(photos)), str(out), per_shard=2, workers=1)
    make_shards(read_source(str(photos)), str(out), per_shard=4, workers=1, overwrite=True)
    assert len(list(out.glob("*.tar"))) == 4


def test_foreign_shards_are_never_touched(tmp_path: Path) -> None:
    photos = read_source(str(photo_folder(tmp_path / "photos")))
    out = write_files(tmp_path / "out", {"mine.tar": b"precious"})
    with pytest.raises(OtherRunError, match=r"not made here: .*got mine.tar"):
        make_shards(photos, str(out), workers=1, overwrite=True)
    assert digests(out).keys() == {"mine.tar"}


def test_an_image_that_vanishes_is_one_line_and_leaves_no_half_shard(tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    source = read_source(str(photos))
    (photos / "cat/3.png").unlink()
    for workers in (1, 2):
        with pytest.raises(DataError, match="cannot read the image: cat/3"):
            make_shards(source, str(tmp_path / f"out{workers}"), per_shard=8, workers=workers)
        assert not list((tmp_path / f"out{workers}").glob(".*"))
        assert not (tmp_path / f"out{workers}/shard-000001.tar").exists()


def test_a_folder_that_cannot_be_made_is_a_setup_error(tmp_path: Path) -> None:
    source = Source(
        "csv", [Sample("k", "png", read_source(str(photo_folder(tmp_path / "p"))).samples[0].image, 0)], None
    )
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SetupError, match="cannot create the folder"):
        make_shards(source, str(tmp_path / "file/out"), workers=1)


MAKING = """
import sys, time
from vitscore.shards.making import make
if __name__ == "__main__":
    def slowly(num_samples):
        print(num_samples, flush=True)
        time.sleep(0.2)
    make.make_shards(make.read_source(sys.argv[1]), sys.argv[2], per_shard=3, workers=int(sys.argv[3]), on_shard=slowly)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_making_resumes_to_the_same_bytes(tmp_path: Path, workers: int) -> None:
    photos = photo_folder(tmp_path / "photos", per_class=40)
    script = tmp_path / "making.py"
    script.write_text(MAKING)
    out = tmp_path / "out"
    command = [sys.executable, str(script), str(photos), str(out), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as making:
        assert making.stdout is not None
        for _ in range(2):
            making.stdout.readline()
        making.send_signal(signal.SIGKILL)
    wait_until_quiet(out)
    there = len(list(out.glob("*.tar")))
    assert 2 <= there <= 40
    made = make_shards(read_source(str(photos)), str(out), per_shard=3, workers=1)
    assert made.num_already_there == there
    make_shards(read_source(str(photos)), str(tmp_path / "undisturbed"), per_shard=3, workers=1)
    assert digests(out) == digests(tmp_path / "undisturbed")


def wait_until_quiet(folder: Path) -> None:
    """Wait until the writers, which exit soon after their parent, have stopped changing the folder."""
    before: list[str] = []
    for _ in range(50):
        now = sorted(os.listdir(folder))
        if now == before:
            return
        before = now
        time.sleep(0.5)
