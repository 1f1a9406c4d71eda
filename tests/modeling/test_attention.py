"""The masks against pictures drawn by hand."""

from __future__ import annotations

import torch
from masks import two_stream_mask

from dllm_convert.diffusion.attention import causal_mask, document_mask
from dllm_convert.modeling.published.masks import block_causal_mask


def picture(mask: torch.Tensor, row: int = 0) -> list[str]:
    """Draw a boolean mask, one string per query."""
    return ["".join("#" if seen else "." for seen in line) for line in mask[row, 0].tolist()]


def test_block_causal_counts_blocks_from_position_zero() -> None:
    mask = block_causal_mask(torch.arange(7)[None], torch.ones(1, 7, dtype=torch.bool), 3, 7)
    assert picture(mask) == [
        "###....",
        "###....",
        "###....",
        "######.",
        "######.",
        "######.",
        "#######",
    ]


def test_left_padding_moves_no_block_boundary() -> None:
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]])
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).bool()
    assert picture(block_causal_mask(positions, valid, 2, 7)) == [
        "#.##...",
        ".###...",
        "..##...",
        "..##...",
        "..####.",
        "..####.",
        "..#####",
    ]


def test_a_cached_query_is_the_last_key() -> None:
    mask = block_causal_mask(torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), 2, 2)
    assert picture(mask) == ["######", "######"]


def test_documents_never_see_each_other_or_padding() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, -1]])
    assert picture(document_mask(segments)) == [
        "##....",
        "##....",
        "..###.",
        "..###.",
        "..###.",
        ".....#",
    ]
    assert picture(causal_mask(segments)) == [
        "#.....",
        "##....",
        "..#...",
        "..##..",
        "..###.",
        ".....#",
    ]


def test_two_streams_a_noisy_block_never_sees_its_clean_self() -> None:
    blocks = torch.tensor([[0, 0, 1, 1, 2]])
    segments = torch.zeros(1, 5, dtype=torch.long)
    assert picture(two_stream_mask(blocks, segments)) == [
        "##........",
        "##........",
        "..##.##...",
        "..##.##...",
        "....#####.",
        ".....##...",
        ".....##...",
        ".....####.",
        ".....####.",
        ".....#####",
    ]


def test_two_streams_stay_inside_their_document() -> None:
    blocks = torch.tensor([[0, 1, 2, 3]])
    segments = torch.tensor([[0, 0, 1, -1]])
    assert picture(two_stream_mask(blocks, segments)) == [
        "#.......",
        ".#..#...",
        "..#.....",
        "...#....",
        "....#...",
        "....##..",
        "......#.",
        ".......#",
    ]
