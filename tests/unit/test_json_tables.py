"""One reader of JSON tables: what is no table is an error that its callers know, whatever is wrong with it."""

from __future__ import annotations

import pytest

from distill_core.files.json_tables import read_table


def test_a_table_is_read_with_and_without_a_byte_order_mark(tmp_path):
    for number, mark in enumerate((b"", b"\xef\xbb\xbf")):
        path = tmp_path / f"{number}.json"
        path.write_bytes(mark + '{"größe": 7, "empty": {}}'.encode())
        assert read_table(path) == {"größe": 7, "empty": {}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 2]", "it holds list, not a table"),
        (b"null", "it holds NoneType, not a table"),
        (b'{"a": 1', "line 1"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
    ],
)
def test_anything_else_is_one_kind_of_error(tmp_path, content, said):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_table(tmp_path / "config.json")
