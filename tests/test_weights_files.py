"""Files that are not what they should be: compared with their records, read within limits, and named when refused."""

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hub_stand_in
from hf_lopt import LearnedOptimizer, rules, weights
from hf_lopt.weights import loading, reading


FORMATS = Path(__file__).parent / "golden" / "formats"
VELO_S = FORMATS / "velo_s.theta.state"
FOLDERS = [("velo", "theta_state"), ("celo2", "safetensors"), ("velo", "published"), ("celo2", "published")]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    hub_stand_in.isolate(monkeypatch, tmp_path / "hub")


def load(rule, spec):
    return weights.load(rule, spec, rules.get(rule).shapes)


def flip_a_bit(file, position=-3):
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


@pytest.fixture
def saved(tmp_path, request):
    """(rule, folder with saved weights)"""
    rule, form = request.param
    weights.save(load(rule, "bundled"), tmp_path / "saved", format=form, rule=rule)
    return rule, tmp_path / "saved"


def weight_files(folder):
    return sorted(file for file in folder.rglob("*") if file.suffix in (".state", ".safetensors"))


# --- records


@pytest.mark.parametrize("saved", FOLDERS, indirect=True, ids=map("-".join, FOLDERS))
def test_a_flipped_bit_beside_its_record_is_refused(saved):
    rule, folder = saved
    record = json.loads((folder / "hf_lopt.json").read_text())
    for file in weight_files(folder):
        content = file.read_bytes()
        for position in (len(content) - 100, len(content) // 2, 20):
            flip_a_bit(file, position)
            with pytest.raises(ValueError) as error:
                load(rule, folder)
            wanted = record["files"][file.relative_to(folder).as_posix()]
            for part in (str(file), wanted, str(folder / "hf_lopt.json"), "delete hf_lopt.json"):
                assert part in str(error.value)
            file.write_bytes(content)
    load(rule, folder)


@pytest.mark.parametrize("saved", FOLDERS, indirect=True, ids=map("-".join, FOLDERS))
def test_a_record_of_the_content_alone_is_compared(saved):
    rule, folder = saved
    record = json.loads((folder / "hf_lopt.json").read_text())
    del record["files"]
    (folder / "hf_lopt.json").write_text(json.dumps(record))
    found = load(rule, folder)
    assert found.sha256 == record["sha256"]
    file = weight_files(folder)[0]
    content = file.read_bytes()
    flip_a_bit(file)
    with pytest.raises(ValueError, match=f"sha256 of the content is .*, but .* records {record['sha256']}"):
        load(rule, folder)
    file.write_bytes(content)
    (folder / "hf_lopt.json").write_text(json.dumps(record | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match=found.sha256):
        load(rule, folder)
    (folder / "hf_lopt.json").unlink()
    assert load(rule, folder).sha256 == found.sha256


def test_offsets_in_the_record_are_compared(tmp_path):
    with pytest.warns(UserWarning, match="no room"):
        weights.save(load("small_fc_lopt", FORMATS / "small_fc_lopt.theta.state"), tmp_path, format="published")
    record = json.loads((tmp_path / "hf_lopt.json").read_text())
    record["settings"]["momentum_decays"][0] += 0.25
    (tmp_path / "hf_lopt.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="sha256 of the content"):
        load("small_fc_lopt", tmp_path)


def test_another_bank_scale_is_no_damage(tmp_path):
    theta = weights.load("velo", VELO_S, bank_scale=1.0)
    weights.save(theta, tmp_path, format="published", rule="velo", settings={"bank_scale": 3.0})
    for bank_scale in (1.0, 3.0, 100.0):
        weights.load("velo", tmp_path, bank_scale=bank_scale)
    file = tmp_path / "mlp" / "model.safetensors"
    flip_a_bit(file)
    with pytest.raises(ValueError, match="sha256 of the file"):
        weights.load("velo", tmp_path, bank_scale=3.0)


def test_a_record_of_another_file_is_not_this_ones(tmp_path):
    weights.save(load("celo2", "bundled"), tmp_path, rule="celo2")
    shutil.copy(FORMATS / "celo2.theta.state", tmp_path / "mine.state")
    assert load("celo2", tmp_path / "mine.state").sha256 != load("celo2", tmp_path).sha256


def test_the_record_of_meta_training_is_compared(tmp_path):
    weights.save(load("celo2", "bundled"), tmp_path, rule="celo2")
    (tmp_path / "hf_lopt.json").rename(tmp_path / "meta_training.json")
    record = json.loads((tmp_path / "meta_training.json").read_text())
    record.pop("files")
    (tmp_path / "meta_training.json").write_text(json.dumps(record))
    load("celo2", tmp_path)
    flip_a_bit(tmp_path / "theta.state")
    with pytest.raises(ValueError, match=r"meta_training\.json records"):
        load("celo2", tmp_path)


def test_embedded_weights_are_compared(tmp_path, monkeypatch):
    shutil.copytree(weights.EMBEDDED, tmp_path / "embedded")
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path / "embedded")
    flip_a_bit(tmp_path / "embedded" / "velo.safetensors")
    for spec in ("bundled", "auto"):
        with pytest.raises(ValueError, match=r"velo\.safetensors.*sha256.*velo\.json records") as error:
            load("velo", spec)
        assert "install hf_lopt again" in str(error.value)
    (tmp_path / "embedded" / "velo.json").write_text("{")
    with pytest.raises(ValueError, match=r"velo\.json"):
        load("velo", "bundled")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "1", '"x"', '{"sha256": NaN}', '{"sha256": 1}', '{"sha256": []}', '{"files": []}'),
        *('{"files": {"theta.state": 1}}', '{"files": {"theta.state": {}}}', '{"sha256": "a", "sha256": "a"}'),
        *("[" * 100_000, '{"a":' * 100_000, '{"a": 1' + "0" * 10_000 + "}", " " * (2 << 20)),
    ],
    ids=lambda text: text[:20],
)
def test_an_odd_record_is_named(tmp_path, text):
    shutil.copy(VELO_S, tmp_path / "theta.state")
    (tmp_path / "hf_lopt.json").write_text(text)
    with pytest.raises(ValueError, match=r"hf_lopt\.json"):
        load("velo", tmp_path)


