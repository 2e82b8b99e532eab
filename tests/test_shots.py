"""Shots: properties from either side, the detector, prompts, the forced grid, and how far evidence reaches."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vsuav.shots import FAR, FLASH, FORCED, REACH, Record, Records, Shots


def shots(records: list[Record], **options) -> Shots:
    return Shots(len(records), records.__getitem__, **options)


def cuts(made: Shots) -> list[int]:
    return [n for n in range(1, made.frames) if made.cut(n)]


def quiet(length: int, **differences: float) -> list[Record]:
    """Records with the differences given as ``n5=0.3``."""
    return [Record(differences.get(f"n{n}", 0.01)) for n in range(length)]


def test_the_ends_of_the_clip_are_cuts():
    made = shots(quiet(15))
    assert made.cut(0)
    assert made.cut(15)
    assert cuts(made) == []
    assert made.shot(7) == (0, 15)


def test_a_large_difference_is_a_cut():
    assert cuts(shots(quiet(40, n10=0.3, n30=0.11))) == [10, 30]
    assert cuts(shots(quiet(40, n10=0.3, n30=0.11), threshold=0.2)) == [10]
    assert cuts(shots(quiet(40, n10=0.3), detect=False)) == []


def test_a_flash_is_one_cut_at_most():
    assert cuts(shots(quiet(40, n10=0.4, n11=0.39))) == [10]
    assert cuts(shots(quiet(40, n10=0.39, n13=0.4))) == [13]


def test_equal_differences_are_one_cut():
    assert cuts(shots(quiet(40, n10=0.4, n11=0.4, n12=0.4))) == [10]


def test_cuts_more_than_a_flash_apart_are_both_cuts():
    assert cuts(shots(quiet(40, **{"n10": 0.3, f"n{10 + FLASH + 1}": 0.4}))) == [10, 15]


@pytest.mark.parametrize("side", ["before", "after"])
def test_properties_of_either_side_cut(side):
    records = quiet(20)
    if side == "before":
        records[8] = Record(0.0, cut_before=True)
    else:
        records[7] = Record(0.0, cut_after=True)
    assert cuts(shots(records)) == [8]


def test_properties_win_over_the_detector():
    records = quiet(20, n8=0.5)
    records[8] = replace(records[8], cut_before=False)
    assert cuts(shots(records)) == []
    records[7] = replace(records[7], cut_after=True)
    assert cuts(shots(records)) == [8]


def test_a_change_of_prompt_is_a_cut_even_without_detection():
    records = quiet(20)
    for n in range(5, 9):
        records[n] = Record(prompt="rain")
    made = shots(records, detect=False, prompt_at=lambda n: "sun" if n < 12 else "snow")
    assert cuts(made) == [5, 9, 12]
    assert [made.prompt(n) for n in (4, 5, 8, 9, 12)] == ["sun", "rain", "rain", "sun", "snow"]


def test_the_same_prompt_said_twice_is_no_cut():
    records = quiet(20)
    records[8] = Record(prompt="sun")
    assert cuts(shots(records, prompt_at=lambda n: "sun")) == []


def test_max_shot_cuts_on_the_grid_and_spares_real_cuts():
    # the end of the clip is a real one too
    assert cuts(shots(quiet(100), max_shot=24)) == [24, 48, 72]
    for real, expected in ((48 - FORCED, False), (48 - FORCED - 1, True), (48 + FORCED, False), (48 + 13, True)):
        made = shots(quiet(200, **{f"n{real}": 0.5}), max_shot=24)
        assert made.cut(48) == expected
    assert cuts(shots(quiet(30), max_shot=24)) == []



def test_far_ends_are_given_as_far():
    made = shots(quiet(200, n100=0.5))
    assert made.shot(100 - FAR) == (100 - 2 * FAR, 100)
    assert made.shot(99) == (99 - FAR, 100)
    assert made.shot(100 + FAR)[0] == 100
    assert made.shot(101 + FAR)[0] == 101


def test_clamp_stays_in_the_shot():
    made = shots(quiet(200, n100=0.5))
    assert made.clamp(95, 120) == 99
    assert made.clamp(95, 97) == 97
    assert made.clamp(110, 90) == 100
    assert made.clamp(110, 105) == 105
    assert made.clamp(110, 110) == 110
    assert made.clamp(5, -3) == 0
    assert made.clamp(195, 300) == 199


RECORD = st.builds(
    Record,
    difference=st.sampled_from([0.0, 0.05, 0.2, 0.3]),
    cut_before=st.sampled_from([None, None, None, True, False]),
    cut_after=st.sampled_from([None, None, None, True, False]),
    prompt=st.sampled_from([None, None, None, None, "rain"]),
)


@given(st.lists(RECORD, min_size=1, max_size=120), st.sampled_from([None, 24]), st.data())
def test_evidence_beyond_the_reach_changes_nothing(records, max_shot, data):
    """Everything farther away than the stated reach is replaced; the shot of the frame stays."""
    frame = data.draw(st.integers(0, len(records) - 1))
    reach = REACH + (FORCED if max_shot else 0)
    other = Record(0.9, True, True, "snow")
    changed = [record if abs(n - frame) <= reach else other for n, record in enumerate(records)]
    assert shots(records, max_shot=max_shot).shot(frame) == shots(changed, max_shot=max_shot).shot(frame)


@given(st.lists(RECORD, min_size=1, max_size=150), st.sampled_from([None, 24]), st.data())
def test_nothing_beyond_the_reach_is_asked_for(records, max_shot, data):
    frame = data.draw(st.integers(0, len(records) - 1))
    asked = set()

    def record(n):
        asked.add(n)
        return records[n]

    Shots(len(records), record, max_shot=max_shot).shot(frame)
    reach = REACH + (FORCED if max_shot else 0)
    assert all(abs(n - frame) <= reach for n in asked)


@given(st.lists(RECORD, min_size=1, max_size=100), st.sampled_from([None, 24]))
def test_shots_part_the_clip_at_the_cuts(records, max_shot):
    made = shots(records, max_shot=max_shot)
    ends = [0, *cuts(made), len(records)]
    for a, b in zip(ends, ends[1:], strict=False):
        for n in range(a, b):
            assert made.shot(n) == (max(a, n - FAR), min(b, n + FAR))


def test_records_are_taken_all_or_none_and_the_oldest_go():
    records = Records(limit=4)
    for n in range(4):
        records.put(n, Record(n / 10))
    assert records.missing(range(2, 6)) == [4, 5]
    assert records.take(range(2, 6)) is None
    assert records.take(range(0, 2)) == {0: Record(0.0), 1: Record(0.1)}
    records.put(4, Record())
    assert records.missing(range(5)) == [2]
