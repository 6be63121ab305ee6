"""Meta-weights on disk: every published format against the golden theta, and each way in which a file can be wrong."""

import copy
import hashlib
import pickle
import shutil
import struct
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hub_stand_in
from hf_lopt import rules, weights
from hf_lopt.weights.formats import velo_split


GOLDEN = Path(__file__).parent / "golden"
FORMATS = GOLDEN / "formats"
VELO_S = FORMATS / "velo_s.theta.state"
SHAPES = rules.get("velo").shapes

# sha256 of the theta of the golden trajectories, computed with numpy alone from the files of the JAX references.
CONTENT = {
    "velo_s": "dad5994b0a3358a33c0a5318f43180295fc525253bce2270aba63698f84b26be",
    "small_fc_lopt": "4fd9e2d3a811484a176e428c56bb65fd8c883732f62f43641260402cab3cc979",
    "celo2": "b9dc8c9b102d6568390a55eb6406b4336a96329df1e4d42c31f611c8ef10442f",
    "celo_synth": "389b59c386f4fe15781ee88698a7e231c6b5828fbb7899043a4f2862868fe59d",
    "celo_adam_synth": "d77aad08c62e8f4bd50acd8affa5f0136a773dc4744ec6af4d3f49fe44b495cb",
    "rnn_mlp": "868d99b8d97a69d1a2a97653dff9b7d670882e98eab2506b63b6301cde8ac275",
}
SMALL_FC_SHAPES = {"nn/~/w0": (39, "H"), "nn/~/w1": ("H", "H"), "nn/~/w2": ("H", 2)}
SMALL_FC_SHAPES |= {"nn/~/b0": ("H",), "nn/~/b1": ("H",), "nn/~/b2": (2,)}
SMALL_FC_SHAPES |= {"momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    hub_stand_in.isolate(monkeypatch, tmp_path / "hub")


@pytest.fixture
def velo_s():
    return {name: leaf.clone() for name, leaf in weights.load("velo", VELO_S, SHAPES).theta.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- formats


@pytest.mark.parametrize("name", CONTENT)
def test_flax_file_holds_the_golden_theta(name):
    assert weights.load(name, FORMATS / f"{name}.theta.state").sha256 == CONTENT[name]


def test_velo_leaf_by_leaf_against_the_trajectory_file(velo_s):
    golden = np.load(GOLDEN / "velo_s.npz")
    leaves = {k.removeprefix("theta/"): golden[k] for k in golden.files if k.startswith("theta/")}
    assert velo_s.keys() == leaves.keys()
    for name, leaf in velo_s.items():
        assert leaf.dtype == torch.float32
        np.testing.assert_array_equal(leaf.numpy(), leaves[name])


@pytest.fixture
def both_halves(tmp_path):
    for half in ("rnn", "mlp"):
        shutil.copytree(FORMATS / f"velo_s_{half}", tmp_path / "both" / f"velo_s_{half}")
    return tmp_path / "both"


def test_split_velo_from_two_folders_one_folder_or_their_parent(velo_s, both_halves):
    rnn, mlp = FORMATS / "velo_s_rnn", FORMATS / "velo_s_mlp"
    want = weights.load("velo", (rnn, mlp), SHAPES, bank_scale=1.0)
    for spec in ([mlp, rnn], rnn, str(mlp), f"{rnn}/", both_halves):
        assert same(weights.load("velo", spec, SHAPES, bank_scale=1.0).theta, want.theta), spec
    for name, leaf in want.theta.items():
        if name.startswith("ff_mod_stack"):  # stored divided by 100 in float32, so the last bit may differ
            torch.testing.assert_close(leaf, velo_s[name], rtol=2e-7, atol=0)
        else:
            assert torch.equal(leaf, velo_s[name]), name


def test_split_velo_bank_times_bank_scale_is_what_the_format_means():
    bank = load_file(FORMATS / "velo_s_mlp" / "model.safetensors")["input_weights_"].mT
    for bank_scale in (100.0, 1.0, 25.0):
        theta = weights.load("velo", FORMATS / "velo_s_rnn", SHAPES, bank_scale=bank_scale).theta
        w0 = torch.cat([theta[f"ff_mod_stack/~/w0__{k}"] for k in range(14)], dim=1)
        torch.testing.assert_close(bank_scale * w0, 100 * bank, rtol=3e-7, atol=0)
    theta = weights.load("velo", FORMATS / "velo_s_rnn", SHAPES).theta
    assert torch.equal(torch.cat([theta[f"ff_mod_stack/~/w0__{k}"] for k in range(14)], dim=1), bank)


def test_celo2_folder_holds_the_golden_theta():
    assert weights.load("celo2", FORMATS / "celo2_mlp").sha256 == CONTENT["celo2"]


def test_small_fc_folder_has_the_network_and_zero_offsets():
    golden = weights.load("small_fc_lopt", FORMATS / "small_fc_lopt.theta.state", SMALL_FC_SHAPES).theta
    theta = weights.load("small_fc_lopt", FORMATS / "small_fc_mlp", SMALL_FC_SHAPES).theta
    for name in SMALL_FC_SHAPES:
        if name.endswith("decays"):
            assert golden[name].abs().min() > 0 and not theta[name].any() and theta[name].shape == golden[name].shape
        else:
            assert torch.equal(theta[name], golden[name]), name


def test_offsets_given_as_settings_complete_the_small_fc_folder():
    golden = weights.load("small_fc_lopt", FORMATS / "small_fc_lopt.theta.state", SMALL_FC_SHAPES).theta
    offsets = {name: leaf.tolist() for name, leaf in golden.items() if name.endswith("decays")}
    loaded = weights.load("small_fc_lopt", FORMATS / "small_fc_mlp", SMALL_FC_SHAPES, settings=offsets)
    assert loaded.sha256 == CONTENT["small_fc_lopt"]


def test_own_format_and_mapping_give_the_same_content(velo_s, tmp_path):
    save_file(velo_s, tmp_path / "mine.safetensors")
    nested = {"ff_mod_stack": {}, "rnn_params/linear": {}}  # module names may hold a "/"
    for name, leaf in velo_s.items():
        module, rest = next(((m, name[len(m) + 1 :]) for m in nested if name.startswith(m + "/")), (None, name))
        (nested if module is None else nested[module])[rest] = leaf.numpy().astype(np.float64)
    flat = {name: leaf.numpy() for name, leaf in velo_s.items()}
    for spec in (tmp_path / "mine.safetensors", tmp_path, velo_s, flat, nested):
        loaded = weights.load("velo", spec, SHAPES)
        assert loaded.sha256 == CONTENT["velo_s"] and loaded.origin == "user"
    assert weights.load("velo", flat).source == "mapping"


def test_mapping_is_copied(velo_s):
    loaded = weights.load("velo", velo_s, SHAPES)
    velo_s["rnn_params/step_size/b"] += 1
    assert loaded.sha256 == weights.content_sha256(loaded.theta) == CONTENT["velo_s"]


def test_weights_object_passes_through_after_a_check(velo_s):
    loaded = weights.load("velo", VELO_S, SHAPES)
    assert weights.load("velo", loaded, SHAPES) is loaded
    with pytest.raises(ValueError, match="missing"):
        weights.load("velo", loaded, SHAPES | {"other": (1,)})
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert copied.sha256 == loaded.sha256 and same(copied.theta, loaded.theta)


def test_content_hash_by_hand():
    theta = {"b": torch.tensor([[1.0, -2.0]]), "a": torch.tensor(0.5, dtype=torch.float64)}
    by_hand = b"a\0\0" + struct.pack("<f", 0.5) + b"b\0" + b"1,2\0" + struct.pack("<2f", 1.0, -2.0)
    assert weights.content_sha256(theta) == hashlib.sha256(by_hand).hexdigest()


# --- damage


def flax_file(path, tree):
    def pack(node):
        if isinstance(node, dict):
            return {key: pack(value) for key, value in node.items()}
        if isinstance(node, np.ndarray):
            return msgpack.ExtType(1, msgpack.packb((node.shape, node.dtype.name, node.tobytes())))
        return node

    path.write_bytes(msgpack.packb(pack(tree)))
    return path


def test_flax_writer_of_these_tests_is_right(tmp_path, velo_s):
    file = flax_file(tmp_path / "theta.state", {name: leaf.numpy() for name, leaf in velo_s.items()})
    assert weights.load("velo", file, SHAPES).sha256 == CONTENT["velo_s"]


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_truncated_flax_file(tmp_path, keep):
    (tmp_path / "theta.state").write_bytes(VELO_S.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"theta\.state"):
        weights.load("velo", tmp_path, SHAPES)


def ext(*fields, code=1):
    return msgpack.ExtType(code, msgpack.packb(fields))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": ext((2,), "float32", b"1234")}, "8 bytes.*4"),
        ({"a": ext((1 << 62, 1 << 62), "float32", b"")}, "shape"),
        ({"a": ext((-1,), "float32", b"")}, "shape"),
        ({"a": ext((1,), "object", b"12345678")}, "dtype 'object'"),
        ({"a": ext((1,), ["float32"], b"1234")}, "dtype"),
        ({"a": ext((1,), "float32", "1234")}, r"not bytes"),
        ({"a": ext((1,), "float32")}, r"not stored as"),
        ({"a": ext((1,), "float32", b"1234", code=3)}, r"extension type 3"),
        ({"a": ext((1,), "float32", ext((1,), "float32", b"1234"))}, r"inside an array"),
        ({"a": msgpack.ExtType(1, b"\xc1")}, r"damaged"),
        ({"a": 1.0}, "leaf 'a'"),
        ({"a": "text"}, "leaf 'a'.*str"),
        ({"a": None}, "leaf 'a'"),
        ({"": ext((1,), "float32", b"1234")}, r"not a name"),
        ({"a/b": ext((1,), "float32", b"1234"), "a": {"b": ext((1,), "float32", b"1234")}}, r"two leaves"),
        ([1, 2], r"expected a mapping"),
    ],
)
def test_flax_file_with_anything_else_in_it(tmp_path, tree, message):
    (tmp_path / "theta.state").write_bytes(msgpack.packb(tree))
    with pytest.raises(ValueError, match=message):
        weights.load("velo", tmp_path, {"a": (1,)})


