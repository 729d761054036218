"""Errors of DALI that make an image bad, and errors that end the run: the texts of DALI 2.4, raised by real pipelines.

Errors of a GPU are raised from the outputs of a CPU pipeline, or written to descriptor 2, as nvImageCodec does.
"""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from PIL import Image

from support import pictures
from vitscore.decode.counts import DecodedAgain
from vitscore.decode.failures import cause_of, complaint_in, decoder_failed, gist, out_of_memory
from vitscore.decode.pixels import is_dali_available
from vitscore.errors import SetupError
from vitscore.preprocess import Geometry

pytestmark = pytest.mark.skipif(not is_dali_available(), reason="DALI is not installed here")

GEOMETRY = Geometry("exact", (32, 32), "bilinear")
BY_HALVES = [pytest.param(True, id="by halves"), pytest.param(False, id="one by one")]

ILLEGAL = "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered"
NO_MEMORY = "Can't allocate 805306368 bytes on device 0."
UNDECODABLE = "Failed to decode sample #1 : "
NVJPEG = "\x1b[0;31m[ERROR] \x1b[0m[nvjpeg_cuda_decoder] Could not decode jpeg code stream - "
NVIMAGECODEC = "[ERROR] Exception during decode: "
NVJPEG_NO_MEMORY = (
    f"{NVJPEG}nvjpeg error #5 (allocator failure) when running "
    "nvjpegDecodeJpegHost(handle_, decoder, state, nvjpeg_params.get(), stream) at /a/cuda_decoder.cpp:1"
)
NVJPEG_BROKEN = (
    "[ERROR] [nvjpeg_hw_decoder] Could not decode jpeg batch - CUDA error #719 when running "
    "cudaEventSynchronize(event_) at /a/hw_decoder.cpp:1"
)


def framed(reason):
    """Return a reason in the form in which DALI raises it."""
    return (
        "Critical error in pipeline:\nCritical error in pipeline:\nError in Mixed operator"
        " `nvidia.dali.fn.decoders.image`,\nwhich was used in the pipeline definition with the following traceback:\n\n"
        '  File "/a/dali_graph.py", line 160, in _graph\n    images = fn.decoders.image(\n\nencountered:\n\n'
        f"{reason}\nCurrent pipeline object is no longer valid.\nCurrent pipeline object is no longer valid."
    )


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        (UNDECODABLE, "image"),
        *((f"nvImageCodec failure: '#{number}'", "image") for number in (2, 3, 4, 8, 17)),
        ("Invalid sample_type: 4", "image"),
        ("CUDA runtime API error cudaErrorInvalidConfiguration (9):\ninvalid configuration argument", "image"),
        (NO_MEMORY, "memory"),
        ("Can't allocate 4096 bytes on host.", "memory"),
        ("CUDA allocation failed", "memory"),
        ("std::bad_alloc", "memory"),
        ("CUDA error: out of memory", "memory"),
        ("CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory", "memory"),
        *((f"nvImageCodec failure: '#{number}'", "memory") for number in (5, 15)),
        (ILLEGAL, "device"),
        ("CUDA runtime API error cudaErrorLaunchFailure (719):\nunspecified launch failure", "device"),
        ("CUDA runtime API error cudaErrorECCUncorrectable (214):\nuncorrectable ECC error encountered", "device"),
        ("CUDA runtime API error cudaErrorDevicesUnavailable (46)", "device"),
        ("CUDA driver API error CUDA_ERROR_CONTEXT_IS_DESTROYED (709):\ncontext is destroyed", "device"),
        *((f"nvImageCodec failure: '#{number}'", "device") for number in (6, 7, 16, 20, 21)),
    ],
)
def test_the_cause_is_in_the_text(reason, cause):
    assert cause_of(reason) == cause_of(framed(reason)) == cause
    assert gist(framed(reason)) == " ".join(reason.split()).rstrip(" :")


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (NVJPEG_NO_MEMORY, "memory"),
        (f"{NVJPEG}CUDA error #2 when running f() at a:1", "memory"),
        (f"{NVIMAGECODEC}Error in the CUDA API call - CUDA Runtime failure '#2' : out of memory", "memory"),
        (f"{NVIMAGECODEC}device allocator failed", "memory"),
        (NVJPEG_BROKEN, "device"),
        (f"{NVIMAGECODEC}Error in the CUDA API call - CUDA Runtime failure '#700' : illegal", "device"),
        (f"{NVJPEG}nvjpeg error #3 (Bad jpeg) when running f()", None),
        (f"{NVJPEG}nvjpeg error #8 (internal error) when running f()", None),
        ("Corrupt JPEG data: 12 extraneous bytes before marker 0xd9", None),
        ("torch: CUDA out of memory. Tried to allocate 20.00 MiB.", None),
    ],
)
def test_what_nvimagecodec_prints_is_heard_where_it_is_not_about_an_image(line, cause):
    assert complaint_in(line) == cause


