"""Tiny encoded images, and data sets of them in every form."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4 + number % 3, 4), (number % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(
    place: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w", format=format) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return place


def write_forms(root: Path, images: Sequence[bytes]) -> dict[str, Path]:
    """The same images, in classes 0 and 1 in turn, as a folder, as Parquet and as tars."""
    forms = {form: root / form for form in ("folder", "parquet", "tars")}
    for number, data in enumerate(images):
        place = forms["folder"] / "train" / f"class-{number % 2}" / f"{number:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    half = len(images) // 2
    for shard, numbers in enumerate((range(half), range(half, len(images)))):
        labels = [number % 2 for number in numbers]
        struct = pa.array([{"bytes": images[number], "path": "x"} for number in numbers])
        table = pa.table({"image": struct, "label": pa.array(labels, pa.int64())})
        forms["parquet"].mkdir(exist_ok=True)
        pq.write_table(
            table,
            forms["parquet"] / f"train-{shard}.parquet",
            row_group_size=3,
            write_page_checksum=True,
        )
        members = [
            (f"{number:03d}{ending}", content)
            for number in numbers
            for ending, content in ((".png", images[number]), (".cls", b"%d" % (number % 2)))
        ]
        write_tar(forms["tars"] / f"train-{shard}.tar", members)
    return forms
