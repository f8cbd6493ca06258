"""The chat in the terminal."""

import codecs
import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="pip install 'megalite[serve]'")
pytest.importorskip("fastapi", reason="pip install 'megalite[serve]'")

from serve_backend import ANSWER, KEY, Backend
from waiting import PATIENCE, wait_until

from megalite.errors import ConfigError
from megalite.serve.console import Console, Remote, ServerError
from megalite.tools import toolkit
from megalite.tools.chat import read_key, serve_command, serve_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def backend():
    return Backend()


@pytest.fixture
def url(backend):
    with backend.served() as url:
        yield url


def typed(remote: Remote, *lines: str | type[BaseException], **options) -> str:
    """What is printed to one who types these lines."""
    out, rest = io.StringIO(), iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    Console(remote, out=out, **options).run(read)
    return out.getvalue()


def test_a_conversation(backend, url, tmp_path):
    file = tmp_path / "said.json"
    remote = Remote(url + "/v1/", params={"temperature": 0.5})
    lines = ["Hello", "", KeyboardInterrupt, "/system Be brief.", "Again", f"/save {file}", f"/save {file}", "/what"]
    said = typed(remote, *lines, "/reset", "Anew", "/quit", "not read")
    assert said.startswith("models/demo; /help lists the commands.\n" + ANSWER + "\n")
    assert said.count(ANSWER) == 3 and f"error: {file}: File exists" in said and "/system TEXT  the system" in said
    first, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}
    system, again = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Again"}
    assert [body["messages"] for _, body in backend.asked] == [
        [first],
        [system, first, answer, again],
        [system, {"role": "user", "content": "Anew"}],
    ]
    expected = {"model": "models/demo", "stream": True, "temperature": 0.5}
    assert {key: backend.asked[0][1][key] for key in expected} == expected
    assert json.loads(file.read_text()) == {"messages": [system, first, answer, again, answer]}


def test_errors_are_shown_and_the_chat_goes_on(backend, url):
    remote = Remote(url)
    backend.mishap = "halfway"
    assert typed(remote, "Hello").endswith(ANSWER + "\nerror: all replicas were lost\n")
    backend.mishap = "no template"
    said = typed(remote, "Once upon")
    assert "error: " not in said and said.endswith("it goes on with your texts.\n" + ANSWER + "\n")
    assert backend.asked[-1] == ("/v1/completions", {"model": "models/demo", "stream": True, "prompt": "Once upon"})


def test_a_text_without_an_answer_is_no_success_of_a_script(backend, url, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["chat", "--url", url])
    for backend.mishap, code in (("halfway", 1), ("", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        assert toolkit.tool("chat") == code


def test_a_server_that_refuses_or_is_not_there(backend, url):
    backend.needs_key = True
    with pytest.raises(ServerError, match="answers 401: wrong key"):
        typed(Remote(url))
    assert ANSWER in typed(Remote(url, key=KEY), "Hello")
    with pytest.raises(ServerError, match="can't be reached"):
        typed(Remote("http://127.0.0.1:9"))
    for wrong in ("ftp://x", "http://", "x:port", "http://x/?y=1"):
        with pytest.raises(ConfigError, match="--url: must be like"):
            Remote(wrong)


def test_keys_are_read_where_they_are_and_never_said(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("secret\n")
    monkeypatch.setenv("A_KEY", "secret")
    assert read_key("env:A_KEY") == read_key(f"file:{tmp_path / 'key'}") == "secret"
    with pytest.raises(ConfigError, match="must say where the key is") as error:
        read_key("secret")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="--api-key: the file can't be read: No such file"):
        read_key(f"file:{tmp_path / 'nothing'}")


def test_at_a_terminal(backend, url, tmp_path):
    """Ctrl-C stops the answer and not the program; the end of input ends it."""
    control, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "launch/chat.py"), "--url", url, "--system", "Be kind."]
    program = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(terminal)
    os.set_blocking(control, False)
    said, text = "", codecs.getincrementaldecoder("utf-8")()

    def seen(what: str) -> bool:
        nonlocal said
        try:
            said += text.decode(os.read(control, 1 << 16))
        except BlockingIOError:
            pass
        return what in said

    try:
        wait_until(lambda: seen("> "), "it asks")
        backend.endless = True
        os.write(control, b"For ever?\n")
        wait_until(lambda: seen("....."), "an answer goes on")
        os.write(control, b"\x03")
        wait_until(lambda: seen(" [stopped]"), "it is stopped")
        assert backend.left.wait(PATIENCE), "the server hears of it"
        backend.endless = False
        os.write(control, b"And now?\n")
        wait_until(lambda: said.count("twice:") == 2 or seen("\0"), "the next one is answered")
        os.write(control, b"\x04")
        assert program.wait(PATIENCE) == 0
    finally:
        program.kill()
        os.close(control)
    assert "Traceback" not in said
    roles = [message["role"] for message in backend.asked[1][1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_how_a_server_is_started():
    here = [sys.executable, "-u"]
    assert serve_command(["python", "launch/chat.py", "--url", "x"]) == [*here, str(Path("launch/serve.py").absolute())]
    assert serve_command(["python3", "/bin/megalite", "chat"]) == [*here, "/bin/megalite", "serve"]


def test_the_config_of_an_inference_job_or_a_server(tmp_path):
    model = f"model: {{path: {ROOT / 'checkpoints/demo'}}}\n"
    file = tmp_path / "job.yaml"
    file.write_text(model + "input: {prompts: [not used]}\nsampling: {temperature: 0.25}\n")
    made = serve_config(str(file), ["parallel.pp=2"]).config
    assert (made.sampling.temperature, made.parallel.pp) == (0.25, 2)
    assert (made.server.host, made.server.port) == ("127.0.0.1", 0)
    assert made.server.api_key == "env:MEGALITE_CHAT_KEY"
    file.write_text(model + "server: {host: 0.0.0.0, max_samples: 3}\n")
    made = serve_config(str(file), []).config
    assert (made.server.max_samples, made.server.host) == (3, "127.0.0.1")
    with pytest.raises(ConfigError, match="unknown key") as error:
        serve_config(str(file), ["parallel.pp=99", "sampling.temperatur=1"])
    assert {problem.key for problem in error.value.problems} == {"parallel.pp", "sampling.temperatur"}
    with pytest.raises(ConfigError, match="nothing.yaml: no such file"):
        serve_config(str(tmp_path / "nothing.yaml"), [])


def test_options_of_the_other_kind_of_chat_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for wrong in (["--model", "x"], ["--api-key", "env:X"]):
        monkeypatch.setattr(sys, "argv", ["chat", "--config", "job.yaml", *wrong])
        assert toolkit.tool("chat") == 2
        assert f"error: {wrong[0]}: goes with --url" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_of_its_own(tmp_path):
    """A chat over a config: what is typed reaches the model, and at the end nothing is left."""
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {{path: {ROOT / 'checkpoints/demo'}, dtype: float32}}\nengine: {{max_model_len: 64}}\n"
        "sampling: {temperature: 0, max_tokens: 5}\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/chat.py"), "--config", str(config)],
        input="def f(x):\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "MEGALITE_CHAT_TEST": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    head, hint, *answer = done.stdout.splitlines()
    assert head.endswith("checkpoints/demo; /help lists the commands.")
    assert hint.startswith("hint: this model has no chat template")
    assert "".join(answer).strip(), "the demo goes on with a text"
    assert "replica 0 is ready" in done.stderr and "GET " not in done.stderr
    assert not [one for one in Path("/proc").glob("[0-9]*/environ") if str(tmp_path) in _environment(one)]


def _environment(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
