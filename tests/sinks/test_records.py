"""Records refuse what no sink could write."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_interp.sinks import Picture, Table
from tests.helpers.stores import parse_markdown


def test_a_table_is_frozen_with_all_in_it() -> None:
    rows: list[list[Any]] = [["a", 1], ["b", None]]
    columns = ["name", "value"]
    table = Table("kind/what", columns, rows)
    rows[0][0] = "changed"
    columns.append("more")
    assert table.columns == ("name", "value")
    assert table.rows == (("a", 1), ("b", None))
    assert hash(table) == hash(Table("kind/what", ["name", "value"], [["a", 1], ["b", None]]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.rows = ()  # type: ignore[misc]
    assert dataclasses.replace(table, tag="other/what").rows == table.rows


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ((), [], "the names of one or more columns, got ()"),
        ("ab", [["a", "b"]], "the names of one or more columns, got 'ab'"),
        ((1, 2), [], r"the names of one or more columns, got (1, 2)"),
        (("a", "a"), [], r"columns of different names, got ('a', 'a')"),
        (("a", "b"), [(1, 2), (1,)], r"rows of 2 cells, got (1,) as 1"),
        (("a", "b"), ["xy"], "rows of 2 cells, got 'xy' as 0"),
        (("a",), [(torch.ones(()),)], "cells of str, int, float, bool or None, got Tensor in row 0"),
        (("a",), [(np.float32(1),)], "got float32 in row 0"),
        (("a",), [([],)], "got list in row 0"),
    ],
)
def test_a_table_refuses_what_is_none(columns: Any, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"Table 'kind/what' takes .*") as caught:
        Table("kind/what", columns, rows)
    assert message in str(caught.value)


def test_markdown_aligns_numbers_and_keeps_one_line_a_row() -> None:
    rows = [("a|b", 1 / 3, 10**9, True), ("two\nlines \\ <b> *", float("nan"), None, False)]
    table = Table("kind/what", ("name", "share", "count", "flag"), rows)
    assert table.to_markdown().splitlines() == [
        "| name | share | count | flag |",
        "| --- | ---: | ---: | --- |",
        r"| a\|b | 0.333333 | 1000000000 | True |",
        r"| two lines \\ &lt;b> \* | nan |  | False |",
    ]


@given(st.lists(st.tuples(st.text(), st.none() | st.booleans() | st.integers() | st.floats()), max_size=5))
def test_markdown_has_a_line_for_each_row_whatever_is_in_it(rows: list[tuple[Any, ...]]) -> None:
    lines = Table("kind/what", ("a", "b"), rows).to_markdown().split("\n")
    assert len(lines) == len(rows) + 2
    if not any("\\" in text for text, _ in rows):
        assert [len(line) for line in parse_markdown("\n".join(lines))] == [2] * (len(rows) + 1)


def test_a_table_may_have_no_row() -> None:
    assert Table("kind/what", ("a",), []).to_markdown() == "| a |\n| --- |"


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 4), (4, 4, 1), (3, 4, 4)])
def test_a_picture_refuses_what_cannot_be_encoded(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes a uint8 tensor \(H, W, 3\)"):
        Picture("cam/gradcam", torch.zeros(shape, dtype=torch.uint8))
