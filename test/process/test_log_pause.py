"""What a flood brings about is told once per second, with how much of it was not."""

from __future__ import annotations

from Zorp.process.log_pause import LogPause


def test_one_line_per_second_says_what_the_others_were():
    now_s = [100.0]
    pause = LogPause(lambda: now_s[0])
    assert [pause.due() for _ in range(4)] == [0, None, None, None]
    now_s[0] += 0.9
    assert pause.due() is None
    now_s[0] += 0.2
    assert pause.due() == 4
    assert pause.due() is None
    # what is silent for long begins anew
    now_s[0] += 60
    assert pause.due() == 1
    now_s[0] += 60
    assert pause.due() == 0
