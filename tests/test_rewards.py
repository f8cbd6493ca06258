"""Rewards: what each measures, that a bad one costs one sample, and that what a model wrote can only compute."""

import errno
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import PATIENCE, wait_until

from megalite.errors import MegaliteError
from megalite.rewards import confined, sandbox, worker
from megalite.rewards.functions import (
    exact_match,
    length_close,
    lines_of,
    longest_parsing,
    matches_pattern,
    parses_as_python,
    passes_asserts,
)
from megalite.rewards.pool import ARGUMENTS, RewardPool, Sample, Scored, check_reward
from megalite.run.processes import Process

# ---- the rewards


@pytest.mark.parametrize(
    ("reward", "example", "wanted"),
    [
        (exact_match, {"answer": "46"}, {"46": 1, " 46 \n12+1=13": 1, "\n46": 0, "46.": 0, "": 0, "146\n": 0}),
        (exact_match, {"answer": 46}, {"46": 1, "64": 0}),
        (matches_pattern, {"pattern": r"[a-z]+\d+\n"}, {"ab12\n": 1, "ab12\n\n": 0}),
        (length_close, {"length": 10}, {"": 0, "x" * 5: 0.5, "x" * 10: 1, "x" * 15: 0.5, "x" * 20: 0, "x" * 90: 0}),
    ],
)
def test_rewards_of_a_completion_alone(reward, example, wanted):
    assert {completion: reward("12+34=", completion, example) for completion in wanted} == wanted


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("    return x\n", 1),
        ("    return x\n\ndef g(y, ", 1),  # cut off in its last line
        ("    return x\nprint(", 1),
        ("    return (x\n    print(", 0),
        ("    return '\\d'\n", 1),  # a warning, no error
        ("pass", 0),
        ("", 0),
        ("    ret", 1),
        ("    x = 'a\0b'\n", 0),
        ("    x = '\ud800'\n", 0),
        ("    " + "(" * 5000, 0),
    ],
)
def test_parses_as_python(completion, reward):
    assert parses_as_python("def f(x):\n", completion, {}) == reward


def test_a_line_that_is_cut_off_may_not_be_the_only_one():
    assert parses_as_python("x = 1\n", "y = (", {}) == 0
    assert parses_as_python("x = 1\n", "\n  \ny = (", {}) == 0
    assert parses_as_python("x = 1\n", "y = 2\ny = (", {}) == 1


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return 1\n\n\ndef g(", "    return 1\n\n\n"),
        ("    if x:\n        y()\n    else:\n", "    if x:\n        y()\n"),
        ("    a = [1,\n    2\nb = 3\n", ""),
        ("    a = 1\n    b = '''\n  text\n", "    a = 1\n"),
        ("    a = 1\n  b = 2\n    c = 3\n", "    a = 1\n"),
        ("    a = 1\n    b = f'{x y}'\n    c = 3\n", "    a = 1\n"),
        ("    a = 1\r\n    b = (\r\n", "    a = 1\n"),
        ("    a = 1\n    b = '\0'\n", "    a = 1\n"),
    ],
)
def test_as_much_is_kept_as_parses(text, kept):
    head = 'def f(x):\n    """Doc."""\n'
    lines = lines_of(head + text)
    parsed = longest_parsing(lines, len(lines_of(head)) - 1)
    assert parsed is not None and lines[: parsed.lines] == lines_of(head + kept)[:-1]


def test_asserts():
    head, example = "def add(a, b):\n", {"tests": ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]}
    assert passes_asserts(head, "    return a + b\n\n\ndef sub(a", example) == 1
    assert passes_asserts(head, "    return 3\n", example) == 0
    assert passes_asserts(head, "    return (\n", example) == 0
    with pytest.raises(ValueError, match="broken test 1"):
        passes_asserts(head, "    return 3\n", {"tests": ["assert add(1, 2"]})
    with pytest.raises(ValueError, match="no 'tests'"):
        passes_asserts(head, "    return 3\n", {})


# ---- the sandbox


