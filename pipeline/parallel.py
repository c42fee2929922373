"""The model of a task in one process, replicated in several (DDP), or sharded over them (FSDP2).

Tasks use their models as they like, by any method; so what is wrapped is the work on a part of a
batch, with the model inside.  Checkpoints are the same whichever it is.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

R = TypeVar("R")


class _Inside(nn.Module):
    """Work with a model, as the forward pass of a module that holds ``held`` of it."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, work: Callable[[], R]) -> R:
        return work()


class Parallel:
    """A model as all processes of a run train it; it is changed in place.

    Batches must change none of its buffers, as batch norms would: each process sees its own share.

    Args:
        model: On its device, the same weights in every process.
        device: Of the model.
        sharding: ``none`` keeps all weights in every process, ``fsdp`` a share of them; in one
            process there is nothing to share.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, sharding: Literal["none", "fsdp"]
    ) -> None:
        self._model = model
        self._replicas: DistributedDataParallel | None = None
        self._shards: FSDPModule | None = None
        if ranks.count() == 1:
            return
        # Starts that were computed in each process may differ in a last bit on GPUs.
        ranks.send_to_all({**dict(model.named_parameters()), **dict(model.named_buffers())})
        if sharding == "fsdp":
            self._shards = _sharded(model, device)
        else:
            held = nn.ParameterList([p for p in model.parameters() if p.requires_grad])
            # On CPUs a resumed run gives the bits of one that was not interrupted.  Looking for
            # unused parameters keeps the buckets of gradients as they are; otherwise they are laid
            # out anew after the first step, a resumed run begins with other ones, and three
            # processes or more then add up in another order (seen: other last bits).  A parameter
            # that is unused indeed spares the warning that none is.  On GPUs, where no bits are
            # promised, the host would wait for the device at each step to learn which are unused.
            # Every task gives each of its parameters a gradient, so plain DDP misses none.
            steady = device.type == "cpu"
            if steady:
                held.append(nn.Parameter(torch.zeros(1)))
            self._replicas = DistributedDataParallel(_Inside(held), find_unused_parameters=steady)

    def run(self, work: Callable[[], R]) -> R:
        """Do work with the model; all processes must do it together."""
        wrapped = self._replicas or self._shards
        return work() if wrapped is None else wrapped(work)  # type: ignore[operator]

    @contextlib.contextmanager
    def part_of_step(self, last: bool) -> Iterator[None]:
        """Within, gradients are computed; those of the ``last`` part bring the means over all."""
        if self._shards is not None:
            self._shards.set_requires_gradient_sync(last)
        with self._replicas.no_sync() if self._replicas and not last else contextlib.nullcontext():
            yield

    def examine(self, work: Callable[[], R]) -> R:
        """Do work that trains nothing, with the model in evaluation, in all processes alike."""
        self._model.eval()
        if self._shards is None:
            return work()
        with torch.no_grad():
            return self.run(work)

    def states(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """Whole states of model and optimiser; where they are sharded, in the first process only.

        All processes must ask together.
        """
        return self.gathered(self._model.state_dict()), self.gathered(optimizer.state_dict())

    def gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state with whole tensors; where they are sharded, in the first process only.

        All processes must ask together.
        """
        return dict(state) if self._shards is None else _gathered(state)

    def shared_out(self, whole: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, sharded as another one of its shape is."""
        return whole if self._shards is None else _like(whole, like)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Load a whole state into the optimiser of this model, as `states` gave it."""
        if self._shards is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            held = {
                index: {name: _like(value, parameters[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            state = {**state, "state": held}
        optimizer.load_state_dict(dict(state))


def _sharded(model: nn.Module, device: torch.device) -> "FSDPModule":
    from torch.distributed.device_mesh import init_device_mesh  # these take seconds to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.count(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(_Inside(model), mesh=mesh)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are put together at a time: members of lists of equal modules."""
    if isinstance(model, nn.ModuleList | nn.Sequential):
        members = list(model)
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            return members
    return [block for child in model.children() for block in blocks(child)]


def _gathered(value: Any) -> Any:
    """The same with whole tensors on the CPU; in other processes than the first with none."""
    if isinstance(value, Mapping):
        return {name: _gathered(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_gathered(item) for item in value]
    if isinstance(value, Tensor):
        whole = whole_tensor(value)
        return whole.cpu() if ranks.rank() == 0 else whole.new_zeros(0)
    return value


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together where it is sharded; all processes must ask together."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _like(value: Any, parameter: Tensor) -> Any:
    """A tensor of a state, sharded as its parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if (
        not isinstance(parameter, DTensor)
        or not isinstance(value, Tensor)
        or value.shape != parameter.shape
    ):
        return value
    there = value.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements)
