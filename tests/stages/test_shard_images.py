from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semmae.pipeline.image_loading import load_image
from semmae.pipeline.plan import Plan
from semmae.pipeline.sources import ImageReader, list_images
from semmae.stages.shard_images import ShardImages


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    for number in range(3):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    return list_images(tmp_path)


def test_batches__fatal_images_are_bad_ones_even_where_they_cannot_be_read(plan: Plan) -> None:
    Path(plan.root, plan.key(2)).unlink()
    fatal = {0: "SIGSEGV", 1: "SIGALRM", 2: "SIGSEGV"}
    reader = ImageReader(plan, in_memory_limit=0)
    images = ShardImages(plan, 0, reader, load_image, fatal, None)
    with ThreadPoolExecutor(1) as pool:
        ((first, loaded),) = images.batches(3, pool)
    assert first == 0
    assert [image.bad and image.bad.code for image in loaded] == ["fatal", "hanging", "unreadable"]
    assert [image.crc32 != 0 for image in loaded] == [True, True, False]
    assert all(image.pixels is None for image in loaded)