@pytest.mark.parametrize("settings", ['"x"', "[]", '{"momentum_decays": 1}', '{"momentum_decays": [[1]]}'])
def test_odd_settings_in_a_record_are_named(tmp_path, settings):
    shutil.copytree(FORMATS / "small_fc_mlp", tmp_path / "out")
    (tmp_path / "out" / "hf_lopt.json").write_text(f'{{"settings": {settings}}}')
    with pytest.raises(ValueError, match=r"hf_lopt\.json"):
        load("small_fc_lopt", tmp_path / "out")


# --- the cache of the hub


def in_cache(change):
    """The file of velo in the cache as the library has it, a link to a blob, changed; and the blob."""
    hub_stand_in.put_in_cache("amoudgl/velo-4000", "theta.state", VELO_S)
    (file,) = Path(hub_stand_in.constants.HF_HUB_CACHE).rglob("theta.state")
    blobs = file.parents[2] / "blobs"
    blobs.mkdir()
    blob = blobs / "0ca3b1cc0ef23e8b90dd9e9ba8d7c9e1c7fa5dcd"
    file.rename(blob)
    file.symlink_to(blob)
    change(file, blob)
    return file, blob


def replace_by_folder(file, blob):
    blob.unlink()
    blob.mkdir()


UNREADABLE = {
    "truncated": lambda file, blob: blob.write_bytes(blob.read_bytes()[:1000]),
    "blob is a folder": replace_by_folder,
    "broken link": lambda file, blob: blob.unlink(),
    "digest": lambda file, blob: (
        blob.rename(blob.with_name("0" * 64)),
        file.unlink(),
        file.symlink_to(blob.with_name("0" * 64)),
    ),
    "record": lambda file, blob: file.with_name("hf_lopt.json").write_text('{"sha256": "0"}'),
    "odd record": lambda file, blob: file.with_name("hf_lopt.json").write_text("[" * 100_000),
    "record is a folder": lambda file, blob: file.with_name("hf_lopt.json").mkdir(),
    "revision is not text": lambda file, blob: (file.parents[2] / "refs" / "main").write_bytes(b"\xff"),
    "revision is a folder": lambda file, blob: (
        (file.parents[2] / "refs" / "main").unlink(),
        (file.parents[2] / "refs" / "main").mkdir(),
    ),
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_auto_falls_back_on_any_unreadable_cache(damage):
    in_cache(UNREADABLE[damage])
    with pytest.warns(UserWarning, match="Those were not used because") as caught:
        assert load("velo", "auto").origin == "bundled"
    assert len(caught) == 1
    with pytest.raises(ValueError, match="published"):
        load("velo", "published")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [found.source for found in weights.find("velo")] == ["bundled:velo"]


@pytest.mark.parametrize("damage", ["truncated", "digest", "record"])
def test_published_names_the_file_and_that_deleting_it_helps(damage):
    file, _ = in_cache(UNREADABLE[damage])
    for spec in ("published", "amoudgl/velo-4000"):
        with pytest.raises(ValueError) as error:
            load("velo", spec)
        assert str(file) in str(error.value)
        assert f"Delete {os.path.realpath(file)}" in str(error.value)


def test_a_cached_file_of_another_user(monkeypatch):
    file, _ = in_cache(lambda file, blob: None)
    real = os.open

    def refuse(path, *args, **kwargs):
        if Path(path) == file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert load("velo", "auto").origin == "bundled"
    with pytest.raises(ValueError, match="Permission denied") as error:
        load("velo", "published")
    assert str(file) in str(error.value) and "Delete" in str(error.value)


# --- what is no file


def test_what_stands_in_place_of_a_file(tmp_path):
    (tmp_path / "a" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "theta.state").symlink_to(tmp_path / "nowhere")
    shutil.copy(FORMATS / "celo2_mlp" / "model.safetensors", tmp_path / "b")
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / "theta.state")
    for spec in ("a", "a/model.safetensors", "b", "b/theta.state", "c", "c/theta.state"):
        with pytest.raises((ValueError, OSError)) as error:
            load("celo2", str(tmp_path / spec))
        assert str(tmp_path / spec) in str(error.value)


