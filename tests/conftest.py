"""Fixtures that many tests share: ranks, tiny checkpoints and what transformers computes with them."""

from __future__ import annotations

import os
import signal
import sys

# A shell lets what it starts in the background ignore Ctrl-C, which then holds for all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The launchers of this environment are found also where it was not activated.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

# One thread a process, before anything imports torch: several ranks share the cores, and forking needs it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What was compiled is kept, also where the environment says otherwise: the tests start hundreds of Pythons.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# How long an example takes is not what a test is about. The examples are the same in every run, so that a change's
# tests fail by the change; `--hypothesis-profile=search` looks for new ones.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")

LONGEST = (
    *("test_engine", "test_two_hosts", "test_engine_matrix", "test_faults", "test_hybrid", "test_guide"),
    *("test_train_runs", "test_state", "test_train", "test_llm", "test_infer_job", "test_convert", "test_trainer"),
    *("test_serve_clients", "test_watchdog", "test_lora_jobs", "test_hybrid_demo", "test_serve_job", "test_hf"),
    *("test_rewards", "test_lora", "test_wheel", "test_shards", "test_bench_gpu", "test_launcher", "test_tools"),
    *("test_imports", "test_bad_input", "test_serve_fleet", "test_grammar_engine", "test_console", "test_quantized"),
    *("test_lora_training", "test_streaming", "test_import_deepspeed", "test_scheduler_histories", "test_demo"),
)
"""The files that take most of the time, in this order; the second waits more than it computes."""
_pools = None


def pytest_addoption(parser):
    parser.addoption("--all-faults", action="store_true", help="test_faults.py: each case on the last rank too")


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist takes the files with most tests first


def pytest_collection_modifyitems(items):
    """The longest files first: no process is left with one of them when the others have nothing to do any more."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish(session):
    """Fork the zygote while the test process is still clean, if any test will need ranks."""
    global _pools
    if not session.config.option.collectonly and any("ranks" in item.fixturenames for item in session.items):
        from forks import TRAINING
        from rank_pool import Pools

        # Seconds for each of the ranks that train, of which there are ten and more.
        trains = {"megalite.train.trainer", "train_helpers"} & sys.modules.keys()
        _pools = Pools(TRAINING if trains else ())


@pytest.fixture(autouse=True)
def environment():
    """What a test changes in os.environ is undone: the next one may come from any file."""
    before = dict(os.environ)
    yield
    for name in {name for name, _ in before.items() ^ os.environ.items()} - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n)` is a pool of n gloo ranks: `ranks(2).run(function, *args)`."""
    yield _pools
    _pools.close()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts programs as forks of one that has imported what they need, see forks.py."""
    from forks import Forks

    with Forks(tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.fixture(scope="session")
def tiny(pytestconfig):
    """`tiny(name)`, `tiny(name, layers)`: folder of a tiny random checkpoint, see TinyModels; kept between runs."""
    from tiny_models import TinyModels

    return TinyModels(pytestconfig.cache.mkdir("tiny_models"))


@pytest.fixture(scope="session")
def reference(tiny):
    """`reference(name, prompts, max_tokens)`: what transformers generates greedily, see reference.py."""
    from reference import References

    return References(tiny)


@pytest.fixture(scope="session")
def openai():
    """OpenAI's client, which takes seconds to import."""
    return pytest.importorskip("openai")
