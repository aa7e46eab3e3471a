"""Which machine a committed figure comes from."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax


def cpu_name() -> str:
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0].split(":")[1].strip() if names else platform.processor()


def provenance() -> dict[str, str]:
    """What every committed figure says of itself; on a CPU also how busy it is with other work."""
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": version("jax"),
    }
    if jax.default_backend() == "cpu":
        load = os.getloadavg()[0]
        return {**result, "cpu": f"{cpu_name()}, {os.cpu_count()} cores", "load": f"{load:.1f}"}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[0]
    return {**result, "gpu": jax.devices()[0].device_kind, "driver": driver}


def about(result: dict) -> str:
    """``provenance`` in a sentence."""
    if "cpu" in result:
        device = f"{result['cpu']} (load average {result['load']} when it began)"
    else:
        device = f"{result['gpu']}, driver {result['driver']}"
    return f"{device}, JAX {result['jax']}, {result['date']}."