def test_deeply_nested_flax_file(tmp_path):
    (tmp_path / "theta.state").write_bytes(b"\x81\xa1a" * 100 + b"\x80")
    with pytest.raises(ValueError, match="nested"):
        weights.load("velo", tmp_path)
    (tmp_path / "theta.state").write_bytes(b"\x81\xa1a" * 100_000 + b"\x80")
    with pytest.raises(ValueError, match="damaged"):
        weights.load("velo", tmp_path)


def test_a_pickle_is_refused(tmp_path, velo_s):
    torch.save(velo_s, tmp_path / "theta.state")
    with pytest.raises(ValueError, match="flax"):
        weights.load("velo", tmp_path, SHAPES)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_safetensors(tmp_path, keep):
    shutil.copytree(FORMATS / "velo_s_rnn", tmp_path / "velo_s_rnn")
    data = (FORMATS / "velo_s_mlp" / "model.safetensors").read_bytes()
    (tmp_path / "velo_s_mlp").mkdir()
    (tmp_path / "velo_s_mlp" / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"velo_s_mlp.model\.safetensors"):
        weights.load("velo", tmp_path / "velo_s_rnn", SHAPES)


def test_safetensors_of_no_known_format(tmp_path):
    save_file({"encoder.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors.*encoder\.weight"):
        weights.load("velo", tmp_path, SHAPES)


def test_split_format_with_another_architecture(tmp_path, both_halves):
    file = both_halves / "velo_s_mlp" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"hidden_weights_.1": torch.ones(32, 4, 4)}, file)
    with pytest.raises(ValueError, match=r"unexpected.*hidden_weights_\.1"):
        weights.load("velo", both_halves, SHAPES)
    save_file({k: v for k, v in tensors.items() if k != "output_bias_"}, file)
    with pytest.raises(ValueError, match="missing.*output_bias_"):
        weights.load("velo", both_halves, SHAPES)
    save_file(tensors | {"input_weights_": torch.ones(32, 4, 29)}, file)
    with pytest.raises(ValueError, match="29.*30"):
        weights.load("velo", both_halves, SHAPES)
    save_file(tensors | {"input_weights_": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"input_weights_.*\(3,\)"):
        weights.load("velo", both_halves, SHAPES)


def test_half_without_the_other(tmp_path):
    shutil.copytree(FORMATS / "velo_s_rnn", tmp_path / "velo_s_rnn")
    with pytest.raises(ValueError, match="velo_s_mlp"):
        weights.load("velo", tmp_path / "velo_s_rnn", SHAPES)
    shutil.move(tmp_path / "velo_s_rnn", tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"weights=\(rnn, mlp\)"):
        weights.load("velo", tmp_path / "scheduler", SHAPES)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("owner/VeLO_RNN", "owner/VeLO_MLP"),
        ("/rnn/velo_mlp/", "/rnn/velo_rnn"),
        ("mlp", "rnn"),
        ("rnn_and_mlp", None),
        ("velo", None),
    ],
)
def test_name_of_the_other_half(name, other):
    assert velo_split.other_half(name) == other


