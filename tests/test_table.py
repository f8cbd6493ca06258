"""The weight table, for any shape and any layout: every element exactly where it must be, and back."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.layout import KVHeads, LayerCosts, Layout, QueryHeads, share
from megalite.model.config import ModelConfig
from megalite.model.kinds.base import transformer_layer
from megalite.model.kinds.dense import DenseMLP
from megalite.model.kinds.experts import Experts, Router
from megalite.model.kinds.softmax import SoftmaxAttention
from megalite.weights.table import hf_shapes, owned


@st.composite
def configs(draw) -> ModelConfig:
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3", "mixtral", "gemma2", "phi3", "gpt2"]))
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    if family == "gpt2":
        group = 1
    layers = draw(st.integers(1, 4))
    gpt2 = family == "gpt2"
    attention = SoftmaxAttention(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        scale=1.0,
        qkv_bias=family in ("qwen2", "gpt2"),
        out_bias=gpt2,
        qk_norm="head" if family == "qwen3" else None,
    )
    mlp = DenseMLP(intermediate_size=draw(st.integers(1, 13)), gated=not gpt2, bias=gpt2)
    if family == "mixtral":
        mlp = Experts(num_experts=draw(st.integers(1, 5)), intermediate_size=3, router=Router(top_k=1, normalize=True))
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(2, 23)),
        hidden_size=draw(st.integers(1, 3)) * 4,
        max_position_embeddings=8,
        layers=(transformer_layer(attention, mlp, post_norms=family == "gemma2"),) * layers,
        tie_embeddings=gpt2 or draw(st.booleans()),
        norm="layer" if gpt2 else "rms",
        learned_positions=gpt2,
    )


@st.composite
def configs_and_layouts(draw) -> tuple[ModelConfig, Layout]:
    config = draw(configs())
    pp = draw(st.integers(1, config.num_layers))
    interleave = draw(st.integers(1, config.num_layers // pp)) if pp > 1 else 1
    stages = (config.num_layers - pp + 1, *(1,) * (pp - 1)) if interleave == 1 and draw(st.booleans()) else ()
    return config, Layout(draw(st.integers(1, 6)), pp, draw(st.integers(1, 2)), interleave=interleave, stages=stages)


def numbered(config: ModelConfig) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, every element with a number of its own."""
    tensors, start = {}, 0
    for name, shape in hf_shapes(config).items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(start, start + size).reshape(shape)
        start += size
    return tensors


def cut(part, tensor: np.ndarray) -> np.ndarray:
    """The range of a stored tensor that a part is, turned as the local parameter."""
    piece = part.piece
    chosen = np.take(tensor, range(part.lo, part.hi), axis=piece.hf_dim)
    return chosen.T if piece.transpose else chosen


def local_parameters(config: ModelConfig, layout: Layout, rank: int) -> dict[str, np.ndarray]:
    """What a rank holds; fails where a parameter has a gap or is written twice."""
    tensors = numbered(config)
    parts = defaultdict(list)
    for part in owned(config, layout, rank):
        parts[part.piece.param].append(part)
    params = {}
    for name, mine in parts.items():
        dim = mine[0].piece.dim
        mine.sort(key=lambda part: part.start)
        ends = [part.start + part.hi - part.lo for part in mine]
        assert [part.start for part in mine] == [0, *ends[:-1]], f"{name} has gaps or overlaps"
        params[name] = np.concatenate([cut(part, tensors[part.piece.hf]) for part in mine], axis=dim)
        assert params[name].size == sum(part.elements for part in mine)
    return params


