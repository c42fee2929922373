import os
import pickle
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from semmae.pipeline import decoding
from semmae.pipeline.decoding import MAX_PIXELS, BadImage, decode_image

CODES = {"empty", "not-an-image", "truncated", "no-pixels", "too-large", "decoder-error"}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(Image.open(BytesIO(data)).convert("RGB"))


def png(width: int, height: int, scanlines: bytes = zlib.compress(b"")) -> bytes:
    """A PNG of any declared size, whatever its pixel data are."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", head), (b"IDAT", scanlines), (b"IEND", b"")):
        checksum = zlib.crc32(name + body)
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)
    return data


MODES = {
    "JPEG": ["1", "L", "RGB", "CMYK", "YCbCr"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "WEBP": ["L", "LA", "RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"],
    "GIF": ["1", "L", "P", "RGB", "RGBA"],
    "PPM": ["1", "L", "RGB"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_decode_image__is_pillows_convert_for_8_bit_modes(kind: str, mode: str) -> None:
    image = PICTURE.convert("L").convert(mode) if mode in ("1", "LA") else PICTURE.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(PIXELS[:, :, 0]))
    data = encoded(image, kind)
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, by_pillow(data))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 5}])
def test_decode_image__equals_pillow_on_rgb_jpegs(options: dict[str, Any]) -> None:
    data = encoded(PICTURE, "JPEG", **options)
    np.testing.assert_array_equal(decode_image(data), by_pillow(data))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_decode_image__leaves_pillow_the_header_alone_of_a_usual_jpeg(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(PICTURE.convert(mode), "JPEG")
    expected = by_pillow(data)
    monkeypatch.delattr(ImageFile.ImageFile, "load")
    np.testing.assert_array_equal(decode_image(data), expected)


def test_decode_image__keeps_the_colours_of_adobes_inverted_cmyk() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(decode_image(data).astype(int) - (255, 0, 0)).max() <= 3


def test_decode_image__reads_ycck_as_pillow_does() -> None:
    data = bytearray(encoded(PICTURE.convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2  # the colour transform: YCCK
    pixels = decode_image(bytes(data))
    np.testing.assert_array_equal(pixels, by_pillow(bytes(data)))
    assert (pixels != by_pillow(encoded(PICTURE.convert("CMYK"), "JPEG"))).any()


def test_decode_image__drops_palette_transparency_without_a_warning() -> None:
    data = encoded(PICTURE.convert("P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode_image(data), by_pillow(data))


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B"), ("TIFF", "I")]
)
def test_decode_image__keeps_the_high_byte_of_16_bit_greyscale(kind: str, mode: str) -> None:
    values = np.random.default_rng(1).integers(0, 1 << 16, (9, 7))
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (7, 9), values.astype(dtype).tobytes())
    expected = np.array([[[value // 256] * 3 for value in row] for row in values.tolist()])
    np.testing.assert_array_equal(decode_image(encoded(image, kind)), expected)


def test_decode_image__keeps_the_high_byte_of_16_bit_pgm() -> None:
    values = np.array([[0, 255, 256], [513, 40000, 65535]])
    data = b"P5\n3 2\n65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(data)[:, :, 1], values // 256)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-5.0, 100.4, 300.0], [0, 100, 255]),
        ([np.nan, 0.25, np.inf], [0, 0, 255]),
    ],
)
def test_decode_image__scales_float_greyscale(values: list[float], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert decode_image(data)[0].tolist() == [[value] * 3 for value in expected]


UPRIGHT: dict[int, Callable[[int, int, int, int], tuple[int, int]]] = {
    1: lambda y, x, H, W: (y, x),
    2: lambda y, x, H, W: (y, W - 1 - x),
    3: lambda y, x, H, W: (H - 1 - y, W - 1 - x),
    4: lambda y, x, H, W: (H - 1 - y, x),
    5: lambda y, x, H, W: (x, y),
    6: lambda y, x, H, W: (H - 1 - x, y),
    7: lambda y, x, H, W: (H - 1 - x, W - 1 - y),
    8: lambda y, x, H, W: (x, W - 1 - y),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image__turns_exif_orientations_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = decode_image(encoded(PICTURE, kind))
    H, W, _ = stored.shape
    h, w = (W, H) if orientation > 4 else (H, W)
    place = UPRIGHT[orientation]
    expected = [[stored[place(y, x, H, W)].tolist() for x in range(w)] for y in range(h)]
    pixels = decode_image(encoded(PICTURE, kind, exif=exif))
    np.testing.assert_array_equal(pixels, np.array(expected))


def test_decode_image__does_not_mind_damaged_exif() -> None:
    data = encoded(PICTURE, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(decode_image(data), by_pillow(encoded(PICTURE, "JPEG")))


def test_decode_image__takes_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_decode_image__ignores_bytes_after_the_end(kind: str) -> None:
    data = encoded(PICTURE, kind)
    np.testing.assert_array_equal(decode_image(data + b"\x00trailer" * 50), decode_image(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("keep", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("lenient", [False, True])
def test_decode_image__refuses_truncated_files_whatever_pillows_flag(
    kind: str, keep: float, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = encoded(PICTURE, kind)
    with pytest.raises(BadImage) as caught:
        decode_image(data[: int(len(data) * keep)])
    # A GIF's first 768 bytes are its palette: before the frame it is no picture yet.
    assert caught.value.code == "truncated" or (kind, caught.value.code) == ("GIF", "not-an-image")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"an image, honestly", "not-an-image"),
        (bytes(4096), "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
        (png(0, 10), "no-pixels"),
        (b"GIF89a" + bytes(10), "no-pixels"),
        (png(MAX_PIXELS + 1, 1), "too-large"),
        (png(50_000, 50_000), "too-large"),
        (png(10, 10, b"no zlib stream"), "decoder-error"),
    ],
)
def test_decode_image__names_what_is_wrong(data: bytes, code: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    assert caught.value.code == code
    assert caught.value.message


@pytest.mark.parametrize("limit", [None, 10])
def test_decode_image__has_its_own_pixel_limit(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    np.testing.assert_array_equal(decode_image(encoded(PICTURE, "PNG")), PIXELS)
    with pytest.raises(BadImage, match="too-large"):
        decode_image(png(MAX_PIXELS + 1, 1))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_decode_image__leaves_memory_shortage_to_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(MemoryError):
        decode_image(b"x")


def outcome(data: bytes) -> tuple[str, ...] | bytes:
    try:
        return decode_image(data).tobytes()
    except BadImage as bad:
        return bad.code, bad.kind, bad.message


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]),
    changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=6),
    keep=st.integers(0, 3000),
)
def test_decode_image__gives_pixels_or_the_same_bad_image_for_any_damage(
    kind: str, changes: list[tuple[int, int]], keep: int
) -> None:
    data = bytearray(encoded(PICTURE, kind))
    for place, value in changes:
        data[place % len(data)] = value
    first = outcome(bytes(data[:keep]))
    assert first == outcome(bytes(data[:keep]))
    assert isinstance(first, bytes) or first[0] in CODES


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["L", "RGB"]),
    options=st.fixed_dictionaries(
        {"progressive": st.booleans(), "subsampling": st.integers(0, 2)},
        optional={"restart_marker_blocks": st.integers(1, 3)},
    ),
    changes=st.lists(st.tuples(st.integers(2, 3000), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 40),
)
def test_decode_image__is_pillows_word_on_a_jpeg_with_any_damage(
    mode: str, options: dict[str, Any], changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(encoded(PICTURE.convert(mode), "JPEG", **options))
    for place, value in changes:
        data[place % len(data)] = value
    damaged = bytes(data[: len(data) - cut])
    found = outcome(damaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simplejpeg, "decode_jpeg", Mock(side_effect=ValueError))
        assert found == outcome(damaged)


def test_decode_image__puts_pillows_switches_back_after_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    whole = encoded(PICTURE, "JPEG")
    truncated, expected = whole[:-300], by_pillow(whole)
    filters, wrong = list(warnings.filters), []

    def work() -> None:
        for _ in range(50):
            if not np.array_equal(decode_image(whole), expected):
                wrong.append("pixels")
            if not isinstance(outcome(truncated), tuple):
                wrong.append("a truncated file passed")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert Image.MAX_IMAGE_PIXELS is None
    assert list(warnings.filters) == filters


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_decode_image__works_in_a_process_forked_while_another_thread_decodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(PICTURE, "PNG")
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with decoding._strict_pillow():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    child = os.fork()
    if child == 0:
        right = ImageFile.LOAD_TRUNCATED_IMAGES and np.array_equal(decode_image(data), PIXELS)
        os._exit(0 if right and ImageFile.LOAD_TRUNCATED_IMAGES else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ("cannot open <_io.BytesIO object at 0x7f31a2b0> now", "cannot open (object) now"),
        ("at 0x7f31a2b0", "at (object)"),
        ("no file '/tmp/run 7/a.jpg' there", "no file '(path)' there"),
        (r"no file C:\data\a.jpg", "no file (path)"),
        ("two\n  lines\tof text", "two lines of text"),
        ("I;16B/RGB or 1/2, marker 0xff", "I;16B/RGB or 1/2, marker 0xff"),
    ],
)
def test_bad_image__cleans_its_message(message: str, cleaned: str) -> None:
    assert BadImage("decoder-error", message).message == cleaned


def test_bad_image__survives_pickling() -> None:
    bad = pickle.loads(pickle.dumps(BadImage("truncated", "too short", "OSError")))
    assert (bad.code, bad.message, bad.kind) == ("truncated", "too short", "OSError")
    assert str(bad) == "truncated: too short"
