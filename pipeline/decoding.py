"""Encoded images in, upright RGB pixels out; whatever cannot be decoded comes out as `BadImage`.

The recipe is the field's: what ``PIL.Image.open(file).convert("RGB")`` gives, plus the EXIF
orientation.  Where that recipe loses the picture (16-bit greyscale is clipped to white) or depends
on process-wide switches of Pillow that a user may have turned, this module has its own rule.

Pillow reads every header.  The pixels of a usual JPEG are decoded by simplejpeg, which gives the
same ones in three quarters of the time; what it has any complaint about is left to Pillow.
"""

import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

#: Pixels (width times height) above which an image is refused: where Pillow starts to warn.
MAX_PIXELS = 89_478_485

# Only what image data sets hold: Pillow's other readers start programs (EPS) or are seldom tried.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_EXIF_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow calls an image of 0 pixels "not identified"; these find the size that its header declares.
_DECLARED_SIZES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR(.{8})", re.DOTALL), ">II"),
    (re.compile(rb"GIF8[79]a(.{4})", re.DOTALL), "<HH"),
    (re.compile(rb"BM.{16}(.{8})", re.DOTALL), "<ii"),
    (re.compile(rb"\xff\xd8\xff.*?\xff[\xc0-\xc2].{3}(.{4})", re.DOTALL), ">HH"),
)

_TRUNCATION = re.compile(r"truncated|not enough image data|unexpected end|buffer is not large")
_OBJECT = re.compile(r"<[^<>]*0x[0-9a-fA-F]+[^<>]*>|\b0x[0-9a-fA-F]{6,}\b")
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/][\w.\-+@ ]*[\w.\-+@])+")
_LONGEST_MESSAGE = 200


class BadImage(Exception):  # noqa: N818  (a record of the data, not a fault of the program)
    """An image that cannot be used.

    Two runs over the same file give equal ``code``, ``kind`` and ``message``, wherever the file
    lies, so that they may be stored.

    Args:
        code: Short slug: ``empty``, ``not-an-image``, ``truncated``, ``no-pixels``, ``too-large``,
            ``decoder-error``, ``unreadable`` (the file could not be read at all), ``fatal``
            (decoding it kills the process) or ``hanging`` (it does not end).
        message: What was wrong; cleaned here of memory addresses, paths and line breaks.
        kind: Name of the exception class that was met.
    """

    def __init__(self, code: str, message: str, kind: str = "BadImage") -> None:
        self.code = code
        self.message = _clean(message)
        self.kind = kind
        super().__init__(code, self.message, kind)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode one image to upright RGB.

    JPEG, PNG, WebP, BMP, TIFF, GIF and PPM are read, by content and not by name; of animations the
    first frame.  The EXIF orientation is applied.  Bytes after the end of the image are ignored.

    8-bit modes follow ``convert("RGB")``: alpha and palette transparency are dropped, not
    composited; CMYK (also Adobe's inverted one) and YCCK are converted without a colour profile.
    Integer greyscale of more than 8 bits is read as 16-bit and keeps its high byte
    (``value >> 8``, clipped to 0..255); Pillow would clip it at 255.  Float greyscale is scaled by
    255 if all of it lies in [0, 1], else read as 0..255; both are clipped and rounded, NaN is 0.

    The result does not depend on ``LOAD_TRUNCATED_IMAGES`` or ``MAX_IMAGE_PIXELS`` of Pillow.

    Args:
        data: The encoded file.

    Returns:
        uint8 of shape (H, W, 3), 0 to 255, writable and contiguous.

    Raises:
        BadImage: The bytes are no image, are cut off or damaged, or the header declares no pixels
            or more than `MAX_PIXELS` (found before any pixel is decoded).
        MemoryError: The machine, not the image, is at fault.
    """
    if not data:
        raise BadImage("empty", "the file holds no bytes")
    try:
        with _strict_pillow():
            return _decode(data)
    except MemoryError:
        raise
    except Exception as error:
        raise _as_bad_image(error, data) from error


def _decode(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"{width} x {height} pixels are more than the {MAX_PIXELS} that are decoded"
            )
        usual_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
        if usual_jpeg and _orientation(image) not in _TO_UPRIGHT:
            with suppress(ValueError):
                return _pixels_of_jpeg(data, image.size)
        image.load()
        turn = _TO_UPRIGHT.get(_orientation(image))
        return _to_rgb(image if turn is None else image.transpose(turn))


def _pixels_of_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) of a greyscale or colour JPEG.

    Raises:
        ValueError: libjpeg has an error or a warning, or finds another (W, H) than Pillow.
    """
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    if pixels.shape[1::-1] != size:
        raise ValueError(f"{pixels.shape} is another size than {size}")
    return pixels


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; damaged EXIF spoils no pixels and reads as 1."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) of a loaded image of any mode."""
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=np.inf, neginf=-np.inf)
        in_unit_range = bool(((values >= 0) & (values <= 1)).all())
        scaled = values * 255 if in_unit_range else values
        grey = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    elif image.mode.startswith("I"):
        grey = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
    else:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return np.repeat(grey[:, :, None], 3, axis=2)


def _as_bad_image(error: Exception, data: bytes) -> BadImage:
    """The record of what a decoder raised."""
    kind, message = type(error).__name__, str(error)
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("too-large", message, kind)
    if isinstance(error, UnidentifiedImageError):
        if _declares_no_pixels(data):
            return BadImage("no-pixels", "the header declares a width or height of 0", kind)
        return BadImage("not-an-image", f"no readable {', '.join(_FORMATS)} header", kind)
    # An index or struct error inside a reader means that it ran past the last byte.
    ran_out = isinstance(error, EOFError | IndexError | struct.error)
    if ran_out or _TRUNCATION.search(message.lower()) or _riff_is_cut_off(data):
        return BadImage("truncated", message or "the data end too early", kind)
    return BadImage("decoder-error", message, kind)


def _declares_no_pixels(data: bytes) -> bool:
    for pattern, layout in _DECLARED_SIZES:
        found = pattern.match(data)
        if found is not None:
            return 0 in struct.unpack(layout, found[1])
    return False


def _riff_is_cut_off(data: bytes) -> bool:
    """The WebP decoder does not say why it fails, but its container declares its length."""
    return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") > len(data) - 8


def _clean(message: str) -> str:
    """One line without what differs from run to run: addresses of objects, places of files."""
    message = _PATH.sub("(path)", _OBJECT.sub("(object)", message))
    return " ".join(message.split())[:_LONGEST_MESSAGE]


class _Switches:
    """Pillow's process-wide switches, held at our values while any thread decodes.

    They are counted, not locked: threads decode at the same time, the first one in sets the
    switches, the last one out puts the user's values back.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decoding = 0
        self.undo = ExitStack()

    def enter(self) -> None:
        with self.lock:
            self.decoding += 1
            if self.decoding > 1:
                return
            self.undo.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
            self.undo.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            self.undo.callback(
                setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES
            )
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS
            ImageFile.LOAD_TRUNCATED_IMAGES = False

    def leave(self) -> None:
        with self.lock:
            self.decoding -= 1
            if self.decoding == 0:
                self.undo.close()

    def forget_other_threads(self) -> None:
        """In a forked child the threads that were decoding, and their lock, are gone."""
        self.lock = threading.Lock()
        self.decoding = 0
        self.undo.close()


_switches = _Switches()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_switches.forget_other_threads)


@contextmanager
def _strict_pillow() -> Iterator[None]:
    _switches.enter()
    try:
        yield
    finally:
        _switches.leave()
