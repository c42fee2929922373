"""A decoder that is killed by some images, or hangs, as a broken native one would.

It imports no network, so that the processes it kills start quickly.
"""

import os
import signal
import time
from typing import Any

from semmae.pipeline.image_loading import LoadedImage, load_image
from semmae.pipeline.sources import ImageReader

POISON = b"POISON"
"""What the bytes of an image that kills begin with."""


HANGING = b"HANGING"
"""What the bytes of an image begin with whose decoding does not end."""


def poisoned_load(reader: ImageReader, index: int, *args: Any, **kwargs: Any) -> LoadedImage:
    if reader.read(index).startswith(HANGING):
        with kwargs["clock"].decoding(lambda: reader.plan.key(index)):
            time.sleep(600)
    if reader.read(index).startswith(POISON):
        os.kill(os.getpid(), signal.SIGKILL)
    return load_image(reader, index, *args, **kwargs)