def test_every_error_is_one_line_without_addresses_and_says_how_to_go_on():
    gpu = torch.device("cuda", 1)
    assert str(decoder_failed(framed(ILLEGAL + "\nStacktrace (9 entries):\n[frame 0]: x.so"), device=gpu)) == (
        "decoder failed: cuda:1 - got CUDA runtime API error cudaErrorIllegalAddress (700): an illegal memory access "
        "was encountered. Look at the GPU with nvidia-smi; the same command goes on from the parts that are done."
    )
    assert str(out_of_memory(NVJPEG_NO_MEMORY, batch_size=256, device=gpu)) == (
        "out of GPU memory: decoding a batch of 256 - got [nvjpeg_cuda_decoder] Could not decode jpeg code stream - "
        "nvjpeg error #5 (allocator failure) when running nvjpegDecodeJpegHost. Free the GPU, and the same command "
        "goes on; or score anew with a smaller -b and --overwrite."
    )
    assert str(out_of_memory("std::bad_alloc", batch_size=16, device=None)).startswith("out of memory: decoding ")


class Failing:
    """A real pipeline whose outputs fail with `reason(images)` of the batch, and succeed if that is None."""

    def __init__(self, pipeline, reason):
        self._real = pipeline._pipe
        self._pipeline = pipeline
        self._reason = reason
        pipeline._pipe = self

    def __getattr__(self, name):
        return getattr(self._real, name)

    def share_outputs(self, stream):
        outputs = self._real.share_outputs(stream)
        if (reason := self._reason([image.tobytes() for image in self._pipeline._fed[0]])) is not None:
            self._real.release_outputs()
            raise RuntimeError(framed(reason))
        return outputs


@pytest.fixture
def failing(monkeypatch):
    """Make a decoder whose pipelines fail with `reason(number of the pipeline, images)`."""
    from vitscore.decode import dali_pipeline as dali_graph
    from vitscore.decode.dali import DaliDecoder

    made, decoders = [], []
    init = dali_graph.DaliPipeline.__init__

    def make(reason, *, batch_size=8, halves=None, **options):
        def start(pipeline, *arguments, **named):
            init(pipeline, *arguments, **named)
            number = len(made)
            made.append(pipeline)
            Failing(pipeline, lambda images: reason(number, images))

        monkeypatch.setattr(dali_graph.DaliPipeline, "__init__", start)
        decoders.append(DaliDecoder([GEOMETRY], batch_size=batch_size, num_threads=2, halves=halves, **options))
        return decoders[-1]

    make.made = made
    yield make
    for decoder in decoders:
        decoder.close()


def jpegs(count, start=0):
    return [pictures.encode(pictures.photo(40 + start + i, 30, i % 2), "JPEG") for i in range(count)]


def submit(decoder, contents):
    decoder.submit([pictures.as_array(content) for content in contents])


@pytest.mark.parametrize("halves", BY_HALVES)
def test_a_cuda_error_ends_the_run_and_no_image_is_blamed(failing, halves):
    contents = jpegs(4)
    made = failing(lambda number, images: ILLEGAL if len(images) == 4 else None, halves=halves)
    submit(made, contents)
    with pytest.raises(SetupError, match=r"^decoder failed: cpu - got CUDA runtime API error cudaErrorIlleg") as caught:
        made.collect()
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert made.again == DecodedAgain()


def test_pipelines_on_a_gpu_that_failed_are_not_taken_down(failing):
    """DALI's destructors raise where CUDA does, which ends the process before the line is printed."""
    pipelines = []
    for device in (torch.device("cuda", 0), None):
        made = failing(lambda number, images: ILLEGAL)
        made._device = device
        submit(made, jpegs(2))
        with pytest.raises(SetupError, match=r"^decoder failed"):
            made.collect()
        pipelines.append(weakref.ref(made._pipeline))
        made.close()
    failing.made.clear()
    gc.collect()
    assert [pipeline() is not None for pipeline in pipelines] == [True, False]


