"""The tar index compared with tarfile, on every format, and on truncated and damaged files."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.tars import write_members
from vitscore.shards.tar.index import TarIndex, index_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Members = list[tuple[str, bytes]]


def index_file(path: Path) -> TarIndex:
    fd = os.open(path, os.O_RDONLY)
    try:
        return index_tar(fd, will_read=True)
    finally:
        os.close(fd)


def tarfile_index(path: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(path) as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


def rows(index: TarIndex) -> list[tuple[str, int, int]]:
    return [(member.name, member.offset, member.size) for member in index.members]


def names_of(index: TarIndex) -> list[str]:
    return index.names


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_index_is_tarfiles(tmp_path: Path, tar_format: int, data: st.DataObject) -> None:
    alphabet = st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"])
    longest = 30 if tar_format == tarfile.USTAR_FORMAT else 90
    part = st.text(alphabet, min_size=1, max_size=longest).filter(lambda text: len(text.encode()) <= longest)
    name = st.lists(part, min_size=1, max_size=3).map("/".join)
    contents = st.one_of(st.binary(max_size=600), st.integers(0, 40_000).map(bytes))
    members = data.draw(st.lists(st.tuples(name, contents), max_size=12))
    path = write_members(tmp_path / "t.tar", members, format=tar_format)
    index = index_file(path)
    assert index.fault is None
    assert not index.flaws
    assert rows(index) == tarfile_index(path)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 20_000, 300_000])
def test_offsets_are_right_for_every_spacing(tmp_path: Path, size: int) -> None:
    """The window's width changes with the spacing of headers; no member is lost at the change."""
    sizes = [*([100] * 40), *([size] * 30), *([7] * 40)]
    members = [(f"d/{n:05d}.bin", os.urandom(size)) for n, size in enumerate(sizes)]
    path = write_members(tmp_path / "t.tar", members)
    assert rows(index_file(path)) == tarfile_index(path)


def test_thousands_of_members_cross_many_windows(tmp_path: Path) -> None:
    path = write_members(tmp_path / "t.tar", [(f"{n}.cls", b"7" * (n % 700)) for n in range(4000)])
    assert rows(index_file(path)) == tarfile_index(path)


def test_a_tar_in_a_tar_is_one_member(tmp_path: Path) -> None:
    """The headers of the inner tar look like headers of the outer one."""
    inner = write_members(tmp_path / "inner.tar", [(f"{n}.cls", b"7") for n in range(20)]).read_bytes()
    members = [(f"{n:02d}.{extension}", data) for n in range(30) for extension, data in (("cls", b"1"), ("tar", inner))]
    path = write_members(tmp_path / "t.tar", members)
    assert rows(index_file(path)) == tarfile_index(path)


