"""Which ends of a run are followed by another start, and what that one is told."""

from __future__ import annotations

import pytest

from megalite.config.load import load_config
from megalite.run import restarts


@pytest.fixture
def starts(monkeypatch):
    """Starts that end with the given codes; what each was told, and the pauses."""
    told, pauses = [], []
    monkeypatch.setattr(restarts.time, "sleep", pauses.append)

    def run(loaded, codes, most, before=lambda number: None):
        codes = list(codes)

        def start(given):
            told.append(given)
            before(len(told))
            return codes.pop(0)

        return restarts.run(loaded, start, most), told, pauses

    return run


def a_config(folder, kind, *overrides):
    (folder / "job.yaml").write_text("model: {path: m}\n")
    return load_config(kind, folder / "job.yaml", list(overrides))


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 130, 143])
def test_an_end_that_is_settled_stays(tmp_path, starts, code):
    assert starts(a_config(tmp_path, "train"), [code], 3)[0] == code


def test_what_is_lost_starts_again_until_there_is_no_more(tmp_path, starts, capsys):
    code, told, pauses = starts(a_config(tmp_path, "train"), [70, 1, 137, 70], 3)
    assert (code, len(told), pauses) == (70, 4, [1.0, 2.0, 4.0])
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "the run ended with code 1; restart 2 of 3 in 2 s, from what is on disk."


def test_a_run_goes_on_with_its_own_state(tmp_path, starts):
    _, (first, second), _ = starts(a_config(tmp_path, "train", "output.resume=false"), [70, 0], 3)
    assert (first.config.output.resume, second.config.output.resume) == (False, True)
    assert second.sha256 != first.sha256 and "resume: true" in second.text


def test_output_is_overwritten_once(tmp_path, starts):
    """By the first run that gets so far."""
    file = tmp_path / "out.jsonl"
    file.write_text("of another run\n")
    loaded = a_config(tmp_path, "infer", f"output.file={file}", "output.overwrite=true")
    _, told, _ = starts(loaded, [70, 70, 0], 3, lambda number: file.write_text("ours") if number == 2 else None)
    assert [one.config.output.overwrite for one in told] == [True, True, False]
