"""What a worker does in the tests, in the place of measurements; imported by its process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from bench.matrix import Job
from bench.session import Broken
from bench.worker import Message


def serve(job: Job, device: torch.device, send: Callable[[Message], None]) -> None:
    """Providers do what their names say."""
    for name in job.providers:
        send(("provider", name))
        if name == "dies":
            print("Segmentation fault of the test", flush=True)
            os._exit(7)
        if name == "hangs":
            time.sleep(60.0)
        if name == "raises":
            raise ValueError("of the test")
        reason = "an illegal memory access" if name == "breaks" else None
        status = "failed" if name == "breaks" else "ok"
        row = {"provider": name, "status": status, "reason": reason, "seconds": [1.0]}
        send(("row", row))
        if name == "breaks":
            raise Broken("the context is lost")
