"""What a device can do: profiles from data sheets, and what `--calibrate` measured on this machine. Imports no torch.

A data sheet says what a device does at best. What programs get of it is taken from an H100, on which all was measured
(docs/performance.md): 92% of the memory's rate, 71% of the matmul rate, 62% of a link's.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError, Problem
from megalite.files import write_json
from megalite.planner.memory import host_memory

READ_SHARE, MATMUL_SHARE, LINK_SHARE = 0.92, 0.71, 0.62
"""Of a data sheet's rates, measured on an H100: 3.07 of 3.35 TB/s, 707 of 989 TFLOP/s, 280 of 450 GB/s."""
GB = 10**9
PEAKS = {
    **{"A100": 312e12, "A800": 312e12, "A10G": 70e12, "A10": 125e12, "A30": 165e12, "A40": 150e12, "A6000": 155e12},
    **{"H100": 989e12, "H100 PCIE": 756e12, "H100 NVL": 835e12, "H800": 989e12, "H200": 989e12, "GH200": 989e12},
    **{"H20": 148e12, "B200": 2250e12, "L4": 121e12, "L40S": 362e12, "L40": 181e12},
    **{"RTX 3090": 71e12, "RTX 4090": 165e12},
}
"""bfloat16 operations a second, dense, with sums in float32: the makers' data sheets, by what a device's name holds."""


def peak_flops(device_name: str) -> float | None:
    """bfloat16 operations a second of a device of that name; None if it is not known."""
    words = device_name.upper().replace("-", " ").split()
    found = [name for name in PEAKS if all(part in words for part in name.split())]
    return PEAKS[max(found, key=len)] if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device, or the processor of one host, which its ranks share. Rates are those that programs reach."""

    name: str
    kind: str = "cuda"
    memory: int
    """Bytes that programs find free."""
    matmul: float
    """Operations a second, in bfloat16 on a GPU and in float32 on a CPU."""
    fp8: float = 2.0
    """Times that rate in float8, where kernels multiply codes of weights; 0: they do not, and codes become numbers."""
    read: float
    """Bytes a second from its memory."""
    link: float
    """Bytes a second to another device of the host, one way."""
    link_latency: float = 5e-6
    """Seconds of a sum of a few numbers over two devices."""
    hop_latency: float = 15e-6
    """Seconds of a message of a few numbers to the next pipeline stage."""
    network: float
    """Bytes a second of one device to another host, one way."""
    network_latency: float = 20e-6
    kernel: float = 3e-6
    """Seconds that each kernel costs beside its reading and computing; on a CPU each operation."""
    launch: float = 40e-6
    """Seconds in which the host launches a kernel of a step that is not captured; 0: there is no such thing."""
    step: float = 0.3e-3
    """Seconds of the host for a step,"""
    row: float = 7e-6
    """and for each of its rows."""
    row_layer: float = 0.0
    """Seconds of each row in each layer: on a CPU sequences of different lengths are attended one by one."""
    overlaps: bool = True
    """The host prepares a step while the device runs the one before."""
    cores: int = 1
    """Of a CPU: ranks beyond it take turns."""
    source: str
    """Where the numbers come from."""

    @property
    def shared(self) -> bool:
        """Its ranks divide it among them."""
        return self.kind == "cpu"


def _from_sheet(
    name: str, *, memory: float, read: float, link: float, network: float, source: str, **more: Any
) -> Device:
    """From a data sheet: GiB that are free of it, GB/s of memory, link and network, one way."""
    return Device(
        name=name,
        memory=int(memory * 2**30),
        matmul=PEAKS[name] * MATMUL_SHARE,
        read=read * GB * READ_SHARE,
        link=link * GB * LINK_SHARE,
        network=network * GB * LINK_SHARE,
        source=source,
        **more,
    )


_PCIE: dict[str, Any] = {"link_latency": 20e-6, "hop_latency": 30e-6}
"""Devices that no NVLink connects: sums go through NCCL."""
PROFILES = {
    one.name.lower().replace(" ", ""): one
    for one in (
        _from_sheet(
            "A100", memory=79.0, read=2039, link=300, network=25,
            source="NVIDIA A100 80GB SXM data sheet; HDR InfiniBand a GPU, as in DGX A100", fp8=0.0,
        ),
        _from_sheet(
            "H100", memory=79.0, read=3350, link=450, network=50,
            source="NVIDIA H100 SXM data sheet (dense: half of the sheet's 1,979); NDR InfiniBand a GPU",
        ),
        _from_sheet(
            "H200", memory=139.5, read=4800, link=450, network=50,
            source="NVIDIA H200 SXM data sheet (dense: half of the sheet's 1,979); NDR InfiniBand a GPU",
        ),
        _from_sheet(
            "B200", memory=178.0, read=8000, link=900, network=50,
            source="NVIDIA DGX B200 data sheet, an eighth of it (dense); NDR InfiniBand a GPU",
        ),
        _from_sheet(
            "L4", memory=22.0, read=300, link=32, network=3,
            source="NVIDIA L4 data sheet (dense: half of the sheet's 242); PCIe 4.0 x16; a share of 100 Gb/s Ethernet",
            **_PCIE,
        ),
        _from_sheet(
            "RTX 4090", memory=23.5, read=1008, link=32, network=3,
            source="NVIDIA Ada architecture white paper, appendix A (sums in float32); PCIe 4.0; a share of 100 Gb/s",
            **_PCIE,
        ),
    )
}  # fmt: skip
"""By the name in small letters."""


def visible_gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of each GPU that a run here would use; asks the driver's own tool, no torch."""
    try:
        asked = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
        text = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = {}
    for line in text.splitlines():
        index, uuid, name, mib = (part.strip() for part in line.split(","))
        found[index] = found[uuid] = (name, (int(mib) if mib.isdecimal() else 0) << 20)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [one for one in found if one.isdecimal()] if chosen is None else [one.strip() for one in chosen.split(",")]
    return [found[name] for name in names if name in found]