@pytest.mark.parametrize("halves", BY_HALVES)
def test_memory_that_halves_have_and_the_batch_has_not_ends_the_run(failing, halves):
    made = failing(lambda number, images: NO_MEMORY if len(images) == 4 else None, halves=halves)
    submit(made, jpegs(4))
    with pytest.raises(SetupError, match=r"^out of memory: decoding a batch of 4 - got Can't allocate 805306368 bytes"):
        made.collect()


@pytest.mark.parametrize("halves", BY_HALVES)
def test_an_image_that_asks_for_absurd_memory_is_left_to_pillow(failing, halves):
    contents = jpegs(5)
    made = failing(lambda number, images: "std::bad_alloc" if contents[3] in images else None, halves=halves)
    submit(made, contents)
    decoded = made.collect()
    assert not decoded.faults and decoded.pixels[0][3].any()
    assert made.again == DecodedAgain(batches=1, images=5, undecodable=1, rebuilds=0)


def test_a_real_image_that_asks_for_absurd_memory_fails_alone():
    from vitscore.decode.again import Singles
    from vitscore.decode.threads import Threads

    good = pictures.ordinary()["bmp rgba"]
    absurd = good[:21] + b"\xbe" + good[22:]  # a width of three billion
    threads = Threads(1)
    options = {"geometries": (), "batch_size": 2, "num_threads": 1, "device_id": None, "hw_decoder_load": 0.65}
    groups = Singles(options, threads).decode([pictures.as_array(image) for image in (good, absurd)], [(200, 250)] * 2)
    threads.close()
    assert [group.positions for group in groups] == [[0]]


OUT_OF_MEMORY = """
import io, re, resource, sys
import numpy as np
from PIL import Image
from vitscore.decode.dali import DaliDecoder
from vitscore.errors import SetupError
from vitscore.preprocess import Geometry
geometries = [Geometry("exact", (32, 32), "bilinear")]
made = DaliDecoder(geometries, batch_size=2, num_threads=1, halves=sys.argv[1] == "1")
file = io.BytesIO()
Image.new("L", (13_000, 13_000)).save(file, "JPEG")
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), -1))
made.submit([np.frombuffer(file.getvalue(), np.uint8)])
try:
    made.collect()
except SetupError as error:
    print(error)
"""


@pytest.mark.parametrize("halves", ["1", "0"])
def test_a_host_without_memory_ends_the_run_and_the_image_is_not_called_bad(halves):
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, halves], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.startswith("out of memory: decoding a batch of 1 - got std::bad_alloc. Free me"), done.stderr


@pytest.mark.parametrize("halves", BY_HALVES)
def test_a_pipeline_that_stays_invalid_is_replaced_and_only_one_batch_is_decoded_again(failing, halves):
    batches = [jpegs(4, start) for start in (0, 10, 20, 30, 40)]
    clean = failing(lambda number, images: None)
    expected = []
    for batch in batches:
        submit(clean, batch)
        expected.append(clean.collect().pixels[0])
    has_begun = []

    def reason(number, images):
        # The second batch, and from then on all that this pipeline is given.
        is_first = number == first
        if is_first and images == batches[1]:
            has_begun.append(True)
        return UNDECODABLE if is_first and has_begun else None

    first = 1  # the clean decoder's was pipeline 0
    made = failing(reason, halves=halves)
    collected = []
    for number, batch in enumerate(batches):
        submit(made, batch)
        if number >= 2:
            collected.append(made.collect())
    collected += [made.collect(), made.collect()]
    assert all(
        not batch.faults and torch.equal(batch.pixels[0], own) for batch, own in zip(collected, expected, strict=True)
    )
    assert made.again == DecodedAgain(batches=1, images=4, undecodable=0, rebuilds=1)


def test_pipelines_that_all_fail_on_whole_batches_end_the_run(failing):
    made = failing(lambda number, images: UNDECODABLE if len(images) == 4 else None, halves=True)
    with pytest.raises(SetupError, match=r"^decoder failed: cpu - got 3 pipelines in a row failed"):
        for _ in range(9):
            submit(made, jpegs(4))
            made.collect()
    assert made.again.rebuilds == 3