@pytest.mark.parametrize("spec", ["~nosuchuser/x", "~nosuchuser", "a\0b", "/dev/zero", "/dev/null"])
def test_paths_that_lead_nowhere(spec):
    with pytest.raises(ValueError, match="no such file"):
        load("velo", spec)
    with pytest.raises(ValueError, match="nosuchuser"):
        weights.save(load("velo", "bundled"), "~nosuchuser/x", rule="velo")


def test_one_file_for_both_halves():
    with pytest.raises(ValueError, match="twice"):
        load("velo", (FORMATS / "velo_s_rnn", FORMATS / "velo_s_rnn"))


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    shutil.copy(VELO_S, tmp_path / "theta.state")
    real, seen = os.fstat, []

    def grow(descriptor):
        found = real(descriptor)
        seen.append(found)
        with open(tmp_path / "theta.state", "ab") as file:
            file.write(b"\0")
        return found

    monkeypatch.setattr(reading.os, "fstat", grow)
    with pytest.raises(ValueError, match=r"theta\.state: it changed while it was read"):
        load("velo", tmp_path)


@pytest.mark.parametrize("name", ["theta.state", "model.safetensors"])
def test_a_file_larger_than_any_of_the_rule(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(400 << 20)  # nothing on the disk
    with pytest.raises(ValueError, match=rf"{name}: 419430400 bytes, but .* at most"):
        load("velo", tmp_path)


def test_the_limit_of_size_leaves_room_for_every_set():
    for rule in rules.names():
        largest = loading.largest_file(rules.get(rule).shapes)
        assert 30 << 20 < largest < 400 << 20


# --- safetensors


def safetensors(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), span=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


SPAN = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"a/b": entry()}, bytes(8)),
        safetensors({"a/b": entry()}, b""),
        safetensors({"a/b": entry(), "a/c": entry()}, bytes(4)),  # overlap
        safetensors({"a/b": entry(shape=(2,), span=(0, 8)), "a/c": entry(span=(4, 8))}, bytes(8)),
        safetensors({"a/b": entry(), "a/c": entry(span=(8, 12))}, bytes(12)),  # a gap
        safetensors(b'{"a/b":' + SPAN + b',"a/b":' + SPAN + b"}", bytes(4)),  # one name for two
        *(safetensors({"a/b": entry(dtype)}, bytes(4)) for dtype in ("I32", "U32", "C64", "BOOL", "F8_E5M2", "X", 1)),
        safetensors({"a/b": entry(dtype="F64")}, bytes(4)),
        safetensors({"a/b": entry(shape=(1 << 62, 1 << 62))}, bytes(4)),
        safetensors({"a/b": entry(shape=(1 << 63, 0), span=(0, 0))}),
        safetensors({"a/b": entry(shape=(0, 1 << 40, 1 << 40), span=(0, 0))}),
        safetensors({"a/b": entry(shape=(-1,))}, bytes(4)),
        safetensors({"a/b": entry(shape=(True,))}, bytes(4)),
        safetensors({"a/b": entry(shape=(1,) * 100)}, bytes(4)),
        safetensors({"a/b": entry(span=(4, 0))}, bytes(4)),
        safetensors({"a/b": [1]}),
        safetensors({"a/b": {}}),
        safetensors({"a/b": entry(), "__metadata__": {"a": 1}}, bytes(4)),
        safetensors({"__metadata__": [], "a/b": entry()}, bytes(4)),
        safetensors({f"a/{k}": entry(shape=(0,), span=(0, 0)) for k in range(10_000)}),
        *(safetensors(text) for text in (b"", b"{}", b"[]", b"1", b'{"a/b":NaN}', b"[" * 10**6, b'{"a":' * 10**5)),
        *(safetensors({"a/b": entry()}, bytes(4), size) for size in (0, 10**8, 1 << 62, (1 << 64) - 1)),
        *(b"", b"1234567", bytes(8), b"\xff" * 100),
    ],
    ids=lambda content: content[8:48].decode("latin-1"),
)
def test_bad_safetensors_are_refused_by_name(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    start = time.process_time()
    for shapes in ({"a/b": (1,)}, rules.get("velo").shapes):
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            weights.load("velo", tmp_path, shapes)
    assert time.process_time() - start < 2


# --- msgpack


def array(content):
    return b"\x81\xa1a\xc9" + len(content).to_bytes(4, "big") + b"\x01" + content


@pytest.mark.parametrize(
    "content",
    [
        b"\xdd\x00\x4c\x4b\x40" + b"\x90" * 5_000_000,
        b"\x81\xa1a\xdd\x00\x4c\x4b\x40" + b"\x90" * 5_000_000,
        b"\x9f" * 5_000_000,
        b"\xdf\x00\x4c\x4b\x40" + b"\xa1a\x80" * 1_700_000,
        b"\xdf\x00\x00\x0f\xff" + b"".join(b"\xa4%04x\xdf\x00\x00\x0f\xff" % k for k in range(4095)),
        array(b"\xdd\x00\x4c\x4b\x40" + b"\x90" * 5_000_000),
        array(b"\x93\xdd\x00\x4c\x4b\x40" + b"\x90" * 5_000_000),
        array(b"\x93\x98" + b"\x98" * 5_000_000),
        array(b"\x93\x91\x01\xa7float32" + b"\x9f" * 5_000_000),
        b"\x81\xa1a" * 1_000_000,
        *(b"\x81\xa1a" + head + b"\xff\xff\xff\xff" for head in (b"\xc6", b"\xc9", b"\xdb", b"\xdd", b"\xdf")),
        *(head + b"\xff\xff\xff\xff" for head in (b"\xdd", b"\xdf", b"\xdb")),
        b"\x81\xdb\x00\x4c\x4b\x40" + b"a" * 5_000_000 + b"\x80",
    ],
    ids=lambda content: f"{content[:12]!r}",
)
def test_msgpack_bombs_are_refused_at_once(tmp_path, content):
    (tmp_path / "theta.state").write_bytes(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"theta\.state"):
        weights.load("velo", tmp_path)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (msgpack.packb({1: b""}), "a key of type int"),
        (msgpack.packb({b"a": b""}), "a key of type bytes"),
        (msgpack.packb({"a": {None: b""}}), "a key of type None"),
        (b"\x82\xa1a\x80\xa1a\x80", "two leaves"),
        (b"\x81\xa1\xff\x80", "utf-8"),
        (b"\x81\xa1a\xd6\xff\0\0\0\0", "'a' is not an array"),  # a time
        (msgpack.packb({"a": [1.0, 2.0]}), "'a' is not an array but list"),
        (array(b"\x93\x92\x00\xce\x40\x00\x00\x00\xa7float32\xc4\x00"), "empty"),
        (array(b"\x93\x98" + b"\xce\x40\x00\x00\x00" * 8 + b"\xa7float32\xc4\x00"), "needs"),
        (array(msgpack.packb(((1,), "complex64", bytes(8)))), "dtype 'complex64'"),
        (array(msgpack.packb(((1,), "int32", bytes(4)))), "dtype 'int32'"),
        (array(msgpack.packb(((1,), "float32", bytes(4))) + b"\0"), "1 bytes too many"),
        (VELO_S.read_bytes() + b"\0", "1 bytes too many"),
    ],
)
def test_odd_msgpack_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "theta.state").write_bytes(content)
    with pytest.raises(ValueError, match=rf"theta\.state.*{message}"):
        weights.load("velo", tmp_path)


