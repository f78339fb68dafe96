"""Signals that arrive while nothing may be interrupted, or where Python drops them."""

import signal
import threading

import pytest

from fedsim.interrupts import Terminated, held_interrupts, noted_interrupts

RAISED = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: Terminated,
}


@pytest.fixture(autouse=True)
def handlers():
    """Whatever happens, the handlers are those of before."""
    before = [signal.getsignal(number) for number in RAISED]
    yield
    assert [signal.getsignal(number) for number in RAISED] == before


@pytest.mark.parametrize("number", RAISED)
def test_an_interrupt_waits_for_the_end_of_the_block(number):
    done = []
    with pytest.raises(KeyboardInterrupt) as caught, held_interrupts():  # noqa: PT012
        signal.raise_signal(number)
        done.append("all")
    assert done == ["all"]
    assert caught.type is RAISED[number]


def test_a_second_one_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), held_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append("some")
        signal.raise_signal(signal.SIGINT)
        done.append("all")
    assert done == ["some"]


def test_an_error_in_the_block_does_not_take_the_interrupt_along():
    with pytest.raises(KeyboardInterrupt) as caught, held_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)


def test_without_an_interrupt_nothing_happens():
    with held_interrupts(), noted_interrupts() as noted:
        pass
    noted.raise_again()


@pytest.mark.parametrize("number", RAISED)
def test_an_interrupt_is_noted_and_raised(number):
    with noted_interrupts() as noted:
        for interrupt in (lambda: signal.raise_signal(number), noted.raise_again):
            with pytest.raises(KeyboardInterrupt) as caught:
                interrupt()
            assert caught.type is RAISED[number]
        # As when Ray starts in a run.
        with pytest.raises(KeyboardInterrupt), held_interrupts():
            signal.raise_signal(number)


def test_what_a_program_does_about_sigterm_itself_stays():
    found = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    try:
        with noted_interrupts() as noted, held_interrupts():
            signal.raise_signal(signal.SIGTERM)
        assert (found, noted.number) == ([signal.SIGTERM], None)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_get_no_signals():
    def work():
        with noted_interrupts(), held_interrupts():
            done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
