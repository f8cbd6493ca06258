"""Functions that a config names as `package.module:function`: rewards and sources of prompts, ours and the user's own.

Modules are looked up where Python looks, then in the working folder, then beside the `megalite` package, where a
checkout has `configs`. A user's module may import anything, print, crash or hang, so whether a function is there is
found out in another process: `python -m megalite.rewards.named REQUEST`.
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
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from megalite.errors import ConfigError, Problem
from megalite.run.processes import die_with_parent

CHECK_SECONDS = 60.0
"""Time to import a module that is checked."""
CHECKOUT = Path(__file__).resolve().parents[2]
MOVED = {
    "megalite.hybrid.tasks:additions": "configs.hybrid.grpo_arithmetic:additions",
    "megalite.hybrid.tasks:library_functions": "configs.hybrid.grpo_demo:library_functions",
    "megalite.hybrid.rewards:complete_function": "configs.hybrid.grpo_demo:complete_function",
    "megalite.hybrid.rewards:": "megalite.rewards:",
}
"""How names began that configs may still have, and how they begin now."""


@dataclass(frozen=True, kw_only=True)
class NamedFunction:
    """A function that a config names, and the names of the arguments that it will be called with."""

    name: str
    """`package.module:function`."""
    key: str
    """The config's key that has the name."""
    positional: Collection[str] = ()
    keywords: Collection[str] = ()
    options: Collection[str] = ()
    """Keywords that the user chose, in the mapping at `options_key`."""
    options_key: str = ""

    def load(self) -> Callable[..., Any]:
        """Import its module. ConfigError if there is no such function or it can't be called with the arguments."""
        name = self.name
        for old, new in MOVED.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        module_name, colon, function_name = name.partition(":")
        parts = [*module_name.split("."), *([function_name] if colon else [])]
        if not colon or not all(part.isidentifier() for part in parts):
            fix = f"Write {':'.join(module_name.rsplit('.', 1))}." if "." in module_name and not colon else ""
            raise self._error("must be package.module:function", fix)
        module = self._import(module_name)
        function: Callable[..., Any] | None = getattr(module, function_name, None)
        if function is None or not callable(function):
            functions = [one for one, value in vars(module).items() if inspect.isfunction(value) and one[0] != "_"]
            rule = f"{module_name} has no function {function_name}" if function is None else "is not a function"
            raise self._error(rule, _nearest(function_name, functions, f"{module_name}:"))
        self._check_call(function)
        return function

    def check(self) -> Problem | None:
        """What `load` finds wrong first, in another process; None if nothing is."""
        command = [sys.executable, "-P", "-m", "megalite.rewards.named", json.dumps(asdict(self), default=list)]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
        try:
            said, _ = child.communicate(timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            return self._problem(f"importing it took longer than {CHECK_SECONDS:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if not said:
            return self._problem(f"importing it ended Python ({how_it_ended(child.returncode)})")
        found = json.loads(said)
        return Problem(**found) if found else None

    def _import(self, module_name: str) -> ModuleType:
        for folder in map(str, (Path.cwd(), CHECKOUT)):
            if folder not in sys.path:
                sys.path.append(folder)
        try:
            return importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # a module of the user's may raise anything
            missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
            if not missing or not f"{module_name}.".startswith(f"{missing}."):
                raise self._error(f"importing it raised {described(error)}") from error
            parent, dot, last = missing.rpartition(".")
            fix = _nearest(last, _modules_in(parent), parent + dot)
            where = f"Its folder must be installed, on PYTHONPATH or be {Path.cwd()}."
            raise self._error(f"there is no module {missing}", fix or where) from error

    def _check_call(self, function: Callable[..., Any]) -> None:
        if inspect.iscoroutinefunction(function):
            raise self._error("must not be async", "What it gives is not awaited: use asyncio.run inside.")
        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        given = {*self.positional, *self.keywords}
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
        named = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        known = [one for one in named if one not in given]
        unknown = [one for one in self.options if one not in known]
        if unknown and not takes_any:
            fix = _nearest(unknown[0], known, f"{self.options_key}.") or f"It takes {', '.join(known) or 'none'}."
            rule = f"{self.name} has no such option"
            raise ConfigError(Problem(key=f"{self.options_key}.{unknown[0]}", rule=rule, fix=fix))
        try:
            signature.bind(*self.positional, **dict.fromkeys([*self.keywords, *self.options]))
        except TypeError as error:
            call = ", ".join([*self.positional, *(f"{one}=..." for one in self.keywords)])
            raise self._error(f"must be callable as ({call})", f"Its signature is {signature}: {error}.") from error

    def _problem(self, rule: str, fix: str = "") -> Problem:
        return Problem(key=self.key, rule=rule, value=self.name, fix=fix)

    def _error(self, rule: str, fix: str = "") -> ConfigError:
        return ConfigError(self._problem(rule, fix))


def described(error: BaseException) -> str:
    """`ValueError: too few (rewards.py:12)`: the exception on one line, and where it was raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return (text if len(text) <= 300 else f"{text[:300]}...") + place


def how_it_ended(status: int) -> str:
    """A child's status for people: `SIGSEGV`, `exit status 3`."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _modules_in(package: str) -> list[str]:
    """Names of the modules of a package that has been imported; of the working folder if it is empty."""
    folders = getattr(sys.modules.get(package), "__path__", []) if package else [str(Path.cwd())]
    return [one.name for one in pkgutil.iter_modules(folders)]


def _nearest(name: str, known: Iterable[str], prefix: str) -> str:
    known = list(known)
    close = get_close_matches(name, known, n=1)
    if close:
        return f"Did you mean {prefix}{close[0]}?"
    return f"It has {', '.join(sorted(known))}." if 0 < len(known) <= 12 and prefix.endswith(":") else ""


def _main(function: NamedFunction) -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the module prints must not reach the answer
    found = None
    try:
        function.load()
    except ConfigError as error:
        found = asdict(error.problems[0])
    json.dump(found, answers)
    answers.flush()
    os._exit(0)  # whatever the module has left running


if __name__ == "__main__":
    _main(NamedFunction(**json.loads(sys.argv[1])))
