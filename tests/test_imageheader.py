"""Headers of encoded images, compared with Pillow's reading."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from support import pictures
from vitscore.decode.image_header import read_header

EVERYTHING = {**pictures.ordinary(), **pictures.odd()}


def header_of(content):
    return read_header(pictures.as_array(content))


@pytest.mark.parametrize("kind", EVERYTHING)
def test_size_and_orientation_are_pillows(kind):
    header = header_of(EVERYTHING[kind])
    if header.format == "other" or kind == "jpeg turned by xmp":
        assert not header.is_plain
        return
    with Image.open(io.BytesIO(EVERYTHING[kind])) as opened:
        assert header.upright_size == ImageOps.exif_transpose(opened).size[::-1]
        if header.format != "tiff":  # Pillow turns these when it opens them
            assert header.orientation == opened.getexif().get(0x0112, 1)


@pytest.mark.parametrize("kind", pictures.ordinary())
def test_ordinary_kinds_are_plain_and_whole(kind):
    header = header_of(pictures.ordinary()[kind])
    assert header.is_plain and header.is_whole and not header.is_cut


@pytest.mark.parametrize("kind", [kind for kind in pictures.ordinary() if "bytes after" not in kind])
@pytest.mark.parametrize("missing", [0.6, 0.02, 3])
def test_a_cut_image_shows(kind, missing):
    content = pictures.ordinary()[kind]
    header = header_of(content[: -int(missing if missing > 1 else len(content) * missing)])
    if (missing < 0.5 and kind == "tiff pages") or (missing == 3 and "tiff" in kind):
        return  # the last bytes are of another page, or tags
    assert not header.is_whole


def test_flipped_bits_of_a_png_show():
    header = header_of(pictures.visibly_bad()["flipped bits"][0])
    assert not header.is_whole and not header.is_cut


def test_orientation_in_both_byte_orders():
    for order in (
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0",
    ):
        jpeg = pictures.encode(pictures.photo(20, 30), "JPEG", exif=b"Exif\0\0" + order)
        assert header_of(jpeg).orientation == 6
        assert header_of(jpeg).upright_size == (20, 30)


def test_unreadable_orientation_is_not_plain():
    jpeg = pictures.encode(pictures.photo(20, 30), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\0\0")
    assert not header_of(jpeg).is_plain


def test_sixteen_bits_are_told():
    assert header_of(pictures.encode(Image.fromarray(pictures.grey16()), "PNG")).bits == 16


def test_a_declared_size_is_read_without_the_pixels():
    header = header_of(pictures.huge_png())
    assert (header.width, header.height) == (50_000, 50_000)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_raises(data):
    content = bytearray(data.draw(st.sampled_from(list(EVERYTHING.values())))[:4000])
    for _ in range(data.draw(st.integers(1, 20))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    header = header_of(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert header.width >= 0 and header.height >= 0 and 1 <= header.orientation <= 8


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"BM", b"II*\0", b"MM\0*", b"\xff\x4f\xff\x51"]
    ),
    st.binary(max_size=200),
)
def test_noise_behind_a_magic_number_never_raises(magic, noise):
    assert read_header(np.frombuffer(magic + noise, np.uint8)).width >= 0
