"""Fixtures of the data tests."""

import os

import pytest
from tables import TABLE

from data.table import Table


@pytest.fixture
def table(tmp_path):
    """table(content, name="t.csv", keep_unseen=(), **options): a prepared Table of a file with this content."""

    def make(content, name="t.csv", keep_unseen=(), **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        dataset = Table(os.fspath(path), os.fspath(tmp_path / "cache"), **(TABLE | options))
        dataset.prepare(set(keep_unseen))
        return dataset

    return make