@pytest.mark.parametrize("halves", BY_HALVES)
def test_a_decoder_that_fails_on_every_image_is_at_fault_and_says_what_nvimagecodec_said(failing, halves, capfd):
    is_broken = []

    def reason(number, images):
        if is_broken:
            os.write(2, NVJPEG_BROKEN.encode() + b"\n")
            return UNDECODABLE
        return None

    made = failing(reason, halves=halves)
    submit(made, jpegs(3))
    is_broken.append(True)
    with pytest.raises(SetupError, match=r"^decoder failed: cpu - got \[nvjpeg_hw_decoder\].* CUDA error #7") as caught:
        made.collect()
    assert made.again.undecodable == 0 and "\n" not in str(caught.value)
    made.close()
    assert capfd.readouterr().err == ""


def test_memory_that_nvjpeg_lacked_is_not_lost_though_the_batch_was_decoded(failing):
    """nvImageCodec then decodes on the CPU: the pixels are correct, but every batch takes several times as long."""
    from vitscore.decode.native_stderr import NativeStderr

    made = failing(lambda number, images: None)
    submit(made, jpegs(3))
    os.write(2, NVJPEG_NO_MEMORY.encode() + b"\n")
    NativeStderr._filter.settle()
    with pytest.raises(SetupError, match=r"^out of memory: decoding a batch of 3 - got .*allocator failure"):
        made.collect()


def test_what_another_decoder_has_heard_before_is_not_heard_again(failing):
    made = failing(lambda number, images: None)
    os.write(2, NVJPEG_NO_MEMORY.encode() + b"\n")
    later = failing(lambda number, images: None)
    submit(later, jpegs(2))
    assert not later.collect().faults
    submit(made, jpegs(2))
    with pytest.raises(SetupError, match="out of memory"):
        made.collect()


def test_bad_images_are_counted_however_they_are_found(failing):
    bad = pictures.hidden_bad()["jpeg without its tables"]
    good = jpegs(7)
    collected = []
    for halves in (True, False):
        made = failing(lambda number, images: None, halves=halves)
        for batch in (good, [*good[:2], bad, *good[2:5], bad], [bad], good):
            submit(made, batch)
            collected.append(made.collect())
        assert made.again == DecodedAgain(batches=2, images=8, undecodable=3, rebuilds=0)
    by_halves, one_by_one = collected[:4], collected[4:]
    for ours, theirs in zip(by_halves, one_by_one, strict=True):
        assert ours.faults == theirs.faults and torch.equal(ours.pixels[0], theirs.pixels[0])


def test_the_pipeline_for_halves_is_made_before_the_first_batch_and_for_half_of_one():
    from vitscore.decode.dali import DaliDecoder

    made = DaliDecoder([GEOMETRY], batch_size=9, num_threads=1, halves=True)
    try:
        spare = made._second_try._half._pipeline
        assert spare._pipe.max_batch_size == 5
        submit(made, [*jpegs(8), pictures.hidden_bad()["jpeg without its tables"]])
        assert list(made.collect().faults) == [8]
        assert made._second_try._half._pipeline is spare
    finally:
        made.close()


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({}, ""),
        ({"batches": 1, "undecodable": 1}, "1 batch was decoded again because of 1 image that DALI could not decode"),
        ({"batches": 3, "undecodable": 5}, "3 batches were decoded again because of 5 images that DALI could not"),
        ({"batches": 2, "rebuilds": 2}, "2 batches were decoded again with no image at fault; the decoder was rebu"),
        ({"rebuilds": 1}, "the decoder was rebuilt 1 time"),
    ],
)
def test_what_was_decoded_again_is_a_sentence(counts, said):
    sentence = DecodedAgain(**counts).sentence()
    assert sentence.startswith(said) and bool(sentence) == bool(counts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_full_gpu_is_out_of_memory_and_no_image_is_bad():
    from vitscore.decode.dali import DaliDecoder

    made = DaliDecoder([GEOMETRY], batch_size=4, num_threads=2, device_id=0)
    large = pictures.encode(Image.new("RGB", (9000, 9000), (90, 120, 30)), "JPEG")
    try:
        taken = torch.empty(torch.cuda.mem_get_info(0)[0] - (128 << 20), dtype=torch.uint8, device="cuda:0")
        submit(made, [large] * 4)
        with pytest.raises(SetupError, match=r"^out of GPU memory: decoding a batch"):
            made.collect()
        del taken
    finally:
        made.close()
        torch.cuda.empty_cache()
