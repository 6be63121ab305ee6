"""Saving and uploading weights: each format against the published files, there and back; a hub that stores uploads."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import shutil
import threading
import urllib.parse
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

import golden
import hub_stand_in
from hf_lopt import LearnedOptimizer, rules, weights


FORMATS = Path(__file__).parent / "golden" / "formats"
# File of the theta -> rule and the factor on its bank.
STATES = {
    "velo_s": ("velo_s", 1.0),
    "small_fc_lopt": ("small_fc_lopt", 100.0),
    "celo2": ("celo2", 100.0),
    "celo_synth": ("celo", 100.0),
    "celo_adam_synth": ("celo_adam", 100.0),
    "rnn_mlp": ("rnn_mlp", 100.0),
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    hub_stand_in.isolate(monkeypatch, tmp_path / "hub")


def load(rule, spec, **settings):
    return weights.load(rule, spec, rules.get(rule).shapes, **settings)


def golden_weights(name):
    return load(STATES[name][0], FORMATS / f"{name}.theta.state")


def optimizer_with(rule, theta, **settings):
    if rules.get(rule).needs_horizon:
        settings["num_training_steps"] = 40
    return LearnedOptimizer([torch.nn.Parameter(torch.ones(3, 4))], rule, weights=theta, **settings)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- formats, there and back


@pytest.mark.parametrize("name", STATES)
def test_theta_state_is_byte_for_byte_the_published_file(name, tmp_path):
    rule, _ = STATES[name]
    loaded = golden_weights(name)
    shuffled = dict(reversed(loaded.theta.items()))
    (file, provenance) = weights.save(shuffled, tmp_path / "out", rule=rule)
    assert (file.name, provenance.name) == ("theta.state", "hf_lopt.json")
    assert file.read_bytes() == (FORMATS / f"{name}.theta.state").read_bytes()
    assert load(rule, tmp_path / "out").sha256 == loaded.sha256


@pytest.mark.parametrize("name", STATES)
def test_one_safetensors_file(name, tmp_path):
    rule, _ = STATES[name]
    loaded = golden_weights(name)
    weights.save(loaded, tmp_path, rule=rule, format="safetensors")
    assert load(rule, tmp_path).sha256 == loaded.sha256
    assert load_file(tmp_path / "model.safetensors").keys() == loaded.theta.keys()


@pytest.mark.parametrize("bank_scale", [100.0, 1.0])
def test_velo_in_two_folders(tmp_path, bank_scale):
    published = FORMATS / "velo_s_rnn"
    loaded = load("velo", published, bank_scale=bank_scale)
    weights.save(loaded, tmp_path, format="published", rule="velo", settings={"bank_scale": bank_scale})
    for half in ("rnn", "mlp"):
        ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / half, FORMATS / f"velo_s_{half}"))
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
        for name, tensor in ours.items():
            scratch = f"{name}_" in ours or name.replace(".0", "_.0") in ours.keys() - {name}
            if not scratch and bank_scale == 100.0:
                assert torch.equal(tensor, theirs[name]), name
            elif not scratch:
                torch.testing.assert_close(tensor, theirs[name], rtol=3e-7, atol=0)
        configs = [(f / "config.json").read_bytes() for f in (tmp_path / half, FORMATS / f"velo_s_{half}")]
        assert configs[0] == configs[1]
    for spec in (tmp_path, tmp_path / "rnn", (tmp_path / "mlp", tmp_path / "rnn")):
        again = load("velo", spec, bank_scale=bank_scale)
        if bank_scale == 100.0:
            assert again.sha256 == loaded.sha256
        for name, leaf in again.theta.items():
            torch.testing.assert_close(leaf, loaded.theta[name], rtol=3e-7, atol=0)


def test_celo2_folder_is_byte_for_byte_the_published_one(tmp_path):
    loaded = golden_weights("celo2")
    weights.save(loaded, tmp_path, format="published", rule="celo2")
    (tmp_path / "hf_lopt.json").unlink()
    assert content(tmp_path) == content(FORMATS / "celo2_mlp")
    assert load("celo2", tmp_path).sha256 == loaded.sha256


def test_small_fc_folder_and_the_offsets_it_has_no_room_for(tmp_path):
    loaded = golden_weights("small_fc_lopt")
    with pytest.warns(UserWarning, match="momentum_decays, rms_decays, adafactor_decays.*hf_"):
        weights.save(loaded, tmp_path, format="published", rule="small_fc_lopt")
    assert load("small_fc_lopt", tmp_path).sha256 == loaded.sha256
    (tmp_path / "hf_lopt.json").unlink()
    assert content(tmp_path) == content(FORMATS / "small_fc_mlp")
    without = load("small_fc_lopt", tmp_path)
    assert not without.theta["momentum_decays"].any() and without.sha256 != loaded.sha256


def test_damaged_record_beside_the_weights(tmp_path):
    shutil.copytree(FORMATS / "small_fc_mlp", tmp_path / "out")
    for damage in ("{", "[]", '{"settings": {"momentum_decays": ["a"]}}'):
        (tmp_path / "out" / "hf_lopt.json").write_text(damage)
        with pytest.raises(ValueError, match=r"hf_lopt\.json"):
            load("small_fc_lopt", tmp_path / "out")
    (tmp_path / "out" / "hf_lopt.json").write_text('{"settings": {"momentum_decays": [1.0]}}')
    with pytest.raises(ValueError, match=r"'momentum_decays'.*\(1,\).*\(3,\)"):
        load("small_fc_lopt", tmp_path / "out")


@pytest.mark.parametrize("name", ["rnn_mlp", "celo_synth", "celo_adam_synth"])
def test_rules_without_a_published_folder_format(name, tmp_path):
    with pytest.raises(ValueError, match="theta_state"):
        weights.save(golden_weights(name), tmp_path, format="published")
    assert not any(tmp_path.glob("*"))


@pytest.mark.parametrize("rule", sorted(file.stem for file in weights.EMBEDDED.glob("*.safetensors")))
def test_embedded_weights_there_and_back(rule, tmp_path):
    loaded = load(rule, "bundled")
    for form in ("theta_state", "safetensors"):
        weights.save(loaded, tmp_path / form, format=form, rule=rule)
        again = load(rule, tmp_path / form)
        assert again.sha256 == loaded.sha256
        # The step on pretrained models is a choice made for the embedded files, not for copies of them.
        assert again.finetune_lr is None and again.finetune_settings == {}
    record = json.loads((tmp_path / "safetensors" / "hf_lopt.json").read_text())
    assert (record["origin"], record["source"], record["licence"]) == ("bundled", f"bundled:{rule}", "apache-2.0")


# --- what is saved


def test_optimizer_knows_its_rule_and_settings(tmp_path):
    reference = golden.read("small_fc_lopt.npz")
    optimizer = optimizer_with("small_fc_lopt", reference.theta, step_mult=0.002)

    class Wrapper:  # as Accelerate wraps it
        def __init__(self, optimizer):
            self.optimizer = optimizer

    for source in (optimizer, Wrapper(Wrapper(optimizer))):
        weights.save(source, tmp_path)
        record = json.loads((tmp_path / "hf_lopt.json").read_text())
        assert record["rule"] == "small_fc_lopt" and record["sha256"] == optimizer.weights.sha256
        assert record["settings"] == {
            "step_mult": 0.002,
            "exp_mult": 0.001,
            "max_grad_norm": 0.0,
            "precision": "exact",
        }
        assert record["sizes"] == {"leaves": 9, "values": 2402 + 7}
        assert record["origin"] == "user" and record["licence"] is None
    with pytest.raises(ValueError, match="'velo'.*'small_fc_lopt'"):
        weights.save(optimizer, tmp_path, rule="velo")


def test_trajectory_from_a_saved_folder(tmp_path):
    """The optimizer that loads the folder goes the way of the reference."""
    reference = golden.read("velo_s.npz")
    weights.save(reference.theta, tmp_path, rule="velo_s", settings={"bank_scale": 1.0})
    params = golden.parameters(reference, "torch")
    bare = {"lr": 1.0, "min_param_scale": 0.0}
    optimizer = LearnedOptimizer(params, "velo_s", weights=tmp_path, num_training_steps=reference.num_steps, **bare)
    for t in range(1, 4):
        golden.set_gradients(reference, t, params, "torch")
        optimizer.step(float(reference.loss[t - 1]))
    for p, name in zip(params, reference.names, strict=True):
        if (want := reference.param(3, name)) is not None and name != "h_row16":
            got = golden.from_layout(p.detach().numpy(), "torch")
            assert abs(got - want).max() <= 3e-6 * abs(want).max(), name


def test_record_has_no_folders_of_this_machine(tmp_path):
    weights.save(load("celo2", FORMATS / "celo2.theta.state"), tmp_path)
    record = json.loads((tmp_path / "hf_lopt.json").read_text())
    assert record["source"] == "celo2.theta.state"


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ({}, {}, "empty"),
        ({"a/b": torch.tensor([float("nan")])}, {}, "'a/b'.*NaN"),
        ({"a": torch.ones(1), "a/b": torch.ones(1)}, {}, "'a/b'"),
        ({"a": torch.ones(1)}, {"format": "safetensors"}, "'nn/~/w0'.*a"),
        ({"a/b": torch.ones(1)}, {"format": "pickle"}, "format.*theta_state, safetensors, published"),
        ({"a/b": torch.ones(1)}, {"settings": {"x": float("inf")}}, "'x'"),
        ({"a/b": torch.ones(1)}, {"settings": {"x": None}}, "'x'"),
        (torch.nn.Linear(2, 2), {}, "Linear"),
        (None, {}, "NoneType"),
    ],
)
def test_what_cannot_be_saved(source, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.save(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_other_weights_in_the_folder_would_be_read_instead(tmp_path):
    loaded = golden_weights("celo2")
    weights.save(loaded, tmp_path, rule="celo2")
    weights.save(loaded, tmp_path, rule="celo2")  # the same files are replaced
    with pytest.raises(ValueError, match=r"theta\.state"):
        weights.save(loaded, tmp_path, rule="celo2", format="published")
    (tmp_path / "theta.state").unlink()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"half/model\.safetensors"):
        weights.save(loaded, tmp_path, rule="celo2")


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    loaded = golden_weights("celo2")
    weights.save(loaded, tmp_path, rule="celo2")
    before = content(tmp_path)
    changed = {name: leaf + 1 for name, leaf in loaded.theta.items()}

    def fail(*args):
        raise OSError("disk full")

    for target in ((Path, "write_bytes"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(*target, fail)
            with pytest.raises(OSError, match="disk full"):
                weights.save(changed, tmp_path, rule="celo2")
        assert content(tmp_path) == before
    weights.save(changed, tmp_path, rule="celo2")
    assert content(tmp_path).keys() == before.keys() and content(tmp_path) != before


# --- the hub


class UploadHub(hub_stand_in.Hub):
    """Adds what an upload uses. `server.blobs`: sha256 -> content; `server.repos`: name -> whether it is private."""

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def files_of(self, repo):
        return {file: data for (owner, file), data in self.server.files.items() if owner == repo}

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path
        if "/tree/" not in path:
            return self.answer({"error": "no"}, 404) if path.startswith("/api/") else super().do_GET()
        repo = path.removeprefix("/api/models/").split("/tree/")[0]
        rows = [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in self.files_of(repo).items()]
        self.answer(rows)

    def do_PUT(self):
        data = self.body()
        oid = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        self.answer({})

    def do_POST(self):
        endpoint = f"http://{self.headers['Host']}"
        path, body = urllib.parse.urlparse(self.path).path, self.body()
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuse:
            return self.answer({"error": "no write token"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'someone'}/{asked['name']}"
            exists = name in self.server.repos
            if not exists:
                self.server.repos[name] = asked.get("private") or asked.get("visibility") == "private"
            return self.answer({"url": f"{endpoint}/{name}"}, 409 if exists else 200)
        if path == "/api/validate-yaml":
            header = json.loads(body)["content"].split("---")[1]
            assert isinstance(yaml.safe_load(header), dict)
            return self.answer({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{endpoint}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        repo = path.removeprefix("/api/models/").rsplit("/", 2)[0]
        assert repo in self.server.repos
        if "/preupload/" in path:
            large = (".state", ".safetensors")
            rows = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": [row | {"shouldIgnore": False} for row in rows]})
        assert "/commit/" in path
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.commits.append((repo, lines[0]["value"]["summary"]))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.server.files[repo, value["path"]] = self.server.blobs[value["oid"]]
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                self.server.files[repo, value["path"]] = base64.b64decode(value["content"])
        self.answer({"commitUrl": f"{endpoint}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), UploadHub) as found:
        found.files, found.asked, found.status, found.refuse = {}, [], None, False
        found.blobs, found.repos, found.commits, found.tokens = {}, {}, [], set()
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        hub_stand_in.use_endpoint(monkeypatch, f"http://127.0.0.1:{found.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield found
        found.shutdown()
        thread.join()


def card(server, repo):
    text = server.files[repo, "README.md"].decode()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize("form", ["theta_state", "safetensors"])
@pytest.mark.parametrize("name", STATES)
def test_upload_and_load_by_name(server, name, form):
    rule, bank_scale = STATES[name]
    loaded = golden_weights(name)
    repo = f"me/{name}"
    # A failed look-up earlier in the process is no obstacle.
    with pytest.raises(ValueError, match="no such repository|does not have the file"):
        load(rule, repo)
    commits = weights.push_to_hub(loaded, repo, rule=rule, format=form, token="hf_abc", private=True)
    assert commits == {repo: f"{constants.ENDPOINT}/{repo}/commit/{'1' * 40}"}
    assert server.repos == {repo: True} and server.tokens == {"Bearer hf_abc"}
    again = load(rule, repo, bank_scale=bank_scale)
    assert (again.sha256, again.source) == (loaded.sha256, repo)
    # The weights went the way of large files.
    (weight_file,) = [file for _, file in server.files if file.endswith((".state", ".safetensors"))]
    assert hashlib.sha256(server.files[repo, weight_file]).hexdigest() in server.blobs


def test_card_says_what_it_is(server):
    optimizer = optimizer_with("velo_s", golden.theta("velo_s.npz"), bank_scale=2.0)
    metrics = {"wikitext loss": 3.21987654321, "steps": 2000, "note": "a|b\nc"}
    weights.push_to_hub(optimizer, "me/mine", license="mit", metrics=metrics, description="Trained on a shelf.")
    header, body = card(server, "me/mine")
    assert (header["license"], header["library_name"]) == ("mit", "hf_lopt") and "velo_s" in header["tags"]
    theta = optimizer.weights.theta
    for text in (
        *("`velo_s`", optimizer.weights.sha256, f"{sum(t.numel() for t in theta.values()):,} in {len(theta)} arrays"),
        *("| lstm units | 64 |", "| bank | 32 |", "| licence | mit |", "| origin | user, from mapping |"),
        *("| bank_scale | `2.0` |", "| wikitext loss | 3.21988 |", "| steps | 2000 |", r"| note | a\|b c |"),
        *("Trained on a shelf.", 'LearnedOptimizer(model.parameters(), "velo_s", weights="me/mine", bank_scale=2.0'),
        'optim_args="weights=me/mine,bank_scale=2.0"',
    ):
        assert text in body, text
    record = json.loads(server.files["me/mine", "hf_lopt.json"])
    assert (record["rule"], record["licence"], record["settings"]) == ("velo_s", "mit", {"bank_scale": 2.0})


def test_card_of_a_bare_mapping_claims_nothing(server):
    weights.push_to_hub(golden_weights("rnn_mlp").theta, "me/bare")
    header, body = card(server, "me/bare")
    assert "license" not in header
    assert "| licence | not stated by the uploader |" in body and "| rule | not stated |" in body
    assert "## Results" not in body


def test_split_velo_goes_to_two_repositories(server):
    loaded = load("velo", FORMATS / "velo_s_rnn")
    commits = weights.push_to_hub(loaded, "me/VeLO", rule="velo", format="published")
    assert list(commits) == ["me/VeLO_RNN", "me/VeLO_MLP"]
    for spec in ("me/VeLO_RNN", "me/VeLO_MLP", ("me/VeLO_RNN", "me/VeLO_MLP")):
        assert load("velo", spec).sha256 == loaded.sha256
    assert json.loads(server.files["me/VeLO_MLP", "config.json"])["param_inits"] == 32


def test_offsets_of_small_fc_come_back_from_the_hub(server):
    loaded = golden_weights("small_fc_lopt")
    with pytest.warns(UserWarning, match="no room for"):
        weights.push_to_hub(loaded, "me/fc", rule="small_fc_lopt", format="published")
    assert load("small_fc_lopt", "me/fc").sha256 == loaded.sha256
    for name in ("model.safetensors", "config.json"):  # as other software publishes it
        server.files["other/fc", name] = (FORMATS / "small_fc_mlp" / name).read_bytes()
    assert not load("small_fc_lopt", "other/fc").theta["momentum_decays"].any()


def test_second_upload_replaces_the_first_but_not_another_format(server):
    loaded = golden_weights("celo2")
    changed = {name: leaf * 2 for name, leaf in loaded.theta.items()}
    weights.push_to_hub(loaded, "me/celo2", rule="celo2")
    weights.push_to_hub(changed, "me/celo2", rule="celo2", commit_message="Better ones")
    assert load("celo2", "me/celo2").sha256 == weights.content_sha256(changed)
    assert server.commits == [("me/celo2", "Upload celo2 weights"), ("me/celo2", "Better ones")]
    with pytest.raises(ValueError, match=r"me/celo2.*theta\.state"):
        weights.push_to_hub(changed, "me/celo2", rule="celo2", format="published")
    assert len(server.commits) == 2


def test_a_name_without_an_owner_gets_the_users(server):
    assert list(weights.push_to_hub(golden_weights("celo2"), "celo2", rule="celo2")) == ["someone/celo2"]
    assert 'weights="someone/celo2"' in card(server, "someone/celo2")[1]


def test_refused_upload(server):
    server.refuse = True
    with pytest.raises(HfHubHTTPError, match="403"):
        weights.push_to_hub(golden_weights("celo2"), "me/celo2", rule="celo2")
    assert not server.files


@pytest.mark.parametrize(
    ("repo", "settings", "message"),
    [
        ("me/a/b", {}, "Repo id must"),
        ("me/celo2", {"metrics": {"loss": None}}, "'loss'.*None"),
        ("me/celo2", {"metrics": {"ok": True}}, "'ok'"),
        ("me/celo2", {"format": "x"}, "format.*'x'"),
    ],
)
def test_mistakes_are_found_before_the_hub_is_asked(server, repo, settings, message):
    with pytest.raises(ValueError, match=message):
        weights.push_to_hub(golden_weights("celo2"), repo, **settings)
    assert not server.repos and not server.files
