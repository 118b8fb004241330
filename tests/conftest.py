"""Every test is offline, seeded and single-threaded: set up here, before any framework is imported."""

import os
import random
import socket
import sys
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.")


class NetworkRefused(OSError):
    """A test tried to leave the machine."""


def refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: let Unix and loopback sockets pass, refuse every other connection and name look-up."""
    match event:
        case "socket.connect" | "socket.sendto" | "socket.sendmsg" if args[0].family != socket.AF_UNIX:
            host = args[1][0] if args[1] else "localhost"
        case "socket.getaddrinfo" | "socket.gethostbyname":
            host = args[0]
        case _:
            return
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    if not name.startswith(LOOPBACK) and name != socket.gethostname():
        raise NetworkRefused(f"tests run offline, but something asked for {name!r} ({event})")


sys.addaudithook(refuse_network)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the libraries under test draw from the global generator
    torch.manual_seed(0)
