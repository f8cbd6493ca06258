"""DeepSpeed's launcher without the seconds that importing all of DeepSpeed takes: for ranks that need no deepspeed.

Code and arguments of the launcher are DeepSpeed's own; it has no use for what is replaced. Where test_two_hosts.py
trains, the launcher is that of all of DeepSpeed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

MODULES = {
    "__init__": "__path__.append({real!r})",
    "autotuning": "Autotuner = None",
    "utils": """
import logging
logger = logging.getLogger("deepspeed")
get_numactl_cmd = None
def set_log_level_from_string(level):
    logger.setLevel(level.upper())
""",
    "accelerator": """
class CPU:
    export_envs = list
    def device_count(self):
        return 1
    def visible_devices_envs(self):
        return ["CUDA_VISIBLE_DEVICES"]
    def set_visible_devices_envs(self, environment, devices):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
def get_accelerator():
    return CPU()
""",
}


def launcher_only(folder: Path) -> Path:
    """Write a package `deepspeed` into `folder`, which is made; returns `folder`, to be put into PYTHONPATH."""
    found = find_spec("deepspeed")
    assert found is not None and found.submodule_search_locations
    (package := folder / "deepspeed").mkdir(parents=True)
    for module, text in MODULES.items():
        (package / f"{module}.py").write_text(text.replace("{real!r}", repr(found.submodule_search_locations[0])))
    return folder