def test_a_program_may_compute():
    program = "import dataclasses, json, math, random, re\n@dataclasses.dataclass\nclass P:\n    x: int\n"
    program += "print('dropped')\nassert input is not None and random.random() < 1 and hash('a') == hash('a')\n"
    assert sandbox.run(program, ["assert P(1) == P(1)", "import time; time.sleep(0.001)"]) == sandbox.Verdict(True)


def test_strings_hash_alike_in_every_run():
    """What depends on the order of a set must not give one reward today and another after a restart."""
    fixed = {"PYTHONHASHSEED": "0"}
    expected = subprocess.check_output([sys.executable, "-c", "print(hash('a'))"], env=fixed, text=True)
    assert sandbox.run(f"assert hash('a') == {expected}").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert False, 'no'", "the program raised AssertionError"),
        ("import os; os._exit(0)", "exited with status 0 before its tests were done"),
        ("raise SystemExit(0)", "the program raised SystemExit"),
        ("import builtins; builtins.exec = builtins.compile = print", "test 1 raised AssertionError"),
        ("import ctypes; ctypes.string_at(0)", "crashed (SIGSEGV)"),
        ("x = bytearray(10 * 1024**3)", "the program raised MemoryError"),
        ("import threading; threading.Thread(target=print).start()", "the program raised RuntimeError"),
        ("raise type('secret', (Exception,), {})('secret')", "the program raised something"),
        ("class AssertionError(Exception): pass\nraise AssertionError('secret')", "the program raised something"),
        (
            "import builtins\nbuiltins.type = lambda one: 'secret'\nassert False, 'secret'",
            "the program raised Assertio",
        ),
        ("raise ExceptionGroup('secret', [ValueError('secret')])", "the program raised ExceptionGroup"),
        ("raise KeyboardInterrupt('secret')", "the program raised KeyboardInterrupt"),
        ("this is no Python", "the program raised SyntaxError"),
        ("SAY(b'confined\\n')", "said what no program has to say"),
        ("SAY(b'secret' * 999)", "said what no program has to say"),
        ("SAY(b'test 1 raised Secret\\n'); os._exit(0)", "said what no program has to say"),
        ("SAY(b'test 99 raised ValueError\\n'); os._exit(0)", "said what no program has to say"),
        ("SAY(b'test \\xd9\\xa1 raised ValueError\\n'); os._exit(0)", "said what no program has to say"),
        ("SAY(b'\\xff'); os._exit(0)", "said what no program has to say"),
    ],
)
def test_how_a_program_fails_is_told_in_words_of_ours(program, reason):
    say = "import os\ndef SAY(text):\n    for fd in range(3, 9):\n        try: os.write(fd, text)\n"
    outcome = sandbox.run(say + "        except OSError: pass\n" + program, ["assert False"])
    assert not outcome.passed and outcome.reason.startswith(reason), outcome.reason
    assert len(outcome.reason) <= 60


