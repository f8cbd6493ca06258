"""What the module of every layer kind is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from megalite.core.layers import Residual
from megalite.core.linear import RowParallelLinear
from megalite.model.attention import AttentionContext
from megalite.model.rope import Rotation


class LayerModule(nn.Module):
    """A sublayer on the residual stream.

    `update` applies `forward` to the normed stream x [T, hidden], and adds `out` of the result to the stream. Modules
    that can do better, for instance with the norm inside a product, override it.
    """

    out: RowParallelLinear

    def update(
        self,
        x: Residual,
        norm: nn.Module | None,
        post: Callable[[Tensor], Tensor] | None,
        ctx: AttentionContext,
        rotations: Sequence[Rotation],
    ) -> None:
        """Read `norm` of the residual stream, or the stream itself, and add to it, through `post` if there is one.

        `rotations`: one for each of `ModelConfig.ropes`.
        """
        self.out.write(x, self(x.normed(norm), ctx, rotations), post)