# --- leaves, shapes, values


@pytest.mark.parametrize(
    "change", ["missing", "extra", "shape", "rank", "symbol", "multiple", "nan", "inf", "integers"]
)
def test_wrong_leaves_are_named(velo_s, change):
    lstm = "rnn_params/rnn/linear/w"
    if change == "missing":
        del velo_s[lstm]
        message = rf"missing.*'{lstm}'"
    elif change == "extra":
        velo_s["rnn_params/more/w"] = torch.ones(1)
        message = "unexpected.*'rnn_params/more/w'"
    elif change == "shape":
        velo_s["ff_mod_stack/~/w0__3"] = torch.ones(32, 2, 4)
        message = r"'ff_mod_stack/~/w0__3'.*\(32, 2, 4\).*\(32, 3, 4\).*K = 32"
    elif change == "rank":
        velo_s["rnn_params/step_size/b"] = torch.ones(())
        message = r"'rnn_params/step_size/b'.*\(\).*\(1,\)"
    elif change == "symbol":
        velo_s["rnn_params/rnn_to_controls/b"] = torch.ones(31)
        message = r"'rnn_params/rnn_to_controls/b'.*\(31,\).*\(32,\).*K = 32"
    elif change == "multiple":
        velo_s[lstm] = velo_s[lstm].mT.contiguous()
        message = rf"'{lstm}'.*\(256, 128\).*\(128, 256\).*H = 64.*'lstm_init_state/hidden'"
    elif change in ("nan", "inf"):
        velo_s[lstm][3, 5] = float(change)
        message = rf"'{lstm}'.* 1 .*NaN"
    else:
        velo_s[lstm] = velo_s[lstm].to(torch.int32)
        message = rf"'{lstm}'.*int32"
    with pytest.raises(ValueError, match=message):
        weights.load("velo", velo_s, SHAPES)


def test_weights_of_another_rule():
    with pytest.raises(ValueError, match="another rule"):
        weights.load("velo", FORMATS / "rnn_mlp.theta.state", SHAPES)


@pytest.mark.parametrize("spec", [None, 3, 1.5, object(), "", [], ["a", "b", "c"], [1, 2], b"x"])
def test_spec_of_an_unknown_kind(spec):
    with pytest.raises(ValueError, match="weights=.*'auto', 'published', 'bundled'"):
        weights.load("velo", spec, SHAPES)


@pytest.mark.parametrize(
    "spec", ["no/such/folder", "./nothing", "nowhere", "folder/theta.state", Path("a/b"), "~/none/x"]
)
def test_path_that_does_not_exist(spec):
    with pytest.raises(ValueError, match="no such file.*weights="):
        weights.load("velo", spec, SHAPES)


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"theta\.state"):
        weights.load("velo", tmp_path, SHAPES)


@pytest.mark.parametrize("bank_scale", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_bank_scale(bank_scale):
    with pytest.raises(ValueError, match="bank_scale"):
        weights.load("velo", VELO_S, SHAPES, bank_scale=bank_scale)