ATTEMPTS = """
open('/etc/passwd')
open(SECRET)
open(LINK)
open(FIFO)
os.open(FIFO, os.O_RDONLY | os.O_NONBLOCK)
os.open(SECRET, os.O_PATH)
os.open('/', os.O_PATH | os.O_DIRECTORY)
os.open('.', os.O_RDONLY)
open(os.path.dirname(json.__file__) + '/../../../../../../../../../../../etc/passwd')
open(sys.executable, 'rb')
open(SOURCE)
os.listdir('/')
os.scandir(os.path.dirname(SECRET))
os.listdir('/proc')
os.listdir('/proc/self/fd')
open('/proc/self/environ')
open('/proc/self/mem', 'rb')
open('/proc/self/fd/0')
open('/dev/fd/0')
open(f'/proc/{os.getppid()}/environ')
open(f'/proc/{os.getppid()}/fd/0', 'rb')
[open(f'/proc/{PIPE}/fd/{fd}', 'rb') for fd in FDS]
[os.open(f'/proc/{PIPE}/fd/{fd}', os.O_RDONLY | os.O_NONBLOCK) for fd in FDS]
open(f'/proc/{PIPE}/root/etc/passwd')
open(f'/proc/{PIPE}/cwd')
os.readlink('/proc/self/exe')
open('/dev/zero', 'rb')
mmap.mmap(os.open(SECRET, os.O_RDONLY), 0)
open('/tmp/absent/x', 'w')
open(SECRET, 'a')
os.open('/dev/null', os.O_RDWR)
os.open('/tmp', os.O_TMPFILE | os.O_RDWR)
os.remove(SECRET)
os.mkdir('/tmp/absent')
os.rename(SECRET, SECRET + '2')
os.link(SECRET, SECRET + '2')
os.mkfifo(SECRET + '2')
os.chmod(SECRET, 0)
os.setxattr(SECRET, 'user.x', b'')
os.chdir('/tmp')
os.memfd_create('x')
os.pipe()
socket.socket()
os.fork()
os.execv('/bin/true', ['true'])
os.kill(os.getppid(), 0)
os.kill(-1, 0)
os.setsid()
resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))
fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())
fcntl.ioctl(0, 0)
call('prctl', 1, 0, 0, 0, 0)
call('ptrace', 16, os.getppid(), 0, 0)
call('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)
call('unshare', 0x10000000)
call('syscall', 437, -100, b'/etc/passwd', bytes(24), 24)
call('syscall', 438, 3, 0, 0)
call('syscall', 425, 1, bytes(120))
call('syscall', 444, 0, 0, 1)
"""
"""Each must fail; the test of the filter shows that whole classes of calls are refused.

The numbers: openat2, pidfd_getfd, io_uring_setup, landlock_create_ruleset.
"""


@pytest.mark.parametrize("allow_list", [True, False])
def test_a_program_may_do_nothing_else(allow_list, tmp_path, monkeypatch):
    """Also with the pipes of a process of the same user, which everyone could open through /proc."""
    monkeypatch.setattr(sandbox, "ALLOW_LIST", allow_list)
    secret, fifo, link = tmp_path / "secret", tmp_path / "fifo", tmp_path / "link"
    secret.write_text("secret")
    os.mkfifo(fifo)
    link.symlink_to("/etc/passwd")
    with subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sibling:
        program = "import fcntl, json, mmap, os, resource, socket, sys, ctypes\nlibc = ctypes.CDLL(None)\n"
        if not allow_list:  # what can be imported then
            program = "import json, os, sys, ctypes\nlibc = ctypes.CDLL(None)\n"
        program += "def call(name, *arguments):\n    if getattr(libc, name)(*arguments) < 0: raise OSError\n"
        program += f"SECRET, FIFO, LINK, SOURCE = {str(secret)!r}, {str(fifo)!r}, {str(link)!r}, {__file__!r}\n"
        program += f"PIPE, FDS = {sibling.pid}, (0, 1)\n"
        attempts = [one for one in ATTEMPTS.splitlines() if one]
        if not allow_list:
            attempts = [one for one in attempts if not one.startswith(("fcntl", "mmap", "resource", "socket"))]
        tests = [f"try: {one}\nexcept OSError: pass\nelse: raise RuntimeError" for one in attempts]
        outcome = sandbox.run(program, tests)
        sibling.kill()
    told = re.match(r"test (\d+) ", outcome.reason)
    assert outcome == sandbox.Verdict(True), (outcome, told and attempts[int(told[1]) - 1])
    assert secret.read_text() == "secret" and sorted(os.listdir(tmp_path)) == ["fifo", "link", "secret"]


LIBRARY = "ctypes, sqlite3, ssl, lzma, zoneinfo, email.mime.text, xml.etree.ElementTree, tomllib, decimal, logging"


