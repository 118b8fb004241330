"""Settings of torch that are the user's: nothing in the library turns on what would slow down every run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SWITCHES = ("set_detect_anomaly", "detect_anomaly")
"""Checks every gradient and keeps the traceback of every operation; for a session at the debugger."""


def switched_on(source: str) -> Iterator[str]:
    """Every mention of anomaly detection in code, under whatever name torch was imported; comments are none."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in SWITCHES:
                yield f"line {node.lineno}: {name}"
            case ast.ImportFrom(names=names):
                yield from (f"line {node.lineno}: {alias.name}" for alias in names if alias.name in SWITCHES)
            case ast.Constant(value=str(text)) if text in SWITCHES:  # getattr
                yield f"line {node.lineno}: {text}"


def test_no_module_turns_on_anomaly_detection():
    paths = sorted((ROOT / "rlalign").rglob("*.py"))
    assert paths
    found = [f"{path.relative_to(ROOT)} {line}" for path in paths for line in switched_on(path.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.autograd.set_detect_anomaly(True)", ["line 2: set_detect_anomaly"]),
        ("from torch import autograd\nwith autograd.detect_anomaly():\n    pass", ["line 2: detect_anomaly"]),
        ("from torch.autograd import set_detect_anomaly as on", ["line 1: set_detect_anomaly"]),
        ("getattr(autograd, 'set_detect_anomaly')(True)", ["line 1: set_detect_anomaly"]),
        ("# torch.autograd.set_detect_anomaly(True)\nimport torch", []),
    ],
)
def test_a_violation_is_found_wherever_it_hides(source, expected):
    assert list(switched_on(source)) == expected
