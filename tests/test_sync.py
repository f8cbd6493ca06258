"""Weights moved from a decoder in one layout to one in another are those that a checkpoint would have given it."""

import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_helpers import as_run

from megalite import errors
from megalite.config.schema import (
    HybridConfig,
    HybridInferSection,
    HybridTrainSection,
    OptimizerSection,
    ParallelSection,
)
from megalite.config.validate import validate
from megalite.core.layout import Layout
from megalite.core.linear import store_by_input
from megalite.core.parallel_state import ParallelState
from megalite.errors import MegaliteError
from megalite.hybrid.comparison import describe
from megalite.hybrid.fingerprint import Covered, Fingerprinter
from megalite.hybrid.sync import Sync
from megalite.model import families
from megalite.train.trainer import Trainer
from megalite.weights.table import Range
from megalite.weights.transfer import build, load_folder, twin

CPU = torch.device("cpu")
RANKS = 4
BUCKET = 20_000
"""Bytes; a few dozen rounds for the tiny models."""


def decoder_in(folder: Path, layout: Layout, *, dtype: torch.dtype = torch.float32, filled: bool):
    """This rank's part of a tiny model, None outside the layout; `filled` from the checkpoint, or with NaN."""
    state = ParallelState.join(layout)
    if state is None:
        return None
    decoder = build(families.read(folder), state, dtype=dtype, device=CPU)
    if filled:
        load_folder(decoder, folder)
    else:
        for param in decoder.parameters():
            param.data.fill_(float("nan"))
    return decoder


def sync_between(folder: Path, source: Layout, target: Layout, *, dtype: torch.dtype = torch.float32, **settings):
    """A decoder in training, one to be filled, each None outside its layout, and the way from one to the other."""
    training = decoder_in(folder, source, filled=True)
    generating = decoder_in(folder, target, dtype=dtype, filled=False)
    settings = {"bucket_bytes": BUCKET, **settings}
    return training, generating, Sync(families.read(folder), training, generating, source, target, **settings)