@settings(max_examples=60, deadline=None)
@given(configs_and_layouts())
def test_export_gives_back_every_element(case):
    config, layout = case
    tensors = numbered(config)
    back = {name: np.full(tensor.shape, -1) for name, tensor in tensors.items()}
    for rank in layout.replicas()[-1]:
        params = local_parameters(config, layout, rank)
        for part in owned(config, layout, rank):
            piece = part.piece
            local = np.take(params[piece.param], range(part.start, part.start + part.hi - part.lo), axis=piece.dim)
            where = [slice(None)] * back[piece.hf].ndim
            where[piece.hf_dim] = slice(part.lo, part.hi)
            back[piece.hf][tuple(where)] = local.T if piece.transpose else local
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(configs_and_layouts())
def test_only_what_must_be_is_held_twice(case):
    config, layout = case
    total = defaultdict(int)
    for rank in layout.replicas()[0]:
        for part in owned(config, layout, rank):
            total[part.piece.param, part.piece.hf, part.piece.hf_start] += part.hi - part.lo
    for rank in layout.replicas()[0]:
        for part in owned(config, layout, rank):
            piece = part.piece
            held = total[piece.param, piece.hf, piece.hf_start]
            whole = piece.split.total
            if isinstance(piece.split, KVHeads) and layout.tp > piece.split.kv_heads:
                assert held == layout.tp * piece.split.head_dim  # one KV head on every rank
            elif part.hi - part.lo == whole and piece.place is None:
                assert held in (whole, whole * layout.tp)
            else:
                assert held == whole


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_query_heads_sit_with_their_kv_head(kv_heads, group, tp):
    for index in range(tp):
        q_lo, q_hi = QueryHeads(kv_heads * group, kv_heads, 1).range(tp, index)
        k_lo, k_hi = KVHeads(kv_heads, 1).range(tp, index)
        local_q, local_k = q_hi - q_lo, k_hi - k_lo
        assert local_q % max(local_k, 1) == 0
        for j in range(local_q):
            assert k_lo + j // (local_q // local_k) == (q_lo + j) // group


@given(st.integers(0, 100), st.integers(1, 20))
def test_share_is_a_balanced_partition(units, parts):
    ranges = [share(units, parts, index) for index in range(parts)]
    assert ranges[0][0] == 0 and ranges[-1][1] == units
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    sizes = [hi - lo for lo, hi in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(0, 20), st.integers(1, 7))
def test_stages_are_the_best_cut(layers, first, last, stages):
    stages = min(stages, len(layers))
    costs = LayerCosts(layers=tuple(layers), first=first, last=last)
    layout = Layout(pp=stages)
    ranges = [layout.layers(stage, costs) for stage in range(stages)]
    assert [layer for stage in ranges for layer in stage] == list(range(len(layers)))
    assert all(ranges)

    def most_expensive(cuts: tuple[int, ...]) -> int:
        bounds = list(zip(cuts, cuts[1:], strict=False))
        cost = [sum(layers[a:b]) for a, b in bounds]
        cost[0] += first
        cost[-1] += last
        return max(cost)

    def every_cut(start: int, left: int):
        if left == 1:
            yield (len(layers),)
            return
        for end in range(start + 1, len(layers) - left + 2):
            yield from ((end, *rest) for rest in every_cut(end, left - 1))

    chosen = most_expensive((0, *(stage.stop for stage in ranges)))
    assert chosen == min(most_expensive((0, *cuts)) for cuts in every_cut(0, stages))


def test_chunks_are_dealt_out_in_turn():
    costs = LayerCosts(layers=(1,) * 9, first=1, last=1)
    layout = Layout(pp=2, interleave=2)
    parts = [Layout(pp=4).layers(part, costs) for part in range(4)]
    assert layout.chunks(0, costs) == (parts[0], parts[2]) and layout.chunks(1, costs) == (parts[1], parts[3])
    assert layout.layers(1, costs) == (*parts[1], *parts[3])
    assert str(layout) == "tp=1,pp=2,dp=1,interleave=2"
    with pytest.raises(ValueError, match="interleave=2 needs more than one pipeline stage"):
        Layout(interleave=2)


def test_stages_by_hand():
    costs = LayerCosts(layers=(1,) * 9, first=1, last=100)
    layout = Layout(pp=3, stages=(4, 4, 1))
    assert [layout.layers(stage, costs) for stage in range(3)] == [range(4), range(4, 8), range(8, 9)]
    assert str(layout) == "tp=1,pp=3,dp=1,layers=[4,4,1]"
    with pytest.raises(ValueError, match="are 9 layers, the model has 2"):
        layout.layers(0, LayerCosts(layers=(1, 1)))
    for wrong in ({"stages": (9,)}, {"stages": (5, 4, 0)}, {"stages": (3, 3, 3), "interleave": 3}):
        with pytest.raises(ValueError, match="layers of 3 stages"):
            Layout(pp=3, **wrong)


def test_more_stages_than_layers_is_refused():
    with pytest.raises(ValueError, match="3 pipeline stages need at least as many layers, the model has 2"):
        Layout(pp=3).layers(0, LayerCosts(layers=(1, 1)))
