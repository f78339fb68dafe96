from unittest.mock import patch

from fedsim.engine.clock import Clock


def test_laps_of_a_part_add_up():
    with patch("time.perf_counter", side_effect=[10.0, 11.0, 13.0, 13.5, 20.0, 20.25]):
        clock = Clock()
        clock.lap("train")
        clock.lap("gather")
        clock.lap("train")
        assert clock.seconds == {"train": 1.5, "gather": 2.0}
        clock.restart()
        clock.lap("train")
        assert clock.seconds == {"train": 0.25}