def assert_loaded(got, folder: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> None:
    """Bit for bit what loading gives in that layout."""
    want = decoder_in(folder, layout, dtype=dtype, filled=True)
    if want is not None:
        params = dict(got.named_parameters())
        for name, param in want.named_parameters():
            assert torch.equal(params[name], param), name


def push_and_compare(
    rank: int,
    folder: Path,
    source: Layout,
    target: Layout,
    *,
    dtype: torch.dtype = torch.float32,
    by_input: bool = False,
    staged: bool = False,
) -> int:
    """Two pushes, the second of other weights; bytes that each brings to this rank."""
    training, generating, sync = sync_between(folder, source, target, dtype=dtype)
    if by_input and generating is not None:
        store_by_input(generating)
    if staged:
        sync._executor.transport = torch.device("cpu", 0)  # another name of the same memory
    params = {} if generating is None else dict(generating.named_parameters())
    addresses = {name: param.data_ptr() for name, param in params.items()}
    assert sync.push() == 1
    assert_loaded(generating, folder, target, dtype)
    before = {name: param.detach().clone() for name, param in params.items()}
    for param in training.parameters() if training is not None else ():
        param.data.neg_()
    assert sync.push() == 2
    assert all(torch.equal(param, -before[name]) for name, param in params.items()), "weights of its moment"
    assert addresses == {name: param.data_ptr() for name, param in params.items()}, "weights moved in memory"
    return sync.received_bytes


CASES = {
    "tp2pp2-to-tp4": ("qwen3", Layout(2, 2), Layout(4)),
    "tp2dp2-to-tp4": ("llama_bias", Layout(2, 1, 2), Layout(4)),
    "tp4-to-tp2dp2": ("qwen3_moe", Layout(4), Layout(2, 1, 2)),
    "dp4-to-tp4": ("gpt2", Layout(1, 1, 4), Layout(4)),
    "tp2pp2-to-dp4": ("phi3", Layout(2, 2), Layout(1, 1, 4)),
    "pp4-tied-to-tp2pp2": ("llama_tied", Layout(1, 4), Layout(2, 2)),
    "dp2pp2-tied-to-tp4": ("llama_tied", Layout(1, 2, 2), Layout(4)),
    "apart": ("qwen3", Layout(2), Layout(1, 1, 2, first_rank=2)),
    "apart-tied": ("llama_tied", Layout(1, 2, first_rank=2), Layout(2)),
    "overlapping": ("mixtral", Layout(3), Layout(1, 2, first_rank=2)),
    "interleaved": ("qwen3", Layout(1, 2, 2, interleave=2), Layout(2, 2)),
    "tp3-to-one-rank": ("gemma2", Layout(3, first_rank=1), Layout(first_rank=1)),
    "alike": ("qwen3", Layout(2, 2), Layout(2, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_pushed_weights_equal_loaded_ones(case, tiny, ranks):
    name, source, target = CASES[case]
    received = ranks(RANKS).run(push_and_compare, tiny(name), source, target)
    assert case != "alike" or received == [0] * RANKS


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"by_input": True},
        {"dtype": torch.float16, "by_input": True},
        {"staged": True},
    ],
    ids=["rounded", "by-input", "rounded-by-input", "through-the-host"],
)
def test_the_target_may_be_otherwise(options, tiny, ranks):
    """Of another dtype, laid out otherwise in memory, on a device whose memory messages can't come from."""
    job = partial(push_and_compare, **options)
    ranks(RANKS).run(job, tiny("qwen3"), Layout(2, 2), Layout(1, 2, 2))


def test_one_process_needs_no_ranks(tiny):
    assert push_and_compare(0, tiny("qwen3"), Layout(), Layout(), dtype=torch.bfloat16, by_input=True) == 0


def share(rank: int, folder: Path) -> tuple[int, int]:
    layout = Layout(2, 1, 2)
    decoder = decoder_in(folder, layout, filled=True)
    other = twin(decoder, ParallelState(layout))
    counts = []
    for target in (decoder, other):
        sync = Sync(families.read(folder), decoder, target, layout, layout, bucket_bytes=BUCKET)
        with Allocations() as seen:
            sync.push()
        counts += [sync.push(), sync.buffer_bytes, seen.operations]
    return counts


def test_layouts_that_agree_share_their_tensors(tiny, ranks):
    """Nothing is allocated, nothing is computed; the version still goes up."""
    assert ranks(RANKS).run(share, tiny("qwen3")) == [[2, 0, 0, 2, 0, 0]] * RANKS


def push_trained(rank: int, folder: Path, source: Layout, target: Layout, zero_stage: int) -> None:
    """Out of a DeepSpeed engine, which stage 3 leaves with empty parameters."""
    with as_run(rank):
        training = decoder_in(folder, source, filled=True)
        ParallelState.make_training_groups(source)
        trainer = Trainer(training, OptimizerSection(), steps=1, zero_stage=zero_stage) if training else None
        generating = decoder_in(folder, target, filled=False)
        sync = Sync(
            families.read(folder),
            training,
            generating,
            source,
            target,
            bucket_bytes=BUCKET,
            gathered=trainer.gathered if trainer else None,
        )
        sync.push()
        assert_loaded(generating, folder, target)
        if training is not None and zero_stage == 3:
            assert not any(param.numel() for param in training.parameters()), "parameters were left whole"


@pytest.mark.parametrize(
    "zero_stage, source, target",
    [(3, Layout(2, 1, 2), Layout(4)), (3, Layout(1, 1, 4), Layout(2, 2)), (1, Layout(2), Layout(2, first_rank=2))],
)
def test_weights_come_out_of_deepspeed(zero_stage, source, target, tiny, ranks):
    ranks(RANKS).run(push_trained, tiny("qwen3"), source, target, zero_stage)


@pytest.mark.parametrize("first_rank, refused", [(0, False), (1, True), (2, True)])
def test_stage_3_has_to_train_on_every_rank(first_rank, refused):
    """DeepSpeed passes barriers of the whole run when it sets stage 3 up."""
    train = HybridTrainSection(parallel=ParallelSection(dp=2), zero_stage=3)
    infer = HybridInferSection(parallel=ParallelSection(tp=2, first_rank=first_rank))
    problems = validate(HybridConfig(train=train, infer=infer), None, None)
    assert any(problem.key == "train.zero_stage" for problem in problems) == refused


# ---- memory ----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that are made while it lasts, as long as they live."""

    def __init__(self):
        super().__init__()
        self.operations = self.peak = 0
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.live:
                self.known.add(tensor.untyped_storage()._cdata)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def push_and_count(rank: int, folder: Path, source: Layout, target: Layout, bucket: int) -> tuple[int, int, int]:
    _, generating, sync = sync_between(folder, source, target, bucket_bytes=bucket, verify="off")
    with Allocations() as seen:
        sync.push()
    assert_loaded(generating, folder, target)
    return sync.buffer_bytes, seen.peak, sync.received_bytes


@pytest.mark.parametrize("bucket", [4_000, 20_000])
def test_moving_takes_one_bucket_of_memory(bucket, tiny, ranks):
    for needed, peak, received in ranks(RANKS).run(push_and_count, tiny("qwen3"), Layout(2, 2), Layout(4), bucket):
        assert peak == needed <= bucket < received


# ---- verification ----------------------------------------------------------------------------------------------------


def push_with_fault(rank: int, folder: Path, spec: str, verify: str) -> list[str]:
    """What each of three pushes said; the second of them meets a fault."""
    training, _, sync = sync_between(folder, Layout(2, 2), Layout(4), verify=verify)
    said = []
    for attempt in range(3):
        for param in training.parameters():
            param.data += 1
        errors._passages.clear()
        os.environ[errors.FAULT_VARIABLE] = spec if attempt == 1 else "nowhere=raise"
        try:
            said.append(str(sync.push()))
        except MegaliteError as error:
            said.append(str(error))
    del os.environ[errors.FAULT_VARIABLE]
    return said


@pytest.mark.parametrize("action", ["skip", "corrupt"])
def test_a_bucket_that_went_wrong_is_named(action, tiny, ranks):
    said = ranks(RANKS).run(push_with_fault, tiny("qwen3"), f"sync.bucket@3#2={action}", "always")
    assert all(one == said[0] for one in said), "every rank has to raise the same"
    first, second, third = said[0]
    assert (first, third) == ("1", "3"), "a later push mends it"
    assert second.startswith("weights of version 2: ")
    assert re.search(
        r"  model\.\S+ (rows|columns) \d+\.\.\d+: rank 3 \(generating\) has other values than rank", second
    )
    if action == "corrupt":
        assert "differ in 1 range of 1 tensor;" in second


def test_verification_may_be_left_out(tiny, ranks):
    for verify in ("first", "off"):
        said = ranks(RANKS).run(push_with_fault, tiny("qwen3"), "sync.bucket@3#2=corrupt", verify)
        assert said == [["1", "2", "3"]] * RANKS


def drift(rank: int, folder: Path) -> str:
    training, _, sync = sync_between(folder, Layout(1, 1, 2), Layout(2, first_rank=2))
    if rank == 1:
        training.norm.weight.data[5] += 1
    with pytest.raises(MegaliteError) as error:
        sync.push()
    return str(error.value)


def test_replicas_that_drifted_apart_are_found(tiny, ranks):
    said = ranks(RANKS).run(drift, tiny("qwen3"))
    assert len(set(said)) == 1 and "model.norm.weight rows 0..48: rank" in said[0]


def test_the_odd_one_out_is_said():
    assert describe([[7, 7], [7, -1], [-1, 8]]) == (
        "rank 2 (generating) has other values than rank 0 (training), rank 1 (training), rank 0 (generating)"
    )


def covering(dim: int, *ranges: tuple[int, int, int]) -> Covered:
    """A parameter that consists of ranges: where each begins in it, and its indices."""
    return Covered("p", dim, tuple(Range(None, lo, hi, start, dim) for start, lo, hi in ranges), (0,) * len(ranges))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fingerprint_is_of_the_values_and_their_places(dtype):
    make = Fingerprinter(CPU, dtype, largest=64, limit_bytes=300)
    values = torch.randn(24, 40).to(dtype)
    whole_covered = covering(0, (0, 0, 24))
    print_of = lambda x: make.of(x, whole_covered).tolist()  # noqa: E731
    whole = print_of(values)
    assert print_of(values.t().contiguous().t()) == whole, "the order in memory is no matter"
    assert print_of(torch.randn(48, 80).to(dtype)[::2, ::2].copy_(values)) == whole
    assert Fingerprinter(CPU, dtype, largest=64, limit_bytes=1 << 20).of(values, whole_covered).tolist() == whole
    swapped = values.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert print_of(swapped) != whole and print_of(values.flip(1)) != whole
    for row, column in ((0, 0), (23, 39), (7, 11)):
        for bit in range(8 * dtype.itemsize):
            changed = values.clone()
            integers = changed.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
            integers[row, column] ^= -(1 << bit) if bit == 8 * dtype.itemsize - 1 else 1 << bit
            assert print_of(changed) != whole, f"bit {bit} of [{row}, {column}] is not seen"


def test_parts_of_a_tensor_have_the_fingerprints_of_their_places():
    """Rows 10..24 are the same whether they are a parameter of their own or the end of a stacked one."""
    make = Fingerprinter(CPU, torch.float32, largest=64, limit_bytes=1 << 20)
    values = torch.randn(24, 8)
    parts = make.of(values, covering(0, (0, 0, 10), (10, 10, 24))).tolist()
    assert make.of(values[10:], covering(0, (0, 10, 24))).tolist() == parts[1:]
    columns = values.t().contiguous()
    assert make.of(columns[:, 10:], covering(1, (0, 10, 24))).tolist() == parts[1:]
    vector = values[:, 0].contiguous()
    assert (
        make.of(vector[10:], covering(0, (0, 10, 24))).tolist()
        == (make.of(vector, covering(0, (0, 0, 10), (10, 10, 24))).tolist()[1:])
    )


@pytest.mark.parametrize("turned", [False, True])
def test_fingerprints_are_made_piece_by_piece(turned):
    """Whatever the size of the parameter: what does not fit beside it is a number for each row."""
    limit, rows = 1 << 16, 2000
    values = torch.ones(512, rows).t() if turned else torch.ones(rows, 512)
    make = Fingerprinter(CPU, torch.bfloat16, largest=rows, limit_bytes=limit)
    with Allocations() as seen:
        make.of(values, covering(0, (0, 0, rows)))
    assert limit // 2 < seen.peak < limit + 48 * rows < values.nbytes // 20
