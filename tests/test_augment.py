"""Operators, compared with other implementations and DALI with NumPy; random bits that do not depend on the batch."""

import colorsys
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from sklearn.datasets import load_sample_images

from vitscore.augment import operators, plain, seeds, tables
from vitscore.augment.conditions import Condition
from vitscore.augment.operators import OPERATORS, SEVERITIES, Augmentation
from vitscore.augment.stage import Stage
from vitscore.decode.pixels import Decoded, is_dali_available
from vitscore.errors import UsageError
from vitscore.preprocess import Geometry

SIZE = (224, 256)
CELLS = [(operator, severity) for operator in OPERATORS.values() for severity in SEVERITIES]
WORDS = seeds.sample_words(0, [("a.tar", str(number)) for number in range(3)])
HALF_A_LEVEL = 0.5 + 1e-3


def picture(size: tuple[int, int], which: int = 0) -> np.ndarray:
    whole = Image.fromarray(load_sample_images().images[which])
    return np.array(whole.resize(size[::-1], Image.Resampling.LANCZOS))


PHOTO, SMALL = picture(SIZE), picture((24, 28), 1)


def carried_out(
    kind: Any, images: np.ndarray, cells: Any = CELLS, *, device_id: int | None = None
) -> dict[str, np.ndarray]:
    """Return every cell from one of the two implementations."""
    conditions = [Condition(f"{operator.name}:{level}", (operator.at(level),)) for operator, level in cells]
    geometry = Geometry("exact", images.shape[1:3], "bilinear")
    stage = Stage(conditions, kind, [geometry], batch_size=len(images), num_threads=2, device_id=device_id)
    pixels = torch.from_numpy(images).to("cpu" if device_id is None else f"cuda:{device_id}")
    results = stage.apply(Decoded((pixels,)), WORDS[: len(images)])
    return {condition.name: decoded.pixels[0].cpu().numpy() for condition, decoded in results}


@pytest.fixture(scope="module")
def by_both() -> dict[str, dict[str, np.ndarray]]:
    noise = np.random.default_rng(0).integers(0, 256, PHOTO.shape, np.uint8)
    images = np.stack([PHOTO, noise, np.zeros_like(PHOTO)])
    return {kind: carried_out(kind, images) for kind in ("dali", "torchvision")}


@pytest.mark.parametrize("name", OPERATORS)
def test_dali_and_numpy_agree_within_a_level(name: str, by_both: Any) -> None:
    for severity in SEVERITIES:
        ours, theirs = (by_both[kind][f"{name}:{severity}"].astype(int) for kind in ("dali", "torchvision"))
        away = np.abs(ours - theirs)
        assert away.max() <= 1
        assert (away > 0).mean() < (0.03 if name in ("rotate", "zoom") else 1e-3)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_higher_severity_changes_the_picture_more(name: str, by_both: Any) -> None:
    away = [np.abs(by_both["dali"][f"{name}:{level}"][0].astype(int) - PHOTO).mean() for level in SEVERITIES]
    assert away[0] > 0.2
    if name != "saturation":  # its third level is a gain, not a loss
        assert away == sorted(away)


def hsv_reference(change: Callable[[float, float, float], tuple[float, float, float]]) -> np.ndarray:
    """Change HSV values pixel by pixel with the standard library."""
    flat = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(pixel / 255)))) for pixel in SMALL.reshape(-1, 3)]
    return 255 * np.array(flat).reshape(SMALL.shape)


def disk_of_the_benchmark(radius: int, alias: float) -> np.ndarray:
    """`disk` of ImageNet-C's corruptions.py, with SciPy for OpenCV's GaussianBlur."""
    reach, half = (8, 1) if radius <= 8 else (radius, 2)
    x, y = np.meshgrid(*(np.arange(-reach, reach + 1),) * 2)
    disk = ((x**2 + y**2) <= radius**2).astype(float)
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / alias) ** 2)
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights / weights.sum(), axis=axis, mode="mirror")
    return disk / disk.sum()


