"""The command-line tools as a user meets them: output, exit codes, messages of one to three lines."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hub_server import Hub
from random_models import Sizes, contents, write_model
from waiting import PATIENCE, wait_until

from megalite.convert.convert import convert
from megalite.convert.verify import verify
from megalite.core.layout import Layout
from megalite.tokenizer import Tokenizer
from megalite.tools import toolkit
from megalite.weights import manifest as manifests
from megalite.weights.shards import JOURNAL

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints" / "demo"
TOOLS = ("convert", "reshard", "export", "verify", "describe", "import_deepspeed", "draw_weights", "draw_rewards")


@pytest.fixture
def tool(forks):
    """Run a tool; gives what it printed on standard output, or on standard error if it is to fail."""

    def tool(name: str, *arguments: object, code: int = 0, **environment: str) -> str:
        run = forks.tool(name, *arguments, **environment)
        assert run.code == code, run.out + run.err
        assert "Traceback" not in run.err
        return run.err if code > 1 else run.out

    return tool


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    model = write_model(folder / "model", Sizes("llama"))
    convert(model, Layout(2, 2), folder / "cut")
    return folder / "cut"


def test_a_round_trip_of_the_demo_model(tool, tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    said = tool("convert", "--model", DEMO, "--layout", "tp=4,pp=2", "--out", a)
    assert said.startswith(f"{a}: 8 weight files, ") and "tp=4,pp=2, manifest.json" in said
    assert (
        tool("convert", "--model", DEMO, "--layout", "tp=4,pp=2", "--out", a) == f"{a}: already whole, nothing to do\n"
    )
    tool("reshard", "--from", a, "--layout", "tp=2,pp=3", "--out", b, "--jobs", "1")
    tool("export", "--from", b, "--out", c, "--max-shard-size", "8MB")
    assert "all is well; 8 weight files" in tool("verify", a, "--against", DEMO)
    assert "all is well" in tool("verify", c, "--against", DEMO)
    assert contents(DEMO) == contents(c)
    sizes = [path.stat().st_size for path in c.glob("*.safetensors")]
    assert len(sizes) == 3 and max(sizes) < 8.1e6
    assert {path.name for path in DEMO.glob("*token*")} == {path.name for path in c.glob("*token*")}


def test_the_perplexity_of_a_quantized_model(tool, tmp_path):
    """`verify --text`, against transformers."""
    from reference import load

    out, text = tmp_path / "int8", tmp_path / "text"
    text.write_text((DEMO / "README.md").read_text()[:500])
    tool("convert", "--model", DEMO, "--quantize", "int8", "--out", out)
    said = tool("verify", out, "--against", DEMO, "--text", text).splitlines()
    assert (
        sum("rounding error" in line for line in said) == 8 * 7 and f"{out}: all is well; 1 weight file, " in said[-1]
    )
    ids = torch.tensor(Tokenizer.load(DEMO).encode(text.read_text()))
    want = []
    for folder in (out, DEMO):
        logprobs = load(folder)(ids[None]).logits[0, :-1].log_softmax(-1)
        want.append((-logprobs.gather(1, ids[1:, None]).double().mean()).exp().item())
    line = next(line for line in said if "perplexity" in line)
    found = re.fullmatch(rf"note: perplexity of {text} \((\d+) tokens\): (\S+), of {DEMO} (\S+) \((\S+)%\)", line)
    assert found is not None and int(found[1]) == len(ids) - 1 <= 1023
    assert [float(found[2]), float(found[3])] == pytest.approx(want, rel=1e-4)
    assert float(found[4]) == pytest.approx(100 * (want[0] / want[1] - 1), abs=0.02)


def test_a_model_of_the_hub_with_all_that_belongs_to_it(tool, tmp_path):
    model = write_model(tmp_path / "model", Sizes("llama", files=2))
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    beside = {"merges.txt": b"a b", "spiece.model": b"binary", "LICENSE": b"yours"}
    arguments = ["--layout", "tp=2", "--out", tmp_path / "cut"]
    with Hub() as hub:
        hub.add("owner/tiny", {**files, **beside, "modeling_tiny.py": b"raise SystemExit"})
        environment = hub.environment(tmp_path / "cache")
        tool("convert", "--model", "owner/tiny", *arguments, **environment)
        assert "all is well" in tool(
            "verify", tmp_path / "cut", "--against", "owner/tiny", **environment, HF_HUB_OFFLINE="1"
        )
    assert {name: (tmp_path / "cut" / name).read_bytes() for name in beside} == beside
    assert verify(tmp_path / "cut", model).is_well and not (tmp_path / "cut" / "modeling_tiny.py").exists()


def test_verify_says_what_differs_with_exit_code_1(tool, cut, tmp_path):
    file = cut / "rank-002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        said = tool("verify", cut, code=1)
    finally:
        file.write_bytes(whole)
    lines = said.splitlines()
    assert lines[0].startswith(f"{file}: ") and lines[0].endswith("its bytes are not those of the manifest")
    assert f"{cut}: 1 finding; 4 weight files" in lines[-1]


def test_describe(tool, cut, tmp_path):
    said = tool("describe", cut)
    assert f"{cut}: rank shards" in said and "llama (LlamaForCausalLM), 3 layers" in said
    assert "tp 1, pp 0, layers 0.." in said
    assert "head and embedding apart" in said
    demo = tool("describe", DEMO)
    for words in (
        "8 query, 2 key/value, 64 wide, hidden size 320",
        "1,024 tokens",
        "4,096, head and embedding tied",
        "4,096 tokens, no chat template",
        "ends with   0 <|endoftext|>",
        "temperature=0.7, top_p=0.95",
    ):
        assert words in demo
    facts = json.loads(tool("describe", cut, "--json"))
    assert facts["layout"] == {"tp": 2, "pp": 2} and facts["dtypes"].keys() == {"BF16"}
    model = json.loads(tool("describe", cut.parent / "model", "--json"))
    assert model["parameters"] == facts["parameters"] == sum(t["bytes"] for t in facts["tensors"]) // 2
    assert model["layout"] is None and model["form"] == "Hugging Face folder"
    assert [t["bytes"] for t in facts["tensors"]] == sorted((t["bytes"] for t in facts["tensors"]), reverse=True)
    assert sum(file["bytes"] for file in facts["files"]) == facts["bytes"]
    assert len(tool("describe", cut, "--all").splitlines()) > len(said.splitlines())


def test_describe_a_tensor(tool, cut):
    import torch
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.down_proj.weight"
    values = load_file(cut.parent / "model" / "model.safetensors")[name].double()
    facts = json.loads(tool("describe", cut, "--tensor", name, "--json"))
    assert facts["shape"] == list(values.shape) and "statistics" not in facts
    assert [place["range"] for place in facts["places"]] == [f"{name} columns 0..10", f"{name} columns 10..20"]
    found = json.loads(tool("describe", cut, "--tensor", name, "--json", "--statistics"))["statistics"]
    assert found["count"] == values.numel() and found["nan"] == 0
    wanted = {"min": values.min(), "max": values.max(), "mean": values.mean(), "std": values.std(unbiased=False)}
    for key, value in wanted.items():
        torch.testing.assert_close(torch.tensor(found[key]).double(), value)
    said = tool("describe", cut, "--tensor", "layers.1.mlp.down.weight", "--statistics")
    assert said.count("rank-00") == said.count("mean") == 2
    assert "Did you mean model.layers.1.mlp.down_proj.weight?" in tool("describe", cut, "--tensor", name[:-3], code=2)


def test_the_picture_of_the_readme_is_true(tool, tmp_path):
    """Drawn anew from the weight table it is what is in docs."""
    tool("draw_weights", "--model", DEMO, "--out", tmp_path / "weights.svg")
    assert (tmp_path / "weights.svg").read_text() == (ROOT / "docs" / "weights.svg").read_text()


def test_rewards_are_drawn_from_logs(tool, tmp_path):
    """Runs may be of different lengths; a log that isn't one, and one that lacks the beginning, are refused."""
    logs = []
    for seed, count in enumerate((20, 30)):
        logs.append(tmp_path / f"{seed}.jsonl")
        rows = [{"supervised_step": 1, "loss": 2.0}]
        rows += [{"iteration": number + 1, "reward": number / 40} for number in range(count)]
        logs[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.svg"
    tool("draw_rewards", *logs, "--title", "Up & up", "--out", out)
    picture = ElementTree.fromstring(out.read_text())
    lines = [line.get("points").split() for line in picture.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [20, 30, 20]
    assert lines[0] == lines[2] and lines[1][:20] == lines[0]
    words = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "Up & up" in words and any("from 0.01 to 0.46" in word for word in words)
    tool("draw_rewards", *logs, "--title", "x" * 90, "--words", "y" * 200, "--out", out)
    sizes = {
        text.text: float(text.get("font-size"))
        for text in ElementTree.fromstring(out.read_text()).iter("{http://www.w3.org/2000/svg}text")
    }
    assert len(sizes) > 10 and all(0.55 * size * len(word) < 760 for word, size in sizes.items()), "in any font"
    logs[0].write_text('{"iteration": 2, "reward": 0.5}\n')
    assert "from the first" in tool("draw_rewards", logs[0], "--out", out, code=2)
    assert "is not the log" in tool("draw_rewards", tmp_path / "none", "--out", out, code=2)
    assert "It has reward" in tool("draw_rewards", logs[1], "--key", "rewards", "--out", out, code=2)


@pytest.mark.parametrize("name", [*TOOLS, "bench"])
def test_help_is_quick_and_says_how(tool, name):
    said = tool(name, "--help")
    assert "usage:" in said and "--debug" in said and ("example:" in said or name == "bench")


def test_tools_start_without_torch():
    code = (
        "import sys, runpy; sys.path.insert(0, 'tools'); from megalite.tools import bench, toolkit\n"
        "for name in 'convert', 'reshard', 'export', 'verify', 'describe', 'import_deepspeed':\n"
        "    __import__(f'megalite.tools.{name}')\n"
        "for name in 'draw_weights', 'draw_rewards':\n"
        "    runpy.run_path(f'tools/{name}.py')\n"
        "print([heavy for heavy in ('torch', 'deepspeed', 'transformers', 'huggingface_hub') if heavy in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("convert", [], 2, "error: the following arguments are required: --model, --out"),
        (
            "convert",
            ["--model", "M", "--layout", "tp=0", "--out", "O"],
            2,
            "--layout: must be sizes of tp and pp from 1",
        ),
        ("convert", ["--model", "M", "--layout", "tp=2", "--out", "O", "--jobs", "0"], 2, "must be a whole number"),
        ("convert", ["--model", "M", "--layout", "tp=2", "--out", "O", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
        (
            "convert",
            ["--model", "nowhere", "--layout", "tp=2", "--out", "O"],
            3,
            "error: nowhere: no such model folder",
        ),
        ("reshard", ["--from", "nowhere", "--layout", "tp=2", "--out", "O"], 3, "error: nowhere: no such model folder"),
        ("export", ["--from", "CUT", "--out", "O", "--max-shard-size", "many"], 2, "must be a size such as 5GB"),
        ("export", ["--from", "CUT", "--out", "CUT"], 2, "error: --out: is the folder that is read"),
        ("verify", ["nowhere"], 3, "error: nowhere: no such model folder"),
        ("verify", ["CUT", "--against", "CUT", "--text", "nowhere"], 2, "--text: can't be read (No such file"),
        ("verify", ["CUT", "--against", "nowhere"], 3, "error: nowhere: no such model folder"),
        (
            "convert",
            ["--model", "MODEL", "--quantize", "int4", "--group", "7", "--out", "O"],
            2,
            "--group: must be",
        ),
        ("describe", ["MODEL", "--tensor", "nothing"], 2, "--all lists all names"),
        ("describe", ["MODEL", "--bogus"], 2, "error: unrecognized arguments: --bogus"),
        ("describe", ["MODEL", "--family-module", "no_such_module"], 2, "importing it failed: ModuleNotFoundError"),
    ],
)
def test_mistakes_have_their_line_and_exit_code(name, arguments, code, message, cut, tool):
    places = {"CUT": cut, "MODEL": cut.parent / "model"}
    said = tool(name, *(places.get(one, one) for one in arguments), code=code)
    assert message in said and len(said.splitlines()) <= 3


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "folder/file"), 3, "folder/file: Permission denied."),
        (OSError(errno.ENOSPC, "", "folder/file"), 4, "folder/file: No space left on device. Free some space"),
        (MemoryError(), 4, "out of memory. Use more"),
        (OSError(errno.EBADF, "Bad file descriptor"), 1, "Traceback"),
    ],
)
def test_what_the_machine_refuses_is_no_crash(monkeypatch, capsys, error, code, says):
    def run(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["tool"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert toolkit.main(toolkit.Parser("does nothing"), run) == code
    said = capsys.readouterr().err
    assert said.startswith(says if code == 1 else f"error: {says}") and ("Traceback" in said) == (code == 1)


def test_a_family_of_ones_own_can_be_converted(tool, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from megalite.model import families\n"
        "families.register('mine', replace(families.FAMILIES['llama'], architecture='MineForCausalLM'))\n"
    )
    model = write_model(tmp_path / "model", Sizes("llama"))
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "architectures": ["MineForCausalLM"]}))
    arguments = ["--model", model, "--layout", "tp=2", "--out", tmp_path / "out"]
    assert "MineForCausalLM is not supported" in tool("convert", *arguments, code=2)
    own = ["--family-module", "mine"]
    tool("convert", *arguments, *own, PYTHONPATH=str(tmp_path))
    assert "mine (MineForCausalLM)" in tool("describe", tmp_path / "out", *own, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(tool, number, tmp_path):
    """Even one that hangs; what is finished is kept for the next run."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), "--model", str(DEMO), "--layout", "pp=2"]
    environment = {**os.environ, "MEGALITE_FAULT": "shards.written#60=hang"}
    process = subprocess.Popen(
        [*command, "--out", str(out), "--jobs", "1"], stderr=subprocess.PIPE, text=True, env=environment
    )
    journal = out / JOURNAL
    wait_until(lambda: journal.exists() and len(journal.read_bytes().splitlines()) >= 2, "a finished file")
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert "Traceback" not in said and len(said.splitlines()) == 1
    assert "of an interrupted run kept" in tool("convert", "--model", DEMO, "--layout", "pp=2", "--out", out)
    assert manifests.read(out).layout == Layout(1, 2)