# --- mappings


class Ragged:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array today")


@pytest.mark.parametrize(
    "leaf",
    [
        torch.ones(2, device="meta"),
        torch.ones(2, 2).to_sparse(),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bool),
        np.ones(2, dtype=np.complex64),
        np.ones(2, dtype=np.int64),
        np.array([object()]),
        np.array(["a"]),
        [[1.0], [1.0, 2.0]],
        object(),
        Ragged(),
        b"bytes",
        None,
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_leaves_that_are_no_arrays_are_named(leaf):
    for spec in ({"a/b": leaf}, {"a": {"b": leaf}}):
        with pytest.raises(ValueError, match="leaf 'a/b'"):
            weights.load("velo", spec)


def test_mappings_that_are_no_trees():
    loop = {}
    loop["a"] = loop
    for spec in (loop, {b"a": torch.ones(1)}, {1: torch.ones(1)}, {"\ud800": torch.ones(1)}, {"": torch.ones(1)}):
        with pytest.raises(ValueError, match="weights=<mapping>"):
            weights.load("velo", spec)
    with pytest.raises(ValueError, match="NaN or infinite"):
        weights.load("velo", {"a/b": np.array([1e300])})


# --- types


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(tmp_path, dtype):
    save_file({"a/b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for rule, spec in (
            ("velo", VELO_S),
            ("velo", FORMATS / "velo_s_rnn"),
            ("small_fc_lopt", FORMATS / "small_fc_mlp"),
        ):
            assert {leaf.dtype for leaf in load(rule, spec).theta.values()} == {torch.float32}
        assert weights.load("velo", tmp_path).theta["a/b"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_an_optimizer_from_a_damaged_folder_is_never_made(tmp_path):
    weights.save(load("celo2", "bundled"), tmp_path, rule="celo2")
    flip_a_bit(tmp_path / "theta.state")
    with pytest.raises(ValueError, match="damaged"):
        LearnedOptimizer([nn.Parameter(torch.ones(2, 2))], "celo2", weights=tmp_path)
