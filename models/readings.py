"""What is read off a vision transformer: which blocks, their tokens or a facet of their attention.

Legend of shapes: B images, N tokens, D width, A attention heads.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..errors import SettingError

Facet = Literal["tokens", "keys", "queries", "values"]

_THIRD = {"queries": 0, "keys": 1, "values": 2}
"""Where each lies in the output of timm's joint projection."""


@dataclass(frozen=True)
class Reading:
    """What an encoder's patch features and class token are taken from.

    Attributes:
        blocks: Numbered from 1, or from the end, -1 the last; at least one.  The features of
            several are concatenated in the order given.
        kind: ``tokens`` after a block and the final norm, as DINO's
            ``get_intermediate_layers(norm=True)`` gives them; or the keys, queries or values of
            its attention, heads concatenated, as compared in Amir et al., "Deep ViT features as
            dense visual descriptors" (2022).
        pooled: The class token is the mean patch token of the last block, even where the encoder
            has one of its own.

    Raises:
        SettingError: No block, a block 0, or an unknown kind.
    """

    blocks: tuple[int, ...] = (-1,)
    kind: Facet = "tokens"
    pooled: bool = False

    def __post_init__(self) -> None:
        """Refuse what no encoder can be read by."""
        if not self.blocks or 0 in self.blocks:
            raise SettingError(
                f"--blocks is {_listed(self.blocks)}: expected at least one block, numbered from "
                "1, or from the end with -1 the last"
            )
        if self.kind not in get_args(Facet):
            raise SettingError(
                f"--facet is {self.kind!r}: expected one of {', '.join(get_args(Facet))}"
            )

    def indices(self, depth: int) -> tuple[int, ...]:
        """The blocks counted from 0.

        Args:
            depth: Blocks that the encoder has.

        Raises:
            SettingError: The encoder has no such block, or a block is named twice.
        """
        if any(abs(block) > depth for block in self.blocks):
            raise SettingError(
                f"--blocks is {_listed(self.blocks)}, but the encoder has {depth} blocks: "
                f"expected 1 to {depth}, or -{depth} to -1 from the end"
            )
        found = tuple(block - 1 if block > 0 else depth + block for block in self.blocks)
        if len(set(found)) < len(found):
            raise SettingError(
                f"--blocks is {_listed(self.blocks)}: of the encoder's {depth} blocks one is named "
                "twice; name each once"
            )
        return found


DEFAULT_READING = Reading()


def _listed(blocks: tuple[int, ...]) -> str:
    return ",".join(map(str, blocks)) or "empty"


@contextmanager
def outputs_kept(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Keep what modules return while the context is open.

    Args:
        modules: Each returns one tensor, and is called once.

    Yields:
        The output of each, by module; filled as they are called.
    """
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        kept[module] = output

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def class_attention(attention: Attention, projected: Tensor) -> Tensor:
    """What the class token attends to, by head.

    Args:
        attention: The attention layer of a block.
        projected: (B, N, 3 D), what its ``qkv`` made of the tokens; the class token first.

    Returns:
        (B, A, N), summing to 1 over all tokens.
    """
    batch, count, _ = projected.shape
    qkv = projected.reshape(batch, count, 3, attention.num_heads, -1)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    scores = (query * attention.scale) @ key.transpose(2, 3)
    return scores.softmax(dim=-1)[:, :, 0]  # type: ignore[no-any-return]


def facet_of(attention: Attention, projected: Tensor, kind: Facet) -> Tensor:
    """Keys, queries or values of a block, as its attention uses them.

    Args:
        attention: The attention layer of the block.
        projected: (B, N, 3 D), what its ``qkv`` made of the tokens.
        kind: Not ``tokens``.

    Returns:
        (B, N, D), heads concatenated; keys and queries after their norms where there are any.
    """
    batch, count, _ = projected.shape
    qkv = projected.reshape(batch, count, 3, attention.num_heads, -1)
    heads = qkv[:, :, _THIRD[kind]]
    norms = {"queries": attention.q_norm, "keys": attention.k_norm}
    # A view would keep all three thirds in memory.
    return norms.get(kind, nn.Identity())(heads).flatten(2).contiguous()  # type: ignore[no-any-return]
