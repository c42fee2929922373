"""A second round of telling parts: learning, from crops, the parts that the first round found.

Ours.  What tells parts in the first round, where on the object content such as this is found, is
said differently of a thing and of the same thing enlarged.  So a predictor learns the first round's
parts of whole images, in them and in random crops of them: it has to say of a crop what was said of
the whole, and by what it learned from all images it takes back the accidents of each.
"""

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.encoders import FrozenEncoder
from ..models.parts import PartLearner
from ..models.predictors import PartPredictor
from ..pipeline.image_source import ImageSource, batches_in_order, drawn
from ..pipeline.progress import Progress
from .predictor_learning import Lesson, learned, measure, statistics
from .second_views import SCALE, look_again

if TYPE_CHECKING:
    from .learn_parts import LearnPartsOptions


@torch.no_grad()
def sample_parts(
    encoder: FrozenEncoder,
    learner: PartLearner,
    images: ImageSource,
    size: tuple[int, int],
    count: int,
    seed: int,
) -> tuple[Lesson, Lesson]:
    """Crops of some images and the images whole, with the parts that a learner finds in the latter.

    Args:
        encoder: The frozen encoder.
        learner: Of the first round; moved to the encoder's device.
        images: The data; one can be read at least.
        size: (H, W) that images are squashed to.
        count: Images, at most.
        seed: Of images and crops.

    Returns:
        Crops, and whole images; targets are parts without the background, which is last.
    """
    device = encoder.mean.device
    grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
    crops: list[tuple[Tensor, Tensor]] = []
    wholes: list[tuple[Tensor, Tensor]] = []
    chosen = drawn(len(images), count, seed)
    learner.to(device)
    with (
        torch.random.fork_rng(devices=[]),
        Progress("looking for parts", len(chosen), "image") as progress,
    ):
        torch.default_generator.manual_seed(seed)
        for _, read in batches_in_order(images, size, 64, "squash", chosen):
            pixels = torch.from_numpy(read).to(device)
            tokens = encoder(pixels)
            maps = learner.maps(learner.patches(tokens, grid), grid)
            if learner.architecture.background != "none":
                maps = maps.roll(-1, dims=1)
            view = look_again(encoder, pixels, scale=SCALE)
            places = F.affine_grid(view.frame, [len(pixels), 1, *grid], align_corners=False)
            there = F.grid_sample(maps, places, padding_mode="border", align_corners=False)
            for made, seen, found in ((crops, view.tokens, there), (wholes, tokens, maps)):
                made.append((seen.patches.half().cpu(), found.argmax(dim=1).flatten(1).cpu()))
            progress.update(len(read))
    of_crops, of_wholes = (
        (torch.cat([seen for seen, _ in made]), torch.cat([parts for _, parts in made]))
        for made in (crops, wholes)
    )
    # As when a crop is asked for its parts, it is told of its places what holds of whole images.
    known = statistics(of_wholes[0], torch.arange(len(of_wholes[0])))
    return Lesson(*of_crops, grid, known), Lesson(*of_wholes, grid, known)


def learn_parts_of_crops(
    crops: Lesson, wholes: Lesson, parts: int, steps: int, seed: int, device: torch.device
) -> PartPredictor:
    """A predictor of the parts that were found in whole images.

    Args:
        crops: From `sample_parts`.
        wholes: Likewise.
        parts: How many there are.
        steps: As in `predictor_learning.learned`.
        seed: Of weights, dropout and batches.
        device: Where to compute.

    Returns:
        On the CPU, frozen.
    """
    _, places, width = wholes.tokens.shape
    model, examined = learned(
        lambda: PartPredictor(width, parts, places),
        (crops, wholes),
        steps,
        seed,
        device,
        "learning parts of crops",
    )
    agreement = (examined.scores.argmax(dim=1) == examined.targets).double().mean()
    print(f"parts of whole images are told in {agreement:.0%} of their crops", file=sys.stderr)
    measure(model, wholes.tokens, wholes.grid)
    return model


def second_round(
    encoder: FrozenEncoder,
    learner: PartLearner,
    images: ImageSource,
    size: tuple[int, int],
    options: "LearnPartsOptions",
) -> PartPredictor:
    """A predictor of the parts that a learner of the first round finds, on the CPU.

    Args:
        encoder: The frozen encoder, on the device where all is computed.
        learner: Moved there.
        images: The data.
        size: (H, W) that images are squashed to.
        options: The learner's settings.
    """
    lessons = sample_parts(encoder, learner, images, size, options.place_images, options.seed)
    device, parts = encoder.mean.device, learner.architecture.parts
    return learn_parts_of_crops(*lessons, parts, options.place_steps, options.seed, device)