def reference(name: str, *values: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a picture and the operator's result from another implementation."""
    if name == "brightness":
        return SMALL, hsv_reference(lambda h, s, v: (h, s, min(v + values[0], 1)))
    if name == "saturation":
        return SMALL, hsv_reference(lambda h, s, v: (h, min(max(s * values[0] + values[1], 0), 1), v))
    pixels = PHOTO.astype(float)
    if name == "contrast":
        mean = pixels.mean(axis=(0, 1))
        return PHOTO, (pixels - mean) * values[0] + mean
    if name == "gaussian_blur":
        return PHOTO, ndimage.gaussian_filter(pixels, (values[0], values[0], 0), mode="nearest")
    if name == "jpeg_compression":
        file = io.BytesIO()
        Image.fromarray(PHOTO).save(file, "JPEG", quality=int(values[0]))
        return PHOTO, np.asarray(Image.open(file)).astype(float)
    assert name == "pixelate"
    small = Image.fromarray(PHOTO).resize([int(side * values[0]) for side in SIZE[::-1]], Image.Resampling.BOX)
    return PHOTO, np.asarray(small.resize(SIZE[::-1], Image.Resampling.BOX)).astype(float)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("brightness", HALF_A_LEVEL),
        ("saturation", HALF_A_LEVEL),
        ("contrast", HALF_A_LEVEL),
        ("gaussian_blur", HALF_A_LEVEL),
        ("jpeg_compression", 0),
        ("pixelate", 1),
    ],
)
def test_an_operator_is_the_benchmarks(name: str, tolerance: float, severity: int) -> None:
    step = OPERATORS[name].at(severity)
    image, expected = reference(name, *step.values)
    for kind in ("dali", "torchvision"):
        changed = carried_out(kind, image[None], [(OPERATORS[name], severity)])[f"{name}:{severity}"][0]
        assert np.abs(changed - np.clip(expected, 0, 255)).max() <= tolerance


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_is_the_benchmarks_within_a_level(severity: int) -> None:
    step = OPERATORS["defocus_blur"].at(severity)
    image = PHOTO[:, : SIZE[0]]
    kernel = disk_of_the_benchmark(int(step.values[0]), step.values[1])
    planes = [ndimage.correlate(image[..., channel].astype(float), kernel, mode="mirror") for channel in range(3)]
    away = np.abs(plain.augment(image, step, WORDS[0]) - np.stack(planes, axis=2))
    assert away.mean() < 1.0


@pytest.mark.parametrize("severity", SEVERITIES)
def test_rotate_and_zoom_are_pillows_away_from_the_border(severity: int) -> None:
    image, middle = Image.fromarray(PHOTO), (slice(60, 160), slice(70, 180))
    turned = plain.augment(PHOTO, OPERATORS["rotate"].at(severity), WORDS[0])
    angle = OPERATORS["rotate"].levels[severity - 1][0]
    away = np.abs(turned.astype(int) - np.asarray(image.rotate(angle, Image.Resampling.BILINEAR)))[middle]
    assert away.max() <= 1  # Pillow truncates decimals
    factor = OPERATORS["zoom"].levels[severity - 1][0]
    shown = [side / factor for side in image.size]
    box = [(side - seen) / 2 for side, seen in zip(image.size, shown, strict=True)]
    enlarged = image.resize(image.size, Image.Resampling.BILINEAR, box=(*box, box[0] + shown[0], box[1] + shown[1]))
    away = np.abs(plain.augment(PHOTO, OPERATORS["zoom"].at(severity), WORDS[0]).astype(int) - np.asarray(enlarged))
    assert away[2:-2, 2:-2].max() <= 2


@pytest.mark.parametrize("severity", SEVERITIES)
def test_hue_turns_colours_and_leaves_grey(severity: int) -> None:
    step = OPERATORS["hue"].at(severity)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.abs(plain.augment(grey, step, WORDS[0]).astype(int) - grey).max() <= 1
    turn = np.exp(-1j * np.deg2rad(step.values[0]))
    expected = []
    for pixel in SMALL.reshape(-1, 3) / 255:
        y, i, q = colorsys.rgb_to_yiq(*pixel)
        colour = (i + 1j * q) * turn
        expected.append(colorsys.yiq_to_rgb(y, colour.real, colour.imag))  # its coefficients have two digits
    away = np.abs(plain.augment(SMALL, step, WORDS[0]) - 255 * np.array(expected).reshape(SMALL.shape))
    assert away.mean() < 2


