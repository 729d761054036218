"""Encoded pictures of many kinds, made from scikit-learn's two photographs."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

Encoded = np.ndarray


@cache
def photo(width: int, height: int, which: int = 0) -> Image.Image:
    whole = Image.fromarray(load_sample_images().images[which])
    return whole.resize((width, height), Image.Resampling.LANCZOS)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_array(content: bytes) -> Encoded:
    return np.frombuffer(content, np.uint8)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@cache
def ordinary() -> dict[str, bytes]:
    """Return pictures of the kinds that DALI decodes."""
    rgb = photo(250, 200)
    grey, palette, rgba = rgb.convert("L"), rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=64), rgb.copy()
    rgba.putalpha(grey)
    kinds = {
        "jpeg": encode(rgb, "JPEG", quality=90),
        "jpeg 4:4:4": encode(rgb, "JPEG", quality=95, subsampling=0),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg grey": encode(grey, "JPEG", quality=90),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG", quality=90),
        "jpeg with bytes after its end": encode(rgb, "JPEG") + b"\0" * 700,
        "png": encode(rgb, "PNG"),
        "png grey": encode(grey, "PNG"),
        "png grey alpha": encode(rgba.convert("LA"), "PNG"),
        "png two colours": encode(rgb.convert("1"), "PNG"),
        "png palette": encode(palette, "PNG"),
        "png palette, 4 bit": encode(rgb.quantize(9), "PNG", bits=4),
        "png palette, transparent": encode(rgb.quantize(6), "PNG", transparency=2),
        "png palette, half transparent": encode(palette, "PNG", transparency=bytes(range(0, 256, 4))),
        "png rgb, transparent": encode(rgb.quantize(6).convert("RGB"), "PNG", transparency=_most_common(rgb)),
        "png grey, transparent": encode(grey.point(lambda v: v // 64 * 64), "PNG", transparency=128),
        "png rgba": encode(rgba, "PNG"),
        "webp": encode(rgb, "WEBP", quality=85),
        "webp lossless": encode(rgb, "WEBP", lossless=True),
        "webp alpha": encode(rgba, "WEBP"),
        "bmp": encode(rgb, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "bmp rgba": encode(rgba, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff grey": encode(grey, "TIFF"),
        "tiff pages": encode(rgb, "TIFF", save_all=True, append_images=[rgb.rotate(90)]),
        "jpeg 2000": encode(rgb, "JPEG2000"),
        "jpeg 2000 lossy": encode(rgb, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[10]),
        "jpeg 2000 grey": encode(grey, "JPEG2000"),
        "jpeg 2000 rgba": encode(rgba, "JPEG2000"),
        "jpeg 2000 stream": encode(rgb, "JPEG2000", no_jp2=True),
    }
    for orientation in range(1, 9):
        kinds[f"jpeg turned {orientation}"] = encode(rgb, "JPEG", exif=turned(orientation))
    return kinds


@cache
def odd() -> dict[str, bytes]:
    """Return pictures of the kinds that Pillow decodes, with either decoder."""
    rgb = photo(250, 200)
    grey, rgba = rgb.convert("L"), rgb.copy()
    rgba.putalpha(grey)
    pages = {"save_all": True, "append_images": [rgb.rotate(90)]}
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    return {
        "gif": encode(rgb, "GIF"),
        "gif animated": encode(rgb, "GIF", **pages),
        "gif transparent": encode(rgb.quantize(6), "GIF", transparency=2),
        "avif": encode(rgb, "AVIF"),
        "ppm": encode(rgb, "PPM"),
        "ico": encode(rgb, "ICO"),
        "png turned": encode(rgb, "PNG", exif=turned(6)),
        "png animated": encode(rgb, "PNG", **pages),
        "webp turned": encode(rgb, "WEBP", exif=turned(8)),
        "webp animated": encode(rgb, "WEBP", **pages),
        "bmp two colours": encode(rgb.convert("1"), "BMP"),
        "tiff lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff turned": encode(rgb, "TIFF", tiffinfo={0x0112: 5}),
        "tiff palette": encode(rgb.quantize(64), "TIFF"),
        "tiff rgba": encode(rgba, "TIFF"),
        "tiff grey alpha": encode(rgba.convert("LA"), "TIFF"),
        "tiff cmyk": encode(rgb.convert("CMYK"), "TIFF"),
        "tiff two colours": encode(rgb.convert("1"), "TIFF"),
        "tiff float": encode(rgb.convert("F"), "TIFF"),
        "tiff jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "jpeg turned by xmp": encode(rgb, "JPEG", xmp=xmp),
    }


def grey16() -> np.ndarray:
    """Return a 16-bit picture whose values are the photograph's times 257, plus 60."""
    return np.asarray(photo(250, 200).convert("L")).astype(np.uint16) * 257 + 60


@cache
def visibly_bad() -> dict[str, tuple[bytes, str]]:
    """Return pictures whose damage shows in the header or at the end, and the expected reasons."""
    good = ordinary()
    return {
        "empty": (b"", "empty image"),
        "garbage": (bytes(range(256)) * 4, "undecodable image: no known image format"),
        "html": (b"<html>not found</html>", "undecodable image: no known image format"),
        "only a start": (good["jpeg"][:30], "truncated image: jpeg"),
        "cut jpeg": (good["jpeg"][: len(good["jpeg"]) // 2], "truncated image: jpeg"),
        "cut progressive": (good["jpeg progressive"][:-400], "truncated image: jpeg"),
        "cut at its thumbnail's end": (_with_thumbnail()[:-3000], "truncated image: jpeg"),
        "cut png": (good["png"][: len(good["png"]) // 2], "truncated image: png"),
        "png without its last chunk": (good["png"][:-12], "truncated image: png"),
        "cut webp": (good["webp"][:-200], "truncated image: webp"),
        "cut bmp": (good["bmp"][:-200], "truncated image: bmp"),
        "cut tiff": (good["tiff"][:-200], "truncated image: tiff"),
        "cut jpeg 2000": (good["jpeg 2000"][:-200], "truncated image: jpeg2000"),
        "cut gif": (odd()["gif"][:4000], "truncated image"),
        "flipped bits": (_flipped(good["png"]), "undecodable image"),
        "too large": (huge_png(), "image too large: 50000x50000, limit"),
    }


@cache
def hidden_bad() -> dict[str, bytes]:
    """Return pictures whose damage shows only when pixels are decoded, so that they fail a whole batch in DALI."""
    good = ordinary()
    return {
        "jpeg without its tables": _without_tables(good["jpeg"]),
        "png whose stream is noise": png(250, 200, b"\x9d" * 4000),
        "webp whose picture is noise": good["webp"][:40] + b"\xff" * (len(good["webp"]) - 40),
    }


def png(width: int, height: int, data: bytes) -> bytes:
    """Return a PNG with valid checksums around any data."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    framed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def huge_png() -> bytes:
    return png(50_000, 50_000, zlib.compress(b"\0" * 1000))


def _most_common(rgb: Image.Image) -> tuple[int, int, int]:
    return max(rgb.quantize(6).convert("RGB").getcolors())[1]


def _with_thumbnail() -> bytes:
    exif = turned(1)
    exif[0x9286] = encode(photo(32, 24), "JPEG")
    return encode(photo(250, 200), "JPEG", exif=exif)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 40]) + content[middle + 40 :]


def _without_tables(content: bytes) -> bytes:
    """Remove a JPEG's quantisation tables; for missing Huffman tables, decoders have defaults."""
    while (at := content.find(b"\xff\xdb")) >= 0:
        content = content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]
    return content
