"""The rooms of the house and what each may import (docs: the architecture is the tree)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("stages", "pipeline", "models", "storage")

MAY_IMPORT = {
    "__main__": {"cli"},
    "cli": {"stages", "storage", "errors"},
    "stages": {"stages", "pipeline", "models", "storage", "errors"},
    "pipeline": {"pipeline", "storage", "errors"},
    "models": {"models", "errors"},
    "storage": {"storage", "errors"},
    "errors": set(),
}
"""What each room may take from the package; every room may take the package's version."""

ONLY_IN = {
    "ray": {
        "pipeline/ray_cluster.py",
        "pipeline/ray_shards.py",
        "pipeline/ray_training.py",
    },
    "typer": {"cli.py"},
    "zarr": {"storage"},
    "numcodecs": {"storage"},
    "fsspec": {"storage/connections.py"},
}
"""Other packages, and the one module or room that may import each."""

FORBIDDEN_IN = {
    "models": {"sklearn", "pyarrow", "pandas", "tensorboard"},
    "storage": {"torch", "timm", "sklearn", "PIL", "tqdm"},
    "pipeline": {"timm"},
}
MAY_TORCH_IN_STORAGE = "storage/checkpoints.py"
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


def sources() -> dict[str, str]:
    """Every module of the package: path from the root, and its text."""
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in sorted(files)}


def imported(path: str, text: str) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it; ours begin with ``semmae``."""
    package = ["semmae", *Path(path).parent.parts]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def faults_of(path: str, text: str) -> list[str]:
    """What a module imports that its room may not."""
    room = path.split("/")[0].removesuffix(".py")
    faults = []
    for name in imported(path, text):
        first, _, rest = name.partition(".")
        if first == "semmae":
            inner = rest.split(".")[0]
            if inner != "__version__" and inner not in MAY_IMPORT.get(room, set()):
                faults.append(f"{path} imports {name}")
            continue
        homes = ONLY_IN.get(first)
        if homes is not None and not {path, room} & homes:
            faults.append(f"{path} imports {first}, which belongs to {', '.join(homes)}")
        if first in FORBIDDEN_IN.get(room, set()) and not (
            first == "torch" and path == MAY_TORCH_IN_STORAGE
        ):
            faults.append(f"{path} imports {first}")
    return faults


def test_imports__keep_their_directions() -> None:
    assert [fault for path, text in sources().items() for fault in faults_of(path, text)] == []


def test_imports__are_all_seen() -> None:
    found = sources()
    assert {"cli.py", "errors.py", "pipeline/cluster.py", "stages/evals/linear.py"} <= set(found)
    assert "semmae.errors.MismatchError" in imported(
        "pipeline/part_maps.py", found["pipeline/part_maps.py"]
    )
    assert any(
        n == "ray" for n in imported("pipeline/ray_shards.py", found["pipeline/ray_shards.py"])
    )


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pipeline/a.py", "from ..stages.pretrain import pretrain"),
        ("pipeline/a.py", "from .. import stages"),
        ("pipeline/a.py", "from ..models import heads"),
        ("pipeline/a.py", "def f():\n    import semmae.models.heads"),
        ("pipeline/a.py", "import ray"),
        ("pipeline/cluster.py", "import ray"),
        ("pipeline/a.py", "import zarr"),
        ("pipeline/deep/a.py", "from ...models.heads import LinearHead"),
        ("models/a.py", "from ..pipeline.options import require"),
        ("models/a.py", "from semmae.storage import files"),
        ("models/a.py", "from semmae import storage"),
        ("storage/a.py", "from ..pipeline.plan import Plan"),
        ("storage/a.py", "import torch.nn as nn"),
        ("storage/checkpoints.py", "from ..models.heads import LinearHead"),
        ("stages/a.py", "from ..cli import main"),
        ("stages/a.py", "import typer"),
        ("stages/evals/a.py", "if True:\n    from ray.data import Dataset"),
        ("cli.py", "from .pipeline.options import require"),
        ("cli.py", "from .models import heads"),
        ("errors.py", "from .storage import files"),
        ("fresh.py", "from .storage import files"),
    ],
)
def test_imports__of_a_wrong_direction_are_found(path: str, text: str) -> None:
    assert len(faults_of(path, text)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("stages/a.py", "from .. import __version__\nfrom ..pipeline.options import require"),
        ("stages/evals/a.py", "from ...models.heads import LinearHead\nfrom ..networks import x"),
        ("pipeline/ray_shards.py", "import ray\nfrom ray.data import Dataset"),
        (
            "pipeline/a.py",
            "import torch\nfrom ..storage.files import read_json\nfrom .plan import Plan",
        ),
        ("storage/checkpoints.py", "import torch\nfrom .files import atomic_file"),
        ("storage/a.py", "import zarr.codecs\nfrom ..errors import UserError"),
        ("models/a.py", "import timm\nfrom ..errors import UserError\nfrom . import heads"),
    ],
)
def test_imports__of_a_right_direction_pass(path: str, text: str) -> None:
    assert faults_of(path, text) == []


def test_lightly__is_imported_in_one_stage_at_most() -> None:
    users = {
        path
        for path, text in sources().items()
        if any(name.split(".")[0] == "lightly" for name in imported(path, text))
    }
    assert len(users) <= 1
    assert all(path.startswith("stages/") for path in users)


def test_modules__are_no_drawers() -> None:
    assert [path for path in sources() if DRAWERS & {*Path(path).with_suffix("").parts}] == []


@pytest.mark.parametrize("path", sorted(sources()))
def test_modules__say_what_they_are_for(path: str) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))