def flat(level: int) -> np.ndarray:
    return np.full((300, 300, 3), level, np.uint8)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_is_normal(severity: int) -> None:
    step = OPERATORS["gaussian_noise"].at(severity)
    sigma = 255 * step.values[0]
    drawn = plain.augment(flat(128), step, WORDS[0]).ravel().astype(float) - 128
    edges = np.arange(-100, 101, 10.0) + 0.5
    shares = np.array([(drawn < edge).mean() for edge in edges])
    assert np.abs(shares - stats.norm.cdf(edges, scale=sigma)).max() < 5 * 0.5 / np.sqrt(drawn.size)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("level", [3, 40, 90, 200])
def test_shot_noise_is_poisson(severity: int, level: int) -> None:
    step = OPERATORS["shot_noise"].at(severity)
    photons = step.values[0]
    counts = np.arange(200)
    shown = np.floor(np.clip(counts * 255 / photons, 0, 255) + 0.5)
    chances = stats.poisson.pmf(counts, level * photons / 255)
    expected = np.bincount(shown.astype(int), chances, 256)
    shares = np.bincount(plain.augment(flat(level), step, WORDS[1]).ravel(), minlength=256) / flat(0).size
    # The total variation distance between the two distributions.
    assert 0.5 * np.abs(expected - shares).sum() < 0.02


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share_and_nothing_else(severity: int) -> None:
    step = OPERATORS["impulse_noise"].at(severity)
    drawn, size = plain.augment(flat(77), step, WORDS[2]), flat(0).size
    assert set(np.unique(drawn)) == {0, 77, 255}
    for level in (0, 255):
        assert abs((drawn == level).mean() - step.values[0] / 2) < 5 * np.sqrt(step.values[0] / 2 / size)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_occlusion_hides_its_share_at_any_place(severity: int) -> None:
    step = OPERATORS["occlusion"].at(severity)
    corners = []
    for number in range(60):
        words = seeds.sample_words(1, [("s", str(number))])[0]
        hidden = (plain.augment(flat(9)[:, :200], step, words) == tables.GREY).all(axis=2)
        assert abs(hidden.mean() - step.values[0]) < 0.01
        corners.append(np.argwhere(hidden)[0])
    free = np.array([300, 200]) - np.array(tables.occlusion_size(300, 200, step.values[0]))
    places = np.array(corners) / free
    assert places.min() < 0.1 and places.max() > 0.9


def test_a_samples_noise_does_not_depend_on_its_batch() -> None:
    random_ones = [(operator, 3) for operator in OPERATORS.values() if operator.is_random]
    images = np.stack([PHOTO] * 3)[:, :64, :64]
    for kind in ("dali", "torchvision"):
        together, alone = carried_out(kind, images, random_ones), carried_out(kind, images[:1], random_ones)
        for name, changed in together.items():
            assert (changed[0] == alone[name][0]).all()
            assert (changed[0] != changed[1]).any()


def test_words_depend_on_seed_shard_key_and_operator_and_not_on_folders() -> None:
    def words(seed: int, shard: str, key: str) -> bytes:
        return seeds.sample_words(seed, [(shard, key)]).tobytes()

    assert words(0, "/data/a.tar", "k") == words(0, "a.tar", "k")
    assert len({words(0, "a.tar", "k"), words(1, "a.tar", "k"), words(0, "b.tar", "k"), words(0, "a.tar", "l")}) == 4
    assert seeds.salt("shot_noise", 0) != seeds.salt("shot_noise", 1)


