"""The process of one part: `python -m raytroupe.deploy.bench.gpu.part_process ORDER`, an `Order` as JSON."""

from __future__ import annotations

import importlib
import sys
import tempfile
import traceback
from pathlib import Path

import msgspec
import torch

from .part import DEVICE, Order, PartContext, Row, explain


def main() -> int:
    """Measure, writing every row as soon as it is there; the exit status."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with open(order.rows, "ab", buffering=0) as file, tempfile.TemporaryDirectory(prefix="troupe-gpu-") as folder:

        def report(row: Row) -> None:
            file.write(msgspec.json.encode(row) + b"\n")

        try:
            report(Row(what="device", key=DEVICE, text=device_name(device)))
            module, _, function = order.function.partition(":")
            measure = getattr(importlib.import_module(module), function)
            measure(PartContext(order, device, Path(folder), report))
        except Exception as error:
            traceback.print_exc()
            report(Row(what=order.part, error=explain(error)))
    return 0


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(main())
