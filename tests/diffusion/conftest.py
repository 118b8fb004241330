"""Fixtures of the diffusion tests."""

import pytest

from rlalign.training import session


@pytest.fixture
def no_report(monkeypatch):
    """Drawing it takes longer than a small run."""
    monkeypatch.setattr(session, "write_report", lambda path: path)
