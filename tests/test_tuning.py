"""Looking up launch settings: which table and which entry serves a device and a shape."""

import json

import pytest
import torch

from pagetier.kernels import tuning

CPU = torch.device("cpu")


def table(*entries):
    return {"some": [tuning.Entry(when, use) for when, use in entries]}


@pytest.fixture(autouse=True)
def _no_cached_lookup():
    yield
    for function in (tuning._find, tuning.packaged, tuning._of_user):
        function.cache_clear()


def test_first_entry_that_matches_counts_and_ranges_hold_both_ends():
    entries = table(
        ({"kind": "a", "tokens": [2, 4]}, {"tile": 1}),
        ({"tokens": [1, 4]}, {"tile": 2}),
        ({}, {"tile": 3}),
    )
    with tuning.using(entries):
        found = {
            (kind, tokens): tuning.settings("some", CPU, kind=kind, tokens=tokens)["tile"]
            for kind in "ab"
            for tokens in (1, 2, 4, 5)
        }
    assert found == {
        ("a", 1): 2, ("a", 2): 1, ("a", 4): 1, ("a", 5): 3,
        ("b", 1): 2, ("b", 2): 2, ("b", 4): 2, ("b", 5): 3,
    }  # fmt: skip


def test_a_shape_without_settings_is_named():
    with pytest.raises(LookupError, match=r"settings of some for \{'tokens': 3\}"):
        tuning.settings("some", CPU, tokens=3)
    assert tuning.settings("some", CPU, {"tile": 1}, tokens=3) == {"tile": 1}


def test_settings_cannot_be_changed_by_those_who_get_them(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(tuning.dumps(table(({}, {"tile": 1}))))
    with tuning.using(tuning.load(path)), pytest.raises(TypeError):
        tuning.settings("some", CPU)["tile"] = 2


def test_the_closest_table_serves_a_device_and_the_users_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "families", lambda _: ("rtx_4090", "cc89", "default"))
    for name, tile in (("default", 1), ("cc89", 2), ("rtx_4090", 3), ("mine", 4)):
        (tmp_path / f"{name}.json").write_text(tuning.dumps(table(({}, {"tile": tile}))))
    assert tuning.settings("some", CPU) == {"tile": 3}
    (tmp_path / "rtx_4090.json").unlink()
    _forget()
    assert tuning.settings("some", CPU) == {"tile": 2}
    monkeypatch.setenv("PAGETIER_TUNED", str(tmp_path / "mine.json"))
    _forget()
    assert tuning.settings("some", CPU) == {"tile": 4}


def _forget():
    for function in (tuning._find, tuning.packaged, tuning._of_user):
        function.cache_clear()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"operations": {"a": [{"when": {}}]}}'])
def test_a_file_that_is_no_table_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json is no table of kernel settings"):
        tuning.load(path)


def test_a_written_table_reads_back_the_same(tmp_path):
    entries = table(({"tokens": [1, 4], "dtype": "bfloat16"}, {"tile": 1}), ({}, {"tile": 2}))
    path = tmp_path / "mine.json"
    path.write_text(tuning.dumps(entries, device="NVIDIA H200"))
    assert json.loads(path.read_text())["device"] == "NVIDIA H200"
    read = tuning.load(path)
    assert [(dict(e.when), dict(e.use)) for e in read["some"]] == [
        (e.when, e.use) for e in entries["some"]
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100_sxm4"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA GeForce RTX 3060 Ti", "rtx_3060_ti"),
    ],
)
def test_devices_are_named_by_their_chip(name, expected):
    assert tuning.slug(name) == expected


def test_every_packaged_table_can_be_read():
    for name in tuning.packaged_names():
        assert tuning.packaged(name)
