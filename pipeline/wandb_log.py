"""Logs on Weights & Biases, beside TensorBoard, where ``--wandb`` asks for them."""

import contextlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingError, SettingError
from ..storage.files import read_json, write_json
from .options import TrainingOptions, plain_options
from .runs import Board
from .tasks import Task


def refuse_missing_wandb(options: TrainingOptions) -> None:
    """Refuse ``--wandb`` where the package is not installed.

    Raises:
        MissingError: It is not.
    """
    if options.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise MissingError(
            f"--wandb {options.wandb} needs the package wandb, which is not installed: "
            "pip install 'semmae[wandb]', or leave --wandb away"
        )


def wandb_boards(task: Task, options: TrainingOptions) -> list[Board]:
    """The board of a run on Weights & Biases; none where it is not asked for.

    Raises:
        SettingError: The service refuses, such as without a key, or cannot be reached.
    """
    if options.wandb is None:
        return []
    config = {"kind": task.kind, **plain_options(options), "model": task.architecture}
    return [WandbBoard(options.wandb, options.output, config)]


class WandbBoard:
    """One run on Weights & Biases; its id stands in ``RUN/wandb.json``, so that it goes on.

    What was logged cannot be taken back there: points that an interrupted run had after its newest
    checkpoint stay as they are, and are not sent again.

    Args:
        project: Name of the project.
        folder: Of the run.
        config: Settings to show.

    Raises:
        SettingError: The service refuses, such as without a key, or cannot be reached.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # takes a second, and is an extra

        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project,
                id=_id_of(folder),
                resume="allow",
                name=folder.absolute().name,
                dir=str(folder),
                config=dict(config),
                allow_val_change=True,
            )
        except wandb.Error as error:
            said = " ".join(str(error).split())
            raise SettingError(
                f"--wandb {project}: Weights & Biases says {said!r}; run `wandb login`, or set "
                "WANDB_MODE=offline and `wandb sync` later"
            ) from error
        self._begins = self._run.step

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """As of `Board`."""
        self._log(dict(values), step)

    def picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """As of `Board`."""
        self._log({name: self._image(image)}, step)

    def close(self, failed: bool) -> None:
        """As of `Board`."""
        self._run.finish(exit_code=int(failed))

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._begins:
            self._run.log(values, step=step)


def _id_of(folder: Path) -> str:
    """The id of a run, made when it is first asked for."""
    path = folder / "wandb.json"
    with contextlib.suppress(MissingError):
        return str(read_json(path)["id"])
    made = secrets.token_hex(4)
    write_json(path, {"id": made})
    return made
