"""Read the header of an encoded image: format, size, orientation, kind, and damage that shows without decoding.

Between shards and decoding: the decoders need the size of an image before they decode it, to refuse images that are too
large, to compute the position of the crop, and to choose the decoder that renders the image correctly. The format comes
from the first bytes, never from a name. Damage that shows without decoding (no end marker, a failed checksum, fewer
bytes than declared) is detected here, because one bad image in a DALI batch makes the whole batch decode twice.

This module decodes no pixels and refuses no image; the decoders decide.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from struct import Struct, error, unpack_from
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Errors of a parser that reads beyond the end of a cut image. Other damage is a ValueError.
_BEYOND_END = (error, IndexError)
_BE16, _BE32, _LE32 = Struct(">H"), Struct(">I"), Struct("<I")
_PNG_CHUNK, _PNG_SHAPE = Struct(">I4s"), Struct(">4sIIBB")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
"""Channels by PNG colour type."""
_TIFF_TYPES = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([0-9])")


class ImageHeader(NamedTuple):
    """The declared shape and kind of one encoded image.

    Args:
        format: "jpeg", "png", "webp", "bmp", "tiff", "jpeg2000", or "other" for any format that is not parsed here.
        width: columns as stored, before the orientation is applied; 0 where unknown.
        height: rows as stored; 0 where unknown.
        orientation: the EXIF orientation, 1 to 8.
        bits: bits per channel.
        channels: channels as stored (4 in a JPEG: CMYK).
        is_plain: whether it is an ordinary image of its format, which the decoders are known to render alike.
        is_whole: whether it has no damage that shows without decoding; False also if the format cannot show it.
        is_cut: whether its end is missing.
        has_key: whether one of its colours is declared transparent.
    """

    format: str
    width: int = 0
    height: int = 0
    orientation: int = 1
    bits: int = 8
    channels: int = 3
    is_plain: bool = True
    is_whole: bool = True
    is_cut: bool = False
    has_key: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) once the orientation is applied."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def read_header(image: NDArray[np.uint8]) -> ImageHeader:
    """Read the header of an encoded image; never raises. The header of a damaged image has no size and is not whole."""
    data = image.data
    format, parse = _format_of(bytes(data[:16]))
    if parse is not None:
        try:
            header = parse(data)
            if header.width >= 0 and header.height >= 0:
                return header
        except _BEYOND_END:
            return ImageHeader(format, is_plain=False, is_whole=False, is_cut=True)
        except ValueError:
            pass
    return ImageHeader(format, is_plain=False, is_whole=False)


def _format_of(head: bytes) -> tuple[str, Callable[[memoryview], ImageHeader] | None]:
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg", _jpeg
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", _png
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp", _webp
    if head.startswith(b"BM"):
        return "bmp", _bmp
    if head.startswith((b"II*\0", b"MM\0*")):
        return "tiff", _tiff
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "jpeg2000", _jpeg2000
    return "other", None


def _jpeg(data: memoryview) -> ImageHeader:
    height = width = bits = channels = 0
    is_plain = False
    exif: list[int | None] = []
    xmp = None
    at = 2
    while True:
        while data[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xD9:
            raise ValueError("a marker is missing, or the image ends before its pixels")
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these have no length
            at += 2
            continue
        (length,) = _BE16.unpack_from(data, at + 2)
        if marker == 0xE1:
            body = data[at + 4 : at + 2 + length]
            if bytes(body[:6]) == b"Exif\0\0":
                exif.append(_exif_orientation(body[6:]))
            elif bytes(body[:4]) == b"http":
                xmp = _xmp_orientation(body) or xmp
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, channels = unpack_from(">BHHB", data, at + 4)
            # Baseline, extended and progressive Huffman are plain; lossless, hierarchical and arithmetic go to Pillow.
            is_plain = marker <= 0xC2 and bits == 8 and channels in (1, 3, 4)
        elif marker == 0xDA:
            break
        at += 2 + length
    is_whole = _has_end_marker(data, at)
    return _turned(
        ImageHeader("jpeg", width, height, 1, bits, channels, is_plain, is_whole, not is_whole), exif=exif, xmp=xmp
    )


def _has_end_marker(data: memoryview, pixels_at: int) -> bool:
    """Return whether the end marker FF D9 follows the coded pixels, at the end or before trailing bytes.

    The marker cannot occur inside coded pixels, in a JPEG or a JPEG 2000. The part before them is not searched, since
    an EXIF thumbnail has its own end marker.
    """
    return bytes(data[-2:]) == b"\xff\xd9" or bytes(data[pixels_at:]).rfind(b"\xff\xd9") >= 0


def _png(data: memoryview) -> ImageHeader:
    first, width, height, bits, color = _PNG_SHAPE.unpack_from(data, 12)
    if first != b"IHDR":
        raise ValueError("no IHDR")
    channels = _PNG_CHANNELS.get(color, 0)
    exif: list[int | None] = []
    xmp = None
    is_whole = is_cut = is_animated = has_key = False
    at, num_bytes = 8, len(data)
    while True:
        if at + 12 > num_bytes:
            is_cut = True
            break
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        end = at + 8 + length
        if end + 4 > num_bytes:
            is_cut = True
            break
        if zlib.crc32(data[at + 4 : end]) != _BE32.unpack_from(data, end)[0]:
            break
        if kind == b"IDAT":
            pass
        elif kind == b"eXIf":
            exif.append(_exif_orientation(data[at + 8 : end]))
        elif kind == b"iTXt":
            xmp = _xmp_orientation(data[at + 8 : end]) or xmp
        elif kind == b"acTL":
            is_animated = True
        elif kind == b"tRNS":
            has_key = True
        elif kind == b"IEND":
            is_whole = True
            break
        at = end + 4
    header = ImageHeader("png", width, height, 1, bits, channels, not is_animated, is_whole, is_cut, has_key)
    return _turned(header, exif=exif, xmp=xmp)


def _webp(data: memoryview) -> ImageHeader:
    is_whole = _LE32.unpack_from(data, 4)[0] + 8 <= len(data)
    width = height = 0
    is_animated = False
    exif: list[int | None] = []
    xmp = None
    at = 12
    while at + 8 <= len(data):
        kind, (length,) = bytes(data[at : at + 4]), _LE32.unpack_from(data, at + 4)
        body = data[at + 8 : at + 8 + length]
        if kind == b"VP8X":
            is_animated = bool(body[0] & 2)
            width = int.from_bytes(body[4:7], "little") + 1
            height = int.from_bytes(body[7:10], "little") + 1
        elif kind == b"VP8L" and not width:
            packed = _LE32.unpack_from(body, 1)[0]
            width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        elif kind == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in unpack_from("<HH", body, 6))
        elif kind == b"EXIF":
            exif.append(_exif_orientation(body[6:] if bytes(body[:6]) == b"Exif\0\0" else body))
        elif kind == b"XMP ":
            xmp = _xmp_orientation(body)
        at += 8 + length + (length & 1)
    if not width:
        raise ValueError("no picture chunk")
    header = ImageHeader("webp", width, height, is_plain=not is_animated, is_whole=is_whole, is_cut=not is_whole)
    return _turned(header, exif=exif, xmp=xmp)


def _bmp(data: memoryview) -> ImageHeader:
    (offset,) = _LE32.unpack_from(data, 10)
    if _LE32.unpack_from(data, 14)[0] < 40:
        raise ValueError("a header older than 1990")
    width, height, _, bits, compression = unpack_from("<iiHHI", data, 18)
    row_bytes = (width * bits + 31) // 32 * 4
    is_plain = compression == 0 and bits in (8, 24, 32) and height > 0 and width > 0
    is_whole = compression != 0 or offset + row_bytes * abs(height) <= len(data)
    return ImageHeader("bmp", width, abs(height), is_plain=is_plain, is_whole=is_whole, is_cut=not is_whole)


def _tiff(data: memoryview) -> ImageHeader:
    tags = _tiff_tags(data)
    first = {tag: values[0] for tag, values in tags.items() if values}
    strips, counts = tags.get(273, ()), tags.get(279, ())
    channels, bits = first.get(277, 1), tags.get(258, (1,))
    # Uncompressed 8-bit grey or RGB in strips, one plane, no extra channel. Decoders render the other kinds (two
    # colours, palettes, alpha, CMYK, floats, tiles) differently, and only some of them notice damage in compressed
    # strips (OpenCV, DALI's fallback, does not).
    is_plain = (
        set(bits) == {8}
        and (first.get(262), channels) in ((1, 1), (2, 3))
        and first.get(284, 1) == 1
        and first.get(259, 1) == 1
        and 338 not in tags
        and len(strips) == len(counts) > 0
    )
    is_whole = all(start + count <= len(data) for start, count in zip(strips, counts, strict=False))
    if 256 not in first or 257 not in first:
        raise ValueError("no size")
    turn = first.get(274, 1) if 1 <= first.get(274, 1) <= 8 else 1
    return ImageHeader("tiff", first[256], first[257], turn, max(bits), channels, is_plain, is_whole, not is_whole)


def _jpeg2000(data: memoryview) -> ImageHeader:
    at = bytes(data[:4096]).find(b"\xff\x4f\xff\x51")  # the start of the code stream, with or without a file around it
    if at < 0:
        raise ValueError("no code stream")
    right, low, left, top = unpack_from(">IIII", data, at + 8)
    (channels,) = _BE16.unpack_from(data, at + 40)
    parts = [tuple(data[at + 42 + 3 * i : at + 45 + 3 * i]) for i in range(channels)]
    # Subsampled or deep components, two channels, palettes (in a file's `pclr` box) and a non-zero origin go to Pillow.
    is_plain = set(parts) == {(7, 1, 1)} and channels in (1, 3, 4) and not (left or top)
    is_plain = is_plain and b"pclr" not in bytes(data[:at])
    is_whole = _has_end_marker(data, at)
    return ImageHeader("jpeg2000", right - left, low - top, 1, 8, channels, is_plain, is_whole, not is_whole)


def _turned(header: ImageHeader, *, exif: list[int | None], xmp: int | None) -> ImageHeader:
    """Add the orientation, or mark the image as not plain if only Pillow's reading of the orientation is certain.

    This is so if the orientation is malformed, given twice, or only in XMP metadata.

    Args:
        header: the header so far.
        exif: the orientation of each EXIF block: 0 if it has none, None if it cannot be read reliably.
        xmp: the orientation in XMP metadata.
    """
    if not exif or exif == [0]:
        return header if xmp in (None, 1) else header._replace(is_plain=False)
    if len(exif) > 1 or exif[0] is None:
        return header._replace(is_plain=False)
    return header._replace(orientation=exif[0])


def _exif_orientation(exif: memoryview) -> int | None:
    """Return the orientation in an EXIF block: 0 if it has none, None if it cannot be read reliably."""
    try:
        values = _tiff_tags(exif, only=274).get(274)
    except (*_BEYOND_END, ValueError):
        return None
    if values is None:
        return 0
    return values[0] if len(values) == 1 and 1 <= values[0] <= 8 else None


def _xmp_orientation(packet: memoryview) -> int | None:
    match = _XMP_ORIENTATION.search(bytes(packet))
    return int(match.group(1)) if match else None


def _tiff_tags(data: memoryview, *, only: int | None = None) -> dict[int, tuple[int, ...]]:
    """Return the integer tags (BYTE, SHORT, LONG) of a TIFF's first directory."""
    order = "<" if bytes(data[:2]) == b"II" else ">"
    (at,) = unpack_from(order + "I", data, 4)
    (num_tags,) = unpack_from(order + "H", data, at)
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(at + 2, at + 2 + 12 * num_tags, 12):
        tag, kind, count = unpack_from(order + "HHI", data, entry)
        if kind not in _TIFF_TYPES or (only is not None and tag != only):
            continue
        size = _TIFF_TYPES[kind][1] * count
        where = entry + 8 if size <= 4 else unpack_from(order + "I", data, entry + 8)[0]
        if where + size > len(data):
            raise IndexError("a tag beyond the end")
        tags[tag] = unpack_from(f"{order}{count}{_TIFF_TYPES[kind][0]}", data, where)
    return tags