MEASURED = ("matmul", "read", "link", "link_latency", "hop_latency", "kernel", "launch", "step", "row", "row_layer")
"""Fields that `--calibrate` measures."""


def processor() -> Device:
    """This machine's CPU where nothing was measured: of the order of what a server's core does."""
    cores = len(os.sched_getaffinity(0))
    return Device(
        name="cpu",
        kind="cpu",
        memory=host_memory(),
        fp8=0.0,
        matmul=40e9 * cores,
        read=10e9 * min(cores, 16),
        link=2e9,
        link_latency=300e-6,
        hop_latency=200e-6,
        network=1e9,
        network_latency=300e-6,
        kernel=12e-6,
        launch=0.0,
        step=0.5e-3,
        row=20e-6,
        row_layer=10e-6,
        overlaps=False,
        cores=cores,
        source="a guess for any processor; --calibrate measures this one",
    )


def named(name: str) -> Device:
    """The profile of a device by its name (`h200`, `cpu`, or what the driver calls it), as measured if it was.

    ConfigError for one that is not known.
    """
    flat = "".join(name.lower().replace("nvidia", "").replace("geforce", "").split())
    known = {**PROFILES, "cpu": processor()}
    found = next((known[one] for one in sorted(known, key=len, reverse=True) if flat.startswith(one)), None)
    if found is None:
        names = ", ".join(known)
        rule = f"no profile of this name; there are {names}"
        raise ConfigError(Problem(key="--device", rule=rule, value=name, fix="Run --calibrate on such a machine."))
    measured: dict[str, Any] = dict(_calibrations().get(_kept_as(found.name), {}))
    source = f"{', '.join(measured)} measured on this machine ({calibration_file()}); else {found.source}"
    return replace(found, **measured, source=source) if measured else found


def planned_as(name: str) -> Device:
    """As `named`; a device that is not known counts as an A100, and its source says so."""
    try:
        return named(name)
    except ConfigError:
        return replace(PROFILES["a100"], name=name, source="not known; planned as an A100")


def calibration_file() -> Path:
    """Where measurements are kept: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "megalite" / "devices.json"


def _kept_as(name: str) -> str:
    """What a device's measurements are kept under: a processor's belong to its model and to so many of its cores, since
    hosts that share a home differ in these."""
    if name != "cpu":
        return name
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"cpu: {name}, {len(os.sched_getaffinity(0))} cores"


def _calibrations() -> dict[str, dict[str, float]]:
    """Fields of devices that were measured here, by name; a file that can't be read counts as none."""
    try:
        found = json.loads(calibration_file().read_text(encoding="utf-8"))
        return {name: {key: values[key] for key in MEASURED if key in values} for name, values in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(name: str, values: dict[str, float]) -> Path:
    """Keep what was measured of a device, fields of MEASURED; gives the file."""
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_calibrations(), _kept_as(name): values})
    return path
