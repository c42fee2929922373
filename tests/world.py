"""Where the tiny data set, encoder, part learner and store of the stage tests are."""

from dataclasses import dataclass
from pathlib import Path

from semmae.stages.learn_parts import LearnPartsOptions
from semmae.stages.pretrain import PretrainOptions
from semmae.storage.store_paths import StorePath, lasts, sizes_below


@dataclass(frozen=True)
class World:
    root: Path

    @property
    def data(self) -> str:
        return str(self.root / "creatures" / "images")

    @property
    def labels(self) -> Path:
        return self.root / "creatures" / "labels"

    @property
    def encoder(self) -> Path:
        return self.root / "encoder"

    @property
    def learner(self) -> Path:
        return self.root / "learner"

    @property
    def store(self) -> Path:
        return self.root / "store"


def lasting_bytes(store: StorePath) -> dict[str, bytes]:
    """Every file of a store but those that differ from run to run."""
    return {name: (store / name).read_bytes() for name in sorted(filter(lasts, sizes_below(store)))}


def pretrain_options(world: World, output: Path, **changes: object) -> PretrainOptions:
    settings: dict[str, object] = {
        "data": world.data,
        "output": output,
        "masking": "random",
        "size": "micro",
        "patch_size": 8,
        "image_size": 32,
        "epochs": 1,
        "batch_size": 16,
        "warmup_epochs": 0.0,
        "loader_workers": 0,
    }
    return PretrainOptions(**{**settings, **changes})  # type: ignore[arg-type]


def learn_options(world: World, output: Path, **changes: object) -> LearnPartsOptions:
    settings: dict[str, object] = {
        "data": world.data,
        "encoder": str(world.encoder),
        "output": output,
        "epochs": 1,
        "batch_size": 16,
        "clusters": 12,
        "num_parts": 3,
        "place_steps": 20,
        "round_steps": 20,
        "loader_workers": 0,
    }
    return LearnPartsOptions(**{**settings, **changes})  # type: ignore[arg-type]