def test_random_words_are_uniform_and_independent() -> None:
    words = seeds.random_words(WORDS[0], 1 << 18, salt=1)
    assert stats.kstest(plain._uniform(words), "uniform").pvalue > 1e-3
    second = seeds.mix(words ^ np.uint32(seeds.SECOND))
    other = seeds.random_words(WORDS[1], 1 << 18, salt=1)
    for a, b in ((words, second), (words, other), (words[:-1], words[1:]), (words[:-3], words[3:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


@pytest.mark.gpu
@pytest.mark.skipif(not is_dali_available(), reason="DALI is not installed here")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPERATORS)
def test_a_gpu_makes_the_cpus_pictures(name: str, by_both: Any) -> None:
    cells = [(OPERATORS[name], severity) for severity in SEVERITIES]
    noise = np.random.default_rng(0).integers(0, 256, PHOTO.shape, np.uint8)
    images = np.stack([PHOTO, noise, np.zeros_like(PHOTO)])
    for cell, changed in carried_out("dali", images, cells, device_id=0).items():
        away = np.abs(changed.astype(int) - by_both["dali"][cell])
        # On a GPU, JPEG is computed in floats instead of libjpeg's integers, and halves are rounded to even.
        assert away.mean() < 1 if name == "jpeg_compression" else away.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 7)])
def test_pictures_of_a_few_pixels_survive_every_operator(size: tuple[int, int]) -> None:
    image = np.full((1, *size, 3), 200, np.uint8)
    for kind in ("dali", "torchvision"):
        assert all(changed.shape == image.shape for changed in carried_out(kind, image).values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fog", "unknown operator: --augment - expected one of brightness, contrast"),
        ("gaussian_noise:strength=1", "expected sigma 0..1 share of full scale, or severity=1..5, got strength"),
        ("gaussian_noise:sigma=2", "expected 0..1 share of full scale, got 2"),
        ("gaussian_noise:sigma=nan", "expected 0..1 share of full scale, got nan"),
        ("gaussian_noise:sigma=much", "not a number"),
        ("gaussian_noise", "expected sigma=V"),
        ("gaussian_noise:severity=6", "severity=1 to severity=5"),
        ("gaussian_noise:severity=1,sigma=0.1", "and no other argument"),
        ("gaussian_noise:sigma=0.1,sigma=0.2", "given twice"),
        ("jpeg_compression:quality=7.5", "not a whole number"),
        ("", "unknown operator"),
    ],
)
def test_a_wrong_operator_or_value_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("..", r"\.\.")):
        operators.parse(text)


def every_written_form() -> Iterator[Augmentation]:
    for operator, severity in CELLS:
        yield operator.at(severity)


def test_what_is_written_reads_back_and_severities_are_within_the_ranges() -> None:
    for step in every_written_form():
        assert operators.parse(str(step)) == step
    assert operators.parse("zoom:severity=2") == OPERATORS["zoom"].at(2)
    assert str(operators.parse("saturation:factor=2")) == "saturation:factor=2,offset=0"


def test_a_chain_is_carried_out_in_its_order() -> None:
    chain = tuple(operators.parse(text) for text in ("occlusion:share=0.3", "gaussian_blur:sigma=4"))
    stage = Stage([Condition("", chain)], "dali", [Geometry("exact", SIZE, "bilinear")], batch_size=1, num_threads=1)
    ((_, changed),) = stage.apply(Decoded((torch.from_numpy(PHOTO[None]),)), WORDS[:1])
    hidden = plain.augment(PHOTO, chain[0], WORDS[0], position=0)
    expected = plain.augment(hidden, chain[1], WORDS[0], position=1)
    assert np.abs(changed.pixels[0][0].numpy().astype(int) - expected).max() <= 1


def test_on_a_gpu_all_that_the_pixels_are_made_from_is_held_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Studio:
        def apply(self, pixels_BHWC: torch.Tensor, words: Any) -> list[torch.Tensor]:
            return [pixels_BHWC + 1]

    monkeypatch.setattr(Stage, "_make", lambda stage, recipes, size: Studio())
    condition = Condition("", (OPERATORS["brightness"].at(1),))
    decoded = Decoded((torch.zeros(1, *SIZE, 3, dtype=torch.uint8),), held=(torch.zeros(1),))
    for device_id, held in ((0, (decoded,)), (None, ())):
        geometry = Geometry("exact", SIZE, "bilinear")
        stage = Stage([condition], "dali", [geometry], batch_size=1, num_threads=1, device_id=device_id)
        ((_, under),) = stage.apply(decoded, np.zeros((1, 2), np.uint32))
        assert under.held == held
