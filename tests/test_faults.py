"""The fault matrix: seven faults x five places x the first and the last rank, over jobs as a user starts them.

Here each fault strikes at each place, on one rank of the two in turn; `--all-faults` has it strike on both. How long a
run takes to end is not asserted but measured, by `tools/bench.py faults`.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from fault_matrix import CODES, RANKS, Case, Hybrid, Infer, Struck, chain, says
from tiny_tokenizer import with_tokenizer

PLACES = [*Infer.points, *Hybrid.points]


def chains(every: bool) -> list[list[Case]]:
    """Each of one place; with `every` of one rank too, else of both in turn."""
    if every:
        return [[Case(place, fault, rank) for fault in CODES] for place in PLACES for rank in range(RANKS)]
    return [
        [Case(place, fault, (number + shift) % RANKS) for number, fault in enumerate(CODES)]
        for shift, place in enumerate(PLACES)
    ]


def pytest_generate_tests(metafunc):
    found = chains(metafunc.config.getoption("all_faults"))
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [case for one in found for case in one], ids=str)
    if "last" in metafunc.fixturenames:
        metafunc.parametrize("last", [one[-1] for one in found], ids=str)


@pytest.fixture(scope="module")
def jobs(tiny, forks, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("faults")
    infer = Infer(forks, folder / "infer", with_tokenizer(tiny("llama3"), folder / "model"))
    return {**dict.fromkeys(Infer.points, infer), **dict.fromkeys(Hybrid.points, Hybrid(forks, folder / "hybrid"))}


@pytest.fixture(scope="module")
def struck(jobs, request) -> dict[object, Future[list[Struck]]]:
    """The chain of each case that was chosen, and by job the run that nothing strikes; all at once, since most wait."""
    asked = [item.callspec.params for item in request.session.items if item.path == request.path]
    chosen = {case for params in asked for case in params.values()}
    with ThreadPoolExecutor(4) as pool:
        found = {job: pool.submit(chain, job, []) for job in {jobs[case.place] for case in chosen}}
        for cases in chains(request.config.getoption("all_faults")):
            if chosen & {*cases}:
                found.update(dict.fromkeys(cases, pool.submit(chain, jobs[cases[0].place], cases)))
        yield found


def test_a_fault_ends_all_ranks_with_its_code_and_a_reason(case, struck):
    runs = struck[case].result()
    one = next(run for run in runs if run.case == case)
    assert not one.ended.left_running
    if case.fault == "disk" and case.rank == 0 and case.place in Infer.points:  # it writes no files
        assert one.ended.code == 0, one.ended.err
        return
    assert (one.ended.code, bool(re.search(says(case), one.ended.err))) == (CODES[case.fault], True), one.ended.err


def test_nothing_is_lost_or_doubled(last, struck, jobs):
    """What each run leaves is what the one before has left, or more; the last leaves what an undisturbed one does."""
    runs, job = struck[last].result(), jobs[last.place]
    undisturbed = struck[job].result()[-1]
    assert (undisturbed.ended.code, runs[-1].ended.code) == (0, 0), runs[-1].ended.err
    for before, after in pairwise(runs):
        assert before.left.items() <= after.left.items()
    assert runs[-1].left == undisturbed.left and job.result(str(runs[0].case)) == job.result("undisturbed")
