"""Covers: windows and weights of the reference schedule, decode chunks, tiles and their blend."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from vsuav.tiling import (
    BLOCK,
    CHUNK,
    STRIDE,
    WINDOW,
    Chunk,
    axis_tiles,
    blend_weights,
    block_of,
    chunk_of,
    merge,
    tiles,
    windows_of,
)


def reference_visits(length: int) -> list[tuple[int, int]]:
    """The windows of a clip in the reference's loop, a repeated last one included."""
    if length <= 8:
        return [(0, length)]
    return [(s, s + 8) if s + 8 <= length else (length - 8, length) for s in range(0, length, 6)]


def reference_weights(length: int) -> list[dict[tuple[int, int], float]]:
    """How much of each window every frame gets in the reference's sequential merge."""
    weights: list[dict] = [{} for _ in range(length)]
    for span in reference_visits(length):
        for n in range(*span):
            if weights[n]:
                weights[n] = {key: weight / 2 for key, weight in weights[n].items()}
                weights[n][span] = weights[n].get(span, 0) + 0.5
            else:
                weights[n] = {span: 1.0}
    return weights


def weights_of(frame: int, start: int, stop: int) -> dict[tuple[int, int], float]:
    """The weights with which `merge` mixes the windows of a frame."""
    spans = windows_of(frame, start, stop)
    names = sorted(set(spans))
    mixed = merge([torch.eye(len(names))[names.index(span)] for span in spans])
    return dict(zip(names, mixed.tolist(), strict=True))


@pytest.mark.parametrize("length", range(1, 60))
def test_a_clip_of_one_shot_has_the_references_windows_and_weights(length):
    assert [weights_of(n, 0, length) for n in range(length)] == reference_weights(length)


def test_the_examples_of_the_algorithm_page():
    visited = {
        9: [(0, 8), (1, 9)], 12: [(0, 8), (4, 12)], 13: [(0, 8), (5, 13), (5, 13)], 14: [(0, 8), (6, 14), (6, 14)],
        15: [(0, 8), (6, 14), (7, 15)], 16: [(0, 8), (6, 14), (8, 16)],
        20: [(0, 8), (6, 14), (12, 20), (12, 20)],
    }  # fmt: skip
    for length, expected in visited.items():
        seen = [span for n in range(length) for span in windows_of(n, 0, length)]
        assert set(seen) == set(expected)
        assert windows_of(length - 1, 0, length) == [span for span in expected if span[1] == length]


SHOT = st.tuples(st.integers(0, 40), st.integers(1, 60)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(SHOT, st.data())
def test_windows_of_any_shot(shot, data):
    start, stop = shot
    frame = data.draw(st.integers(start, stop - 1))
    spans = windows_of(frame, start, stop)
    assert spans == sorted(spans)
    for first, last in spans:
        assert start <= first <= frame < last <= stop
        assert last - first == min(WINDOW, stop - start)
        assert first % STRIDE == 0 or first in (start, stop - WINDOW)
    grid = [min(max(STRIDE * i, start), max(start, stop - WINDOW)) for i in range(start // STRIDE, (stop - 1) // 6 + 1)]
    expected = [(a, min(a + WINDOW, stop)) for a in grid if a <= frame < a + WINDOW]
    assert spans == expected if stop - start > WINDOW else set(spans) == {(start, stop)}


@given(SHOT, st.data())
def test_a_window_is_the_same_for_all_its_frames(shot, data):
    frame = data.draw(st.integers(shot[0], shot[1] - 1))
    for span in windows_of(frame, *shot):
        assert all(span in windows_of(n, *shot) for n in range(*span))


@given(SHOT, st.integers(0, 30), st.integers(0, 30), st.data())
def test_the_ends_of_a_shot_do_not_matter_from_afar(shot, before, after, data):
    start, stop = shot
    frame = data.draw(st.integers(start, stop - 1))
    far = (start - before if frame - start > WINDOW else start, stop + after if stop - frame > WINDOW else stop)
    assert windows_of(frame, *far) == windows_of(frame, start, stop)


@given(SHOT)
def test_a_shot_needs_at_most_two_windows_more_than_the_reference(shot):
    spans = {span for n in range(*shot) for span in windows_of(n, *shot)}
    assert len(spans) <= len(reference_visits(shot[1] - shot[0])) + 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_merge_halves_what_was_there(count):
    values = torch.randn(count, 3, 4)
    expected = values[0]
    for value in values[1:]:
        expected = (expected + value) / 2
    torch.testing.assert_close(merge(list(values)), expected)


@given(SHOT)
def test_chunks_cover_a_shot_once_and_never_leave_it(shot):
    start, stop = shot
    kept = []
    for n in range(start, stop):
        chunk = chunk_of(n, start, stop)
        assert start <= chunk.start <= n < chunk.keep <= chunk.stop <= stop
        assert chunk.stop - chunk.start <= CHUNK
        assert chunk.keep == min(stop, (n // CHUNK + 1) * CHUNK)
        assert chunk.stop - chunk.start == min(CHUNK, stop - chunk.start)
        if not kept or kept[-1] != chunk:
            kept.append(chunk)
    assert [n for chunk in kept for n in range(chunk.start, chunk.keep)] == list(range(start, stop))


def test_the_chunks_of_a_clip_of_one_shot_are_the_references():
    assert [chunk_of(n, 0, 8) for n in (0, 3, 7)] == [Chunk(0, 3, 3), Chunk(3, 6, 6), Chunk(6, 8, 8)]
    assert chunk_of(5, 5, 20) == Chunk(5, 8, 6)


@given(st.integers(0, 1000))
def test_blocks_are_whole_chunks(frame):
    assert block_of(frame) == frame // BLOCK
    assert BLOCK % CHUNK == 0


@given(st.integers(1, 300), st.integers(0, 120), st.integers(0, 50))
def test_tiles_cover_an_axis(length, size, overlap):
    if size and size <= 2 * overlap:
        return
    spans = axis_tiles(length, size, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert len({stop - start for start, stop in spans}) == 1
    for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
        assert start <= stop - overlap
    if size:
        assert spans[0][1] <= size
        assert len(spans) == 1 or len(spans) - 1 < length / (size - overlap)


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([0, 32, 40]), st.sampled_from([0, 32, 50]),
       st.sampled_from([0, 4, 15]))  # fmt: skip
def test_blend_weights_sum_to_one(height, width, across, down, overlap):
    cover = tiles(height, width, (across, down), overlap)
    total = torch.zeros(height, width)
    for tile, weight in zip(cover, blend_weights(cover, height, width), strict=True):
        assert (weight > 0).all()
        total[tile.crop] += weight
    torch.testing.assert_close(total, torch.ones(height, width))


def test_blending_has_no_seam():
    """A slope that every tile sees with another offset comes out with steps far below the offset."""
    cover = tiles(40, 100, (40, 0), 10)
    picture = torch.zeros(40, 100)
    for i, (tile, weight) in enumerate(zip(cover, blend_weights(cover, 40, 100), strict=True)):
        picture[tile.crop] += weight * i
    assert len(cover) == 3
    assert picture.diff(dim=1).abs().max() < 0.2
    assert picture.diff(dim=0).abs().max() < 1e-6


def test_whole_frames_are_one_tile():
    assert [(t.top, t.bottom, t.left, t.right) for t in tiles(30, 50, (0, 0), 16)] == [(0, 30, 0, 50)]
