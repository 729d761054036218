"""Keep messages of C libraries about bad images off the terminal.

DALI's decoders (nvImageCodec, libjpeg, libpng, libtiff, OpenCV), and one of Pillow's, write a line to file descriptor 2
for every image that they cannot decode. They do so from their own threads, long before the batch is collected, and no
setting turns the messages off. The ledger names these images, so the lines only tear the progress bar. Messages of
nvImageCodec about memory and the device, which it reports nowhere else, are kept for the decoder (`complaints`).

While a `NativeStderr` is open, descriptor 2 is a pipe. A thread drops the known lines and passes all others on to the
original target of descriptor 2, so that no message of CUDA or the C library is lost. If `sys.stderr` used descriptor 2,
it is moved to the original target: progress bars and tracebacks reach the terminal directly, and still see a terminal.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import threading
from typing import ClassVar, TextIO

from vitscore.decode.failures import complaint_in

# nvImageCodec writes a line in several pieces, which its threads may interleave: any piece identifies its lines.
_NOISE = re.compile(
    rb"""\[(ERROR|WARNING)\] | \[\w+[_-](decoder|parser|ext)\] | Could\ not\ decode\ \w+\ code\ stream
      | ^\s*\[\s*(ERROR|WARN):\d+@[\d.]+\]                    # OpenCV: [ WARN:0@0.069] global grfmt_jpeg2000 ...
      | ^\s*libpng\ (error|warning):
      | ^\s*(_?TIFF\w*|JPEGLib|LZW\w+|ZIP\w+|\w*\.tif+):
      | ^\s*(Bogus|Corrupt|Invalid|Unsupported|Inconsistent|Unrecognized|Unknown\ Adobe|Obtained\ EXIF)\b  # libjpeg
      | ^\s*(Premature\ end|Empty\ JPEG|Not\ a\ JPEG|Wrong\ JPEG|Sampling\ factors|Maximum\ supported\ image)\b
      | ^\s*(Quantization|Huffman|Arithmetic)\ table\ 0x
      | ^(\x1b\[[0-9;]*m | [\s:])*$                            # remains of a line: colours, colons
    """,
    re.VERBOSE,
)
_MOST_COMPLAINTS = 1000
_SETTLED_S = 1.0


class NativeStderr:
    """A filter on descriptor 2 that is in place until `close`; instances that are open together share it."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _num_open: ClassVar[int] = 0
    _filter: ClassVar[_Filter | None] = None

    def __init__(self) -> None:
        self._is_open = True
        with NativeStderr._lock:
            if NativeStderr._num_open == 0:
                NativeStderr._filter = _start_filter()
            NativeStderr._num_open += 1
            self._num_heard = len(NativeStderr._filter.complaints) if NativeStderr._filter else 0

    def complaints(self, *, is_settled: bool = False) -> list[str]:
        """Return the lines about memory and the device that arrived since the last call.

        Args:
            is_settled: wait until the filter has read everything that was written so far.
        """
        running = NativeStderr._filter
        if running is None:
            return []
        if is_settled:
            running.settle()
        new = running.complaints[self._num_heard :]
        self._num_heard += len(new)
        return new

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        with NativeStderr._lock:
            NativeStderr._num_open -= 1
            if NativeStderr._num_open == 0 and NativeStderr._filter is not None:
                NativeStderr._filter.stop()
                NativeStderr._filter = None


class _Filter:
    def __init__(self) -> None:
        self._terminal = os.dup(2)
        read_end, write_end = os.pipe()
        _flush(sys.stderr)
        self._python_stderr = sys.stderr
        self._direct = _stream_on(sys.stderr, self._terminal)
        if self._direct is not None:
            sys.stderr = self._direct
        os.dup2(write_end, 2)
        self._write_end = write_end
        self.complaints: list[str] = []
        self._marks: dict[bytes, threading.Event] = {}
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._pump, args=(read_end,), name="native-stderr", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        _flush(sys.stderr)
        os.dup2(self._terminal, 2)
        os.close(self._write_end)  # the pipe's last, so that the thread sees the end
        self._thread.join(timeout=2.0)
        if self._direct is not None and sys.stderr is self._direct:
            sys.stderr = self._python_stderr
        # The descriptor stays open if a progress bar or a logging handler may still hold the stream on it.
        if self._direct is None:
            os.close(self._terminal)

    def settle(self) -> None:
        """Wait until everything that was written so far has been read: a mark follows it through the pipe."""
        mark, seen = b"vitscore: mark %d" % next(self._numbers), threading.Event()
        self._marks[mark] = seen
        with contextlib.suppress(OSError):
            os.write(self._write_end, b"\n%b\n" % mark)
            seen.wait(_SETTLED_S)

    def _pump(self, read_end: int) -> None:
        rest = b""
        with open(read_end, "rb", buffering=0) as pipe:
            while chunk := pipe.read(65536):
                *lines, rest = (rest + chunk).split(b"\n")
                self._pass_on(b"".join(line + b"\n" for line in lines if self._is_passed_on(line)))
            if rest and self._is_passed_on(rest):
                self._pass_on(rest)

    def _is_passed_on(self, line: bytes) -> bool:
        """Return whether to pass a line on; a mark sets its event, and a complaint is kept."""
        if (seen := self._marks.pop(line, None)) is not None:
            seen.set()
            return False
        text = line.decode(errors="replace")
        if complaint_in(text):
            if len(self.complaints) < _MOST_COMPLAINTS:
                self.complaints.append(text)
            return False
        return not _NOISE.search(line)

    def _pass_on(self, text: bytes) -> None:
        while text:
            try:
                text = text[os.write(self._terminal, text) :]
            except OSError:  # the terminal is gone
                return


def _start_filter() -> _Filter | None:
    try:
        return _Filter()
    except OSError:  # descriptor 2 is closed, or no descriptor is left: the lines are not filtered
        return None


def _stream_on(stream: TextIO | None, terminal: int) -> TextIO | None:
    """Return a stream like `sys.stderr` on another descriptor, or None if `sys.stderr` is not on descriptor 2."""
    try:
        if stream is None or stream.fileno() != 2:
            return None
    except (OSError, ValueError, AttributeError):  # replaced, by a notebook or a test
        return None
    raw = open(terminal, "wb", buffering=0, closefd=False)
    return io.TextIOWrapper(
        raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True, write_through=True
    )


def _flush(stream: TextIO | None) -> None:
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        pass
