"""Functions that a config names as `package.module:function`: rewards and sources of prompts, ours and the user's own.

Modules are looked up where Python looks, then in the working folder. A user's module may import anything, print, crash
or hang, so whether a function is there is found out in another process: `python -m megalite.rewards.named REQUEST`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError, Problem
from megalite.run.processes import die_with_parent

CHECK_SECONDS = 60.0
"""Time to import a module that is checked."""


def named_function(name: str, *, key: str) -> Callable[..., Any]:
    """The function that `name`, the value of the config's `key`, names; imports its module. ConfigError if it can't."""
    module_name, colon, function_name = name.partition(":")
    parts = [*module_name.split("."), *([function_name] if colon else [])]
    if not colon or not all(part.isidentifier() for part in parts):
        fix = f"Write {':'.join(module_name.rsplit('.', 1))}." if "." in module_name and not colon else ""
        raise ConfigError(Problem(key=key, rule="must be package.module:function", value=name, fix=fix))
    module = _module(module_name, name, key)
    function = getattr(module, function_name, None)
    if not callable(function):
        rule = f"{module_name} has no function {function_name}" if function is None else "is not a function"
        functions = [one for one, value in vars(module).items() if inspect.isfunction(value) and one[0] != "_"]
        raise ConfigError(
            Problem(key=key, rule=rule, value=name, fix=_nearest(function_name, functions, f"{module_name}:"))
        )
    return function


def _module(module_name: str, name: str, key: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and f"{module_name}.".startswith(f"{missing}."):
            parent, dot, last = missing.rpartition(".")
            fix = _nearest(last, _modules_in(parent), parent + dot)
            where = f"Its folder must be installed, on PYTHONPATH or be {Path.cwd()}."
            raise ConfigError(
                Problem(key=key, rule=f"there is no module {missing}", value=name, fix=fix or where)
            ) from error
        raise _failed(error, name, key) from error
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise _failed(error, name, key) from error


def _failed(error: BaseException, name: str, key: str) -> ConfigError:
    return ConfigError(Problem(key=key, rule=f"importing it raised {described(error)}", value=name))


def described(error: BaseException) -> str:
    """`ValueError: too few (rewards.py:12)`: the exception on one line, and where it was raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return (text if len(text) <= 300 else f"{text[:300]}...") + place


def _modules_in(package: str) -> list[str]:
    """Names of the modules of a package that has been imported; of the working folder if it is empty."""
    paths = list(sys.modules[package].__path__) if package in sys.modules else [str(Path.cwd())] if not package else []
    return [module.name for module in pkgutil.iter_modules(paths)]


def _nearest(name: str, known: Iterable[str], prefix: str) -> str:
    known = list(known)
    close = get_close_matches(name, known, n=1)
    if close:
        return f"Did you mean {prefix}{close[0]}?"
    return f"It has {', '.join(sorted(known))}." if 0 < len(known) <= 12 and prefix.endswith(":") else ""


def check_call(
    function: Callable[..., Any],
    name: str,
    *,
    key: str,
    arguments: Sequence[str] = (),
    given: Iterable[str] = (),
    options: Iterable[str] = (),
    options_key: str = "",
) -> None:
    """ConfigError unless `function(*arguments, **given, **options)` fits its signature.

    `options` are names that the user chose, at the config's `options_key`; the others are the caller's.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    unknown = [one for one in options if one not in named or one in given] if not takes_any else []
    if unknown:
        known = [one for one in named if one not in given]
        fix = _nearest(unknown[0], known, f"{options_key}.") or f"It takes {', '.join(known) or 'none'}."
        raise ConfigError(Problem(key=f"{options_key}.{unknown[0]}", rule=f"{name} has no such option", fix=fix))
    try:
        signature.bind(*arguments, **dict.fromkeys([*given, *options]))
    except TypeError as error:
        call = f"({', '.join([*arguments, *(f'{one}=...' for one in given)])})"
        fix = f"Its signature is {signature}: {error}."
        raise ConfigError(Problem(key=key, rule=f"must be callable as {call}", value=name, fix=fix)) from error


# ---- in another process


def check_named(
    name: str,
    *,
    key: str,
    arguments: Sequence[str] = (),
    given: Iterable[str] = (),
    options: Iterable[str] = (),
    options_key: str = "",
) -> Problem | None:
    """The first problem that `named_function` and then `check_call` have with a function, if any."""
    request = {"name": name, "key": key, "arguments": list(arguments), "given": list(given)}
    request |= {"options": list(options), "options_key": options_key}
    command = [sys.executable, "-P", "-m", "megalite.rewards.named", json.dumps(request)]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    try:
        said, _ = child.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return Problem(key=key, rule=f"importing it took longer than {CHECK_SECONDS:g} s", value=name)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if not said:
        return Problem(key=key, rule=f"importing it ended Python ({how_it_ended(child.returncode)})", value=name)
    problem = json.loads(said)["problem"]
    return Problem(**problem) if problem else None


def how_it_ended(status: int) -> str:
    """A child's status for people: `SIGSEGV`, `exit status 3`."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _main(request: dict[str, Any]) -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the module prints must not reach the answer
    found = None
    try:
        function = named_function(request["name"], key=request["key"])
        check_call(function, **request)
    except ConfigError as error:
        found = asdict(error.problems[0])
    json.dump({"problem": found}, answers)
    answers.flush()
    os._exit(0)  # whatever the module has left running


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
