"""The base class of the modules of layer kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from megalite.core.layers import Residual
from megalite.core.linear import RowParallelLinear
from megalite.model.attention import AttentionContext
from megalite.model.rope import Rotation


@dataclass(frozen=True, slots=True)
class Norms:
    """What is between a sublayer and the residual stream."""

    before: nn.Module | None
    """Norm of what the sublayer reads; None: it reads the stream itself."""
    after: Callable[[Tensor], Tensor] | None
    """Norm and scale of what the sublayer adds; None: neither."""


class LayerModule(nn.Module):
    """A sublayer on the residual stream.

    `update` applies `forward` to the normed stream x [T, hidden], and adds `out` of the result to the stream. Modules
    that can do better, for instance with the norm inside a product, override it.
    """

    out: RowParallelLinear

    def update(self, x: Residual, norms: Norms, ctx: AttentionContext, rotations: Sequence[Rotation]) -> None:
        """Read the residual stream and add to it, both through `norms`; `rotations`: one for each rotary embedding."""
        self.out.write(x, self(x.normed(norms.before), ctx, rotations), norms.after)
