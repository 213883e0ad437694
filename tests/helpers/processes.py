"""Programs in processes with several virtual devices, and the memory of this process."""

import os
import subprocess
import sys
from pathlib import Path


def cpu_environment(devices: int | None = None) -> dict[str, str]:
    """Returns the environment of a process on the CPU, with so many virtual devices."""
    count = {} if devices is None else {"JAX_NUM_CPU_DEVICES": str(devices)}
    return os.environ | {"JAX_PLATFORMS": "cpu"} | count


def run_program(code: str, devices: int) -> None:
    """Runs a Python program on so many virtual devices; its failure is an error here."""
    subprocess.run([sys.executable, "-c", code], check=True, env=cpu_environment(devices))


def process_memory(field: str) -> int:
    """Returns the bytes that this process holds now ("VmRSS") or held at most ("VmHWM"), on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
