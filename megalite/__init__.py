"""megalite: run and train large language models over many accelerators from one config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalite.config.schema import SamplingParams as SamplingParams
    from megalite.config.structured import StructuredOutputsParams as StructuredOutputsParams
    from megalite.inference.balancer import LoadBalancer as LoadBalancer
    from megalite.inference.llm import LLM as LLM

__version__ = "0.7.0"
__all__ = ["LLM", "LoadBalancer", "SamplingParams", "StructuredOutputsParams"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import megalite` stays light (no torch, deepspeed or tokenizers)."""
    if name == "LLM":
        from megalite.inference.llm import LLM

        return LLM
    if name == "LoadBalancer":
        from megalite.inference.balancer import LoadBalancer

        return LoadBalancer
    if name == "SamplingParams":
        from megalite.config.schema import SamplingParams

        return SamplingParams
    if name == "StructuredOutputsParams":
        from megalite.config.structured import StructuredOutputsParams

        return StructuredOutputsParams
    raise AttributeError(f"module 'megalite' has no attribute {name!r}")
