"""Graceful stop: flag first, interrupt second, handlers restored."""

import os
import signal
import threading

import pytest

from rlalign.training.signals import GracefulStop

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", HANDLED, ids=lambda s: s.name)
def test_first_signal_only_raises_the_flag(number, capfd) -> None:
    with GracefulStop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert stop.reason == number.name
    assert f"{number.name}: finishing this step" in capfd.readouterr().err


def test_second_sigint_interrupts_at_once() -> None:
    with GracefulStop() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


def test_sigint_after_sigterm_interrupts_and_repeated_sigterm_does_not(capfd) -> None:
    with GracefulStop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("finishing this step") == 1


def test_handlers_come_back_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in HANDLED]

    def fail() -> None:
        with GracefulStop():
            assert [signal.getsignal(number) for number in HANDLED] != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    seen = []

    def work() -> None:
        with GracefulStop() as stop:
            seen.append((stop.requested, [signal.getsignal(number) for number in HANDLED]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_closed_terminal_does_not_break_the_handler(monkeypatch) -> None:
    def closed(descriptor: int, message: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    with GracefulStop() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