def test_the_standard_library_and_nothing_beside_it_can_be_imported(monkeypatch):
    assert sandbox.run(f"import {LIBRARY}\nzoneinfo.ZoneInfo('Europe/Paris')").passed
    for name in ("numpy", "megalite", "pytest"):
        assert sandbox.run(f"import sys\nsys.path += {sys.path!r}\nimport {name}").reason.startswith(
            "the program raise"
        )
    monkeypatch.setattr(sandbox, "ALLOW_LIST", False)
    assert sandbox.run(f"import {', '.join(confined.PRELOADED)}\ndatetime.datetime.strptime('1', '%d')").passed


def test_a_program_has_limited_time():
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass"
    asleep, silent = "import time\ntime.sleep(999)", "import os, time\nos.closerange(0, 99)\ntime.sleep(999)"
    with ThreadPoolExecutor(3) as threads:
        busy = threads.submit(sandbox.run, stubborn, cpu_seconds=1, seconds=PATIENCE)
        idle = [threads.submit(stopped_after, program) for program in (asleep, silent)]
    assert busy.result().reason == "used more than 1 s of processor time"
    assert all(one.result() for one in idle)


def stopped_after(program: str) -> bool:
    """It is stopped when its seconds are over; more are given where a busy machine did not even begin within them."""
    for seconds in (1, 30, PATIENCE):
        with suppress(sandbox.SandboxError):
            return sandbox.run(program, seconds=seconds).reason == f"took longer than {seconds:g} s"
    return False


def test_nothing_of_this_process_reaches_a_program(monkeypatch):
    monkeypatch.setenv("SECRET", "value")
    program = "import os, sys\nassert not {*os.environ} - {'PYTHONHASHSEED', 'LC_CTYPE'}, os.environ\n"
    program += "assert not any('site-packages' in path for path in sys.path), sys.path\n"
    program += (
        "seen = 0\nfor fd in range(3, 64):\n    try: os.fstat(fd)\n    except OSError: pass\n    else: seen += 1\n"
    )
    program += "assert seen == 1, 'the answer'\n"
    assert sandbox.run(program) == sandbox.Verdict(True)


@pytest.mark.parametrize("may_open", [True, False])
@pytest.mark.parametrize("machine", confined.ARCHITECTURES)
def test_the_filter_decides_alike_on_every_machine(machine, may_open):
    """By an interpreter of the few instructions it uses: only one of the machines is this one."""
    column, architecture = confined.ARCHITECTURES[machine]
    lines = confined.filter_program(machine, may_open=may_open)

    def verdict(number: int, *arguments: int, architecture: int = architecture) -> int:
        data = {0: number, 4: architecture, **{16 + 8 * i: value for i, value in enumerate(arguments)}}
        place = loaded = 0
        while True:
            code, yes, no, operand = lines[place]
            if code == 0x06:
                return operand
            if code == 0x20:
                loaded, jump = data.get(operand, 0), 0
            else:
                holds = {0x15: loaded == operand, 0x25: loaded > operand, 0x45: bool(loaded & operand)}[code]
                jump = yes if holds else no
            place += 1 + jump

    allowed, refused, read_only = 0x7FFF0000, 0x00050000 | errno.ENOSYS, 0x00050000 | errno.EROFS
    openat, fcntl = confined.OPENAT[column], confined.FCNTL[column]
    numbers = confined.ALLOWED[column]
    for number in range(600):
        if number not in (openat, fcntl):
            assert verdict(number) == (allowed if number in numbers else refused), number
    no_access = 0x00050000 | errno.EACCES
    assert verdict(openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == (allowed if may_open else no_access)
    assert verdict(openat, 0, 0, os.O_RDONLY | os.O_PATH) == no_access
    for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE | os.O_RDWR):
        assert verdict(openat, 0, 0, flag) == read_only
    assert [verdict(fcntl, 0, command) for command in (0, 4, 1030, 8, 10, 1031)] == [allowed] * 3 + [refused] * 3
    assert verdict(next(iter(numbers)), architecture=0x40000003) == 0x80000000


# ---- the pool

