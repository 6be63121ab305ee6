"""What a user sees is as in interface.json: names, signatures, keys, shapes, dtypes, optim_args, kinds of warnings."""

from __future__ import annotations

import json

import pytest

import frozen_interface
import frozen_runs as runs


RECORD = json.loads((runs.FOLDER / "interface.json").read_text())
ENTRIES = [(section, entry) for section, entries in RECORD.items() for entry in entries]


@pytest.fixture(scope="module")
def interface(tmp_path_factory):
    return frozen_interface.measure(tmp_path_factory.mktemp("interface"))


def test_nothing_is_new(interface):
    assert [(section, entry) for section, entries in interface.items() for entry in entries] == ENTRIES


@pytest.mark.parametrize(("section", "entry"), ENTRIES, ids=[f"{section}-{entry}" for section, entry in ENTRIES])
def test_is_as_it_was(section, entry, interface):
    assert interface[section][entry] == RECORD[section][entry]