ODD_MEMBERS = st.sampled_from(["plain", "long", "prefix", "folder", "100", "bytes", "link", "space", "empty", "binary"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(ODD_MEMBERS, min_size=1, max_size=40), flips=st.lists(st.integers(0, 1 << 20), max_size=3))
def test_headers_taken_at_once_are_those_taken_one_by_one(
    tmp_path: Path, kinds: list[str], flips: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(b"".join(odd_member(kind, number) for number, kind in enumerate(kinds)) + bytes(1024))
    for flip in flips:
        content[flip % len(content)] ^= 1 << flip % 8
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    at_once = index_file(path)
    with monkeypatch.context() as patch:
        patch.setattr("vitscore.shards.tar.index.plain_headers", lambda *_, **__: None)
        assert index_file(path) == at_once


def odd_member(kind: str, number: int) -> bytes:
    """Return the bytes of a tar member: header, data and padding."""
    stem = f"{number:04d}"
    longer = {"long": "l" * 120, "prefix": "p" * 80 + "/" + stem * 9, "100": "n" * 96}
    info = tarfile.TarInfo(longer.get(kind, "") + stem + "/" * (kind == "folder"))
    info.size = 0 if kind in ("link", "folder", "empty") else number * 37
    info.type = tarfile.SYMTYPE if kind == "link" else tarfile.AREGTYPE if kind == "folder" else tarfile.REGTYPE
    tar_format = tarfile.USTAR_FORMAT if kind == "prefix" else tarfile.GNU_FORMAT
    header = bytearray(info.tobuf(tar_format))
    if kind in ("bytes", "space", "binary"):
        place, content = {"bytes": (0, b"\xff\xfe"), "space": (124, b"   "), "binary": (5, b"\0x")}[kind]
        header[place : place + len(content)] = content
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
    data = bytes(info.size)
    return bytes(header) + data + bytes(-len(data) % 512)


def test_folders_links_and_devices_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("p", b"6")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    index = index_file(path)
    assert rows(index) == tarfile_index(path)
    assert index.num_links == 2


def test_sizes_in_pax_and_base_256_are_read(tmp_path: Path) -> None:
    """A member of 9 GiB in a sparse file: its size is base-256 in GNU format and a record in pax format."""
    for name, tar_format in FORMATS.items():
        if name == "ustar":
            continue
        size = 9 << 30
        info = tarfile.TarInfo("big.bin")
        info.size = size
        after = tarfile.TarInfo("after.bin")
        path = tmp_path / f"{name}.tar"
        with open(path, "wb") as stream:
            stream.write(info.tobuf(tar_format))
            stream.seek(size, os.SEEK_CUR)
            stream.write(after.tobuf(tar_format) + bytes(1024))
        index = index_file(path)
        assert (index.fault, rows(index)) == (None, tarfile_index(path))
        assert index.sizes == [size, 0]


def test_sparse_members_are_listed_with_a_flaw(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[124:136] = b"%011o\0" % 600
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "t.tar"
    path.write_bytes(bytes(header) + bytes(1024) + tarfile.TarInfo("b.jpg").tobuf() + bytes(1024))
    index = index_file(path)
    assert names_of(index) == ["a.jpg", "b.jpg"]
    assert index.flaws == {0: "sparse member"}


def test_names_that_are_not_utf8_stay_text(tmp_path: Path) -> None:
    path = write_members(tmp_path / "t.tar", [("caf\udce9.jpg", b"x")])
    assert names_of(index_file(path)) == ["caf\\xe9.jpg"]


def test_global_pax_headers_are_not_members(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert rows(index_file(path)) == tarfile_index(path)


def test_signed_checksums_are_taken(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("é.jpg").tobuf(tarfile.GNU_FORMAT, "utf-8"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in header)
    path = tmp_path / "t.tar"
    path.write_bytes(bytes(header) + bytes(1024))
    assert (index_file(path).fault, names_of(index_file(path))) == (None, ["é.jpg"])


def three_members(tmp_path: Path) -> tuple[Path, bytes]:
    path = write_members(tmp_path / "t.tar", [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 700), ("c.jpg", b"c" * 700)])
    return path, path.read_bytes()


# By the file's length: the fault and the members. A member has a header, 700 bytes of data and padding up to 1536.
CUTS = {
    0: ("empty file", []),
    100: ("not a tar", []),
    511: ("not a tar", []),
    512: ("truncated", ["a.jpg"]),
    900: ("truncated", ["a.jpg"]),
    1300: ("truncated", ["a.jpg"]),
    1536: (None, ["a.jpg"]),
    1700: ("truncated", ["a.jpg"]),
    2048: ("truncated", ["a.jpg", "b.jpg"]),
    4608: (None, ["a.jpg", "b.jpg", "c.jpg"]),
    4700: (None, ["a.jpg", "b.jpg", "c.jpg"]),
    5120: (None, ["a.jpg", "b.jpg", "c.jpg"]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_cut_files_have_a_fault_and_their_readable_members(tmp_path: Path, cut: int) -> None:
    path, data = three_members(tmp_path)
    path.write_bytes(data[:cut])
    index = index_file(path)
    fault, names = CUTS[cut]
    assert (index.fault or "").split(": ")[0] == (fault or "")
    assert names_of(index) == names


def test_every_cut_lists_every_member_whose_header_is_there(tmp_path: Path) -> None:
    path, data = three_members(tmp_path)
    for cut in range(512, 4609, 64):
        path.write_bytes(data[:cut])
        index = index_file(path)
        assert len(index.names) == (cut + 1024) // 1536
        is_cut = [offset + size > cut for offset, size in zip(index.offsets, index.sizes, strict=True)]
        assert sorted(index.flaws) == [member for member, cut_off in enumerate(is_cut) if cut_off]


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_cuts_in_extended_headers_are_faults(tmp_path: Path, tar_format: str) -> None:
    path = write_members(tmp_path / "t.tar", [("a.jpg", b"a"), ("b" * 300 + ".jpg", b"b")], format=FORMATS[tar_format])
    data = path.read_bytes()
    path.write_bytes(data[:1600])
    index = index_file(path)
    assert (index.fault or "").startswith("truncated: in the extended header")
    assert names_of(index) == ["a.jpg"]


@pytest.mark.parametrize("where", [1540, 1600, 1660, 1684])
def test_a_damaged_header_ends_the_index_before_it(tmp_path: Path, where: int) -> None:
    path, data = three_members(tmp_path)
    damaged = bytearray(data)
    damaged[where] ^= 0x41
    path.write_bytes(damaged)
    index = index_file(path)
    assert index.fault == "damaged: header at byte 1536: wrong checksum"
    assert names_of(index) == ["a.jpg"]


def test_members_after_a_damaged_header_are_not_listed(tmp_path: Path) -> None:
    path = write_members(tmp_path / "t.tar", [(f"{n:03d}.cls", b"7") for n in range(100)])
    data = bytearray(path.read_bytes())
    data[50 * 1024] ^= 1
    path.write_bytes(data)
    index = index_file(path)
    assert names_of(index) == [f"{n:03d}.cls" for n in range(50)]
    assert index.fault == f"damaged: header at byte {50 * 1024}: wrong checksum"


def test_members_after_the_end_are_a_fault(tmp_path: Path) -> None:
    first = write_members(tmp_path / "a.tar", [("a.jpg", b"a")]).read_bytes()
    path = tmp_path / "both.tar"
    path.write_bytes(first * 2)
    assert (index_file(path).fault or "").startswith("damaged: data behind the end")


def test_an_empty_tar_is_whole(tmp_path: Path) -> None:
    index = index_file(write_members(tmp_path / "t.tar", []))
    assert (index.fault, index.names) == (None, [])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\x1f\x8b" + bytes(600), "not a tar: gzip data; unpack it first"),
        (b"\xff\xd8\xff\xe0" + bytes(1000), "not a tar: no tar header at its start"),
        (b"<html>" * 200, "not a tar: no tar header at its start"),
    ],
)
def test_other_files_are_not_tars(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    assert index_file(path).fault == fault


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_raises(tmp_path: Path, data: st.DataObject) -> None:
    members = [("a.jpg", b"a" * 700), ("n" * 200 + ".jpg", b"b"), ("é.cls", b"3")]
    tar_format = data.draw(st.sampled_from(list(FORMATS.values())[1:]))
    path = write_members(tmp_path / "t.tar", members, format=tar_format)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    index = index_file(path)
    assert len(index.names) == len(index.offsets) == len(index.sizes)
    whole = [member for member in range(len(index.names)) if member not in index.flaws]
    assert all(index.offsets[member] + index.sizes[member] <= index.num_bytes for member in whole)