OWN_REWARDS = '''
import ctypes, os, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

def reward(prompt, completion, example):
    """Computes what the completion says."""
    return eval(completion, globals(), {"prompt": prompt, "example": example})

def noisy(prompt, completion, example):
    print("printed")
    os.write(1, b'{"reward": 7}\\n')
    sys.stdout.buffer.write(b"bytes")
    return float(completion)

def leaves_a_child():
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid

def multiplies():
    """A hundred processes, half of them in sessions of their own, none of which ends by itself."""
    for number in range(100):
        if not os.fork():
            if number % 2:
                os.setsid()
                if os.fork():
                    os._exit(0)
            with open("children", "a") as file:
                file.write(f"{os.getpid()}\\n")
            time.sleep(600)
    time.sleep(600)

def fork_returns():
    return 5 if os.fork() else 6

def two(prompt, completion):
    return 0.0

number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A working folder with a module of the user's."""
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(completions: list[str], reward: str = "own_rewards:reward", **settings) -> list[Scored]:
    with RewardPool(reward, **{"workers": 2, "time_limit": PATIENCE, "failure_reward": -1, **settings}) as pool:
        return pool.evaluate([Sample(prompt="p", completion=text, example={}) for text in completions])


def gone(pid: int) -> bool:
    """Whether the process has ended, which may take the kernel a moment."""
    wait_until(lambda: Process.of(pid) is None, f"process {pid} is gone")
    return True


def test_rewards_come_in_the_order_of_the_samples(own):
    completions = [f"time.sleep(0.02 * ({number} % 3)) or {number}" for number in range(30)]
    assert [one.reward for one in evaluate(completions, workers=3)] == list(range(30))
    assert evaluate([]) == []


def test_a_pool_serves_many_times_and_takes_large_examples(own):
    with RewardPool("own_rewards:reward", workers=2, time_limit=PATIENCE, failure_reward=0) as pool:
        for size in (1, 1 << 20):
            completion, example = "len(prompt) + len(example['x'])", {"x": "y" * size}
            samples = [Sample(prompt="é" * size, completion=completion, example=example)] * 3
            assert pool.evaluate(samples) == [Scored(reward=2 * size)] * 3
    with pytest.raises(RuntimeError, match="entered"):
        pool.evaluate([])


BAD_REWARDS = [
    ("1 / 0", r"raised ZeroDivisionError: division by zero \(<string>:1\)"),
    ("float('nan')", "returned nan, which is not a finite number"),
    ("float('-inf')", "returned -inf, which is not a finite number"),
    ("'1'", "returned '1', which is not a finite number"),
    ("None", "returned None, which is not a finite number"),
    ("-1.7e308", r"returned -1.7e\+308, which is beyond 1e\+30, up or down"),
    ("10**400", "raised OverflowError.*"),
    ("sys.exit(0)", "raised SystemExit: 0.*"),
    ("os._exit(3)", r"its process died \(exit status 3\)"),
    ("os.kill(os.getpid(), 9)", r"its process died \(SIGKILL\)"),
    ("ctypes.string_at(0)", r"its process died \(SIGSEGV\)"),
    ("os.closerange(3, 99)", "(its process died|closed the pipe).*"),
    ("os.write(int(sys.argv[2]), b'?\\n')", "wrote into the pipe of its process"),
    ("os.write(int(sys.argv[2]), b'{}\\n')", "wrote into the pipe of its process"),
]


def test_a_tensor_of_one_number_is_a_number():
    given = SimpleNamespace(ndim=0, item=lambda: 0.5)
    assert worker._scored(lambda *_: given, dict.fromkeys(ARGUMENTS)) == {"reward": 0.5, "failure": None}


def test_a_bad_reward_costs_one_sample(own):
    scored = evaluate([text for number, (bad, _) in enumerate(BAD_REWARDS) for text in (str(number), bad)], workers=3)
    assert scored[::2] == [Scored(reward=number) for number in range(len(BAD_REWARDS))]
    for (completion, failure), found in zip(BAD_REWARDS, scored[1::2], strict=True):
        assert found.reward == -1 and re.fullmatch(failure, found.failure), (completion, found.failure)


def test_a_program_can_not_spoil_the_samples_of_others():
    """It opens every descriptor of every process that was started before it, and takes what is in it."""
    takes = """    import os
    for pid in range(max(1, os.getpid() - 5000), os.getpid() + 50):
        for fd in range(12):
            try: os.read(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK), 1 << 16)
            except OSError: pass
"""
    example = {"tests": ["assert f(2) == 4"]}
    texts = [f"    return {number} + x - {number} + x\n" for number in range(6)]
    samples = [
        Sample(prompt="def f(x):\n", completion=text, example=example)
        for text in (takes, *texts[:3], takes + texts[3], *texts[4:])
    ]
    name = "megalite.rewards:passes_asserts"
    with RewardPool(name, workers=3, time_limit=PATIENCE, failure_reward=-1) as pool:
        scored = pool.evaluate(samples)
    assert [one.failure for one in scored] == [None] * len(samples)
    assert [scored[place].reward for place in (1, 2, 3, 5, 6)] == [1.0] * 5
    assert scored[0].reward == 0


def test_the_line_to_a_worker_can_not_be_opened_by_others(own):
    """Through /proc, everyone of the same user opens pipes of others. A socket nobody does, not even root."""
    with RewardPool("own_rewards:reward", workers=1, time_limit=PATIENCE, failure_reward=0) as pool:
        [found] = pool.evaluate([Sample(prompt="", completion="os.getpid()", example={})])
        line = [fd for fd in Path(f"/proc/{int(found.reward)}/fd").iterdir() if int(fd.name) not in (0, 1, 2)]
        assert line
        for fd in line:
            with pytest.raises(OSError, match="No such device"):
                os.open(fd, os.O_RDONLY | os.O_NONBLOCK)


def test_what_a_reward_prints_does_not_reach_its_answers(own, capfd):
    assert evaluate(["1", "2"], "own_rewards:noisy") == [Scored(reward=1.0), Scored(reward=2.0)]
    assert "printed" in capfd.readouterr().err


def test_a_reward_that_hangs_is_killed_with_all_that_it_started(own):
    for limit in (2, 60):  # more where a busy machine took the quick ones for others that hang
        scored = evaluate(["multiplies()", "5", "time.sleep(600)", "6"], time_limit=limit)
        children = (own / "children").read_text().split() if (own / "children").exists() else []
        if children and [one.reward for one in scored] == [-1, 5, -1, 6]:
            break
    assert [one.reward for one in scored] == [-1, 5, -1, 6]
    assert {scored[0].failure, scored[2].failure} == {f"took longer than {limit} s"}
    assert children and all(gone(int(pid)) for pid in children)


def test_rewards_are_given_up_when_the_job_is_to_stop(own):
    samples = [Sample(prompt="", completion=text, example={}) for text in ("1", "time.sleep(999)", "2")]
    asked = iter([False, False, True])
    with RewardPool("own_rewards:reward", workers=1, time_limit=900, failure_reward=-1) as pool:
        assert pool.evaluate(samples, lambda: next(asked)) == []
        assert pool.evaluate(samples[:1]) == [Scored(reward=1)]


def test_a_process_that_a_reward_leaves_behind_is_killed(own):
    child, forked, after = evaluate(["leaves_a_child()", "fork_returns()", "7"], workers=1)
    assert child.failure is None and gone(int(child.reward))
    assert (forked.reward, after.reward) == (5, 7)


def test_an_idle_worker_that_dies_costs_nothing(own):
    with RewardPool("own_rewards:reward", workers=1, time_limit=PATIENCE, failure_reward=0) as pool:
        sample = Sample(prompt="", completion="os.getpid()", example={})
        (first,) = pool.evaluate([sample])
        os.kill(int(first.reward), signal.SIGKILL)
        assert gone(int(first.reward))
        (second,) = pool.evaluate([sample])
    assert second.failure is None and second.reward != first.reward


def test_an_evaluation_that_is_broken_off_leaves_no_answer_behind(own):
    with RewardPool("own_rewards:reward", workers=1, time_limit=PATIENCE, failure_reward=0) as pool:
        pool.evaluate([Sample(prompt="", completion="1", example={})])
        unfit = Sample(prompt="", completion="2", example={"set": {1}})
        with pytest.raises(TypeError):
            pool.evaluate([Sample(prompt="", completion="1", example={}), unfit])
        assert pool.evaluate([Sample(prompt="", completion="3", example={})]) == [Scored(reward=3.0)]


def test_workers_die_with_their_parent(own):
    code = "from megalite.rewards.pool import *\n"
    code += "pool = RewardPool('own_rewards:reward', workers=1, time_limit=600, failure_reward=0).__enter__()\n"
    code += (
        "samples = [Sample(prompt='', completion=text, example={}) for text in ('os.getpid()', 'time.sleep(600)')]\n"
    )
    code += "print(int(pool.evaluate(samples[:1])[0].reward), flush=True)\npool.evaluate(samples[1:])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert Process.of(worker) is not None
    parent.kill()
    parent.communicate()
    assert gone(worker)


def test_a_reward_that_can_not_be_imported_stops_the_pool(own):
    with pytest.raises(MegaliteError, match="own_rewards has no function rewards"):
        evaluate(["1"], "own_rewards:rewards")
    (own / "crashes.py").write_text("import os\nos._exit(3)")
    with pytest.raises(MegaliteError, match=r"crashes:f can't be computed: its process died \(exit status 3\)"):
        evaluate(["1"], "crashes:f")


# ---- the check


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "megalite.rewards.exact_match",
            "must be package.module:function.* Write megalite.rewards:exact",
        ),
        ("no such thing", "must be package.module:function"),
        (
            "megalite.reward:exact_match",
            "no module megalite.reward,.* Did you mean megalite.rewards?",
        ),
        ("own_reward:reward", "there is no module own_reward,.* Did you mean own_rewards?"),
        ("nothing_like_it:reward", "there is no module nothing_like_it,.* PYTHONPATH"),
        ("own_rewards:rewrd", "own_rewards has no function rewrd,.* Did you mean own_rewards:reward?"),
        ("own_rewards:number", "is not a function"),
        ("waits:f", "must not be async.* use asyncio.run inside"),
        (
            "own_rewards:two",
            r"must be callable as \(prompt, completion, example\).* signature is \(prompt, completion\)",
        ),
        ("raises:f", r"importing it raised ValueError: too few \(raises.py:2\)"),
        ("needs:f", r"importing it raised ModuleNotFoundError: No module named 'absent_package' \(needs.py:1\)"),
        ("crashes:f", r"importing it ended Python \(exit status 3\)"),
    ],
)
def test_a_reward_that_can_not_be_used_is_named_before_the_start(own, name, message):
    (own / "raises.py").write_text("print('loud')\nraise ValueError('too few')\n")
    (own / "needs.py").write_text("import absent_package\n")
    (own / "waits.py").write_text("async def f(prompt, completion, example): ...\n")
    (own / "crashes.py").write_text("import os\nos._exit(3)")
    found = check_reward(name)
    assert re.search(message, str(found)), found
    assert found.key == "hybrid.reward" and found.value == name


NAMES_OF_EARLIER_CONFIGS = ["megalite.hybrid.rewards:exact_match", "megalite.hybrid.rewards:complete_function"]


@pytest.mark.parametrize("name", ["own_rewards:reward", "megalite.rewards:passes_asserts", *NAMES_OF_EARLIER_CONFIGS])
def test_good_rewards_pass_the_check_in_any_working_folder(name, own):
    assert check_reward(name) is None


def test_rewards_and_tasks_need_no_torch():
    modules = "rewards.functions", "rewards.pool", "rewards.worker", "rewards.named", "hybrid.tasks"
    code = "import sys, " + ", ".join(f"megalite.{name}" for name in modules)
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert result.stdout == "False\n", result.stderr
