"""Where weights come from: what "auto" and "published" decide, a hub that fails in every way, and several ranks.

The real client library talks to a stand-in on the loopback interface; nothing leaves the machine.
"""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from huggingface_hub import constants
from safetensors.torch import load_file

import hub_stand_in
from hf_lopt import rules, weights
from hf_lopt.weights import hub
from hub_stand_in import Hub, put_in_cache, stuck_server, use_endpoint


FORMATS = Path(__file__).parent / "golden" / "formats"
VELO_S = FORMATS / "velo_s.theta.state"
VELO_S_CONTENT = "dad5994b0a3358a33c0a5318f43180295fc525253bce2270aba63698f84b26be"
CELO2_CONTENT = "b9dc8c9b102d6568390a55eb6406b4336a96329df1e4d42c31f611c8ef10442f"
SHAPES = rules.get("velo").shapes


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    hub_stand_in.isolate(monkeypatch, tmp_path / "hub")


def test_bundled_weights_fit_their_rule_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = weights.load("velo", "bundled", SHAPES)
    assert (loaded.source, loaded.origin) == ("bundled:velo", "bundled")
    assert loaded.sha256 == weights.content_sha256(load_file(weights.EMBEDDED / "velo.safetensors"))
    with pytest.raises(ValueError, match="'other'.*velo"):
        weights.load("other", "bundled")


def test_auto_offline_warns_once_and_names_what_it_loaded():
    with pytest.warns(UserWarning) as caught:
        loaded = weights.load("velo", "auto", SHAPES)
    (text,) = [str(w.message) for w in caught]
    for part in ("bundled:velo", loaded.sha256[:12], "HF_HUB_OFFLINE is set", "weights='bundled' silences"):
        assert part in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weights.load("velo", "auto", SHAPES).sha256 == loaded.sha256


def test_published_offline_is_an_error_with_the_ids_and_the_way_out():
    with pytest.raises(ValueError) as error:
        weights.load("velo", "published", SHAPES)
    for part in ("amoudgl/velo-4000", "Pauljanson002/VeLO_RNN", "HF_HUB_OFFLINE", "weights='bundled'"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="published"):
        weights.load("other", "published")


def test_cached_published_weights_are_used_offline():
    put_in_cache("amoudgl/velo-4000", "theta.state", VELO_S)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in ("auto", "published", "amoudgl/velo-4000"):
            loaded = weights.load("velo", spec, SHAPES)
            assert (loaded.source, loaded.origin, loaded.sha256) == (
                "amoudgl/velo-4000",
                "published",
                VELO_S_CONTENT,
            )


def test_cached_pair_is_found_by_either_of_its_names():
    for half in ("RNN", "MLP"):
        source = FORMATS / f"velo_s_{half.lower()}" / "model.safetensors"
        put_in_cache(f"Pauljanson002/VeLO_{half}", "model.safetensors", source)
        put_in_cache(f"someone/velo-{half}", "model.safetensors", source)
    want = weights.load("velo", (FORMATS / "velo_s_rnn", FORMATS / "velo_s_mlp"), SHAPES).sha256
    for spec in ("auto", "Pauljanson002/VeLO_MLP", ("Pauljanson002/VeLO_RNN", "Pauljanson002/VeLO_MLP")):
        loaded = weights.load("velo", spec, SHAPES)
        assert (loaded.origin, loaded.sha256) == ("published", want)
        assert loaded.source == "Pauljanson002/VeLO_RNN + Pauljanson002/VeLO_MLP"
    loaded = weights.load("velo", "someone/velo-RNN", SHAPES)
    assert (loaded.source, loaded.origin) == ("someone/velo-RNN + someone/velo-MLP", "user")
    assert loaded.sha256 == want


def test_damaged_cached_file_falls_back_with_its_name_or_raises(tmp_path):
    (tmp_path / "cut").write_bytes(VELO_S.read_bytes()[:1000])
    put_in_cache("amoudgl/velo-4000", "theta.state", tmp_path / "cut")
    with pytest.warns(UserWarning, match=r"theta\.state"):
        assert weights.load("velo", "auto", SHAPES).origin == "bundled"
    with pytest.raises(ValueError, match=r"theta\.state"):
        weights.load("velo", "published", SHAPES)


def test_published_offsets_come_with_the_mulo_weights():
    put_in_cache("btherien/mulo", "model.safetensors", FORMATS / "small_fc_mlp" / "model.safetensors")
    shapes = {"nn/~/w0": (39, "H"), "nn/~/w1": ("H", "H"), "nn/~/w2": ("H", 2)}
    shapes |= {"nn/~/b0": ("H",), "nn/~/b1": ("H",), "nn/~/b2": (2,)}
    shapes |= {"momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}
    loaded = weights.load("mulo", "published", shapes)
    want = torch.tensor([0.18621896, -0.10864615, -0.06185547])
    assert torch.equal(loaded.theta["adafactor_decays"], want)
    assert loaded.settings["step_mult"] == 0.01


def test_find_lists_what_is_here():
    assert [w.source for w in weights.find("velo")] == ["bundled:velo"]
    put_in_cache("amoudgl/velo-4000", "theta.state", VELO_S)
    found = weights.find("velo")
    assert [(w.source, w.origin) for w in found] == [("bundled:velo", "bundled"), ("amoudgl/velo-4000", "published")]
    assert found[1].sha256 == VELO_S_CONTENT
    assert weights.find("no rule of this name") == []


# --- a hub on the loopback interface


@pytest.fixture
def hub_server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.status = {}, [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    server.server_close()


def test_auto_downloads_once_and_then_uses_the_cache(hub_server):
    hub_server.files["amoudgl/velo-4000", "theta.state"] = VELO_S.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = weights.load("velo", "auto", SHAPES)
        assert (loaded.source, loaded.origin, loaded.sha256) == ("amoudgl/velo-4000", "published", VELO_S_CONTENT)
        asked = len(hub_server.asked)
        assert weights.load("velo", "auto", SHAPES).sha256 == loaded.sha256
    assert asked > 0 and len(hub_server.asked) == asked


def test_auto_goes_on_to_the_second_published_set(hub_server):
    for half in ("RNN", "MLP"):
        data = (FORMATS / f"velo_s_{half.lower()}" / "model.safetensors").read_bytes()
        hub_server.files[f"Pauljanson002/VeLO_{half}", "model.safetensors"] = data
    loaded = weights.load("velo", "auto", SHAPES)
    assert (loaded.source, loaded.origin) == ("Pauljanson002/VeLO_RNN + Pauljanson002/VeLO_MLP", "published")


def test_hub_id_with_either_file(hub_server):
    hub_server.files["me/flax", "theta.state"] = VELO_S.read_bytes()
    hub_server.files["me/torch", "model.safetensors"] = (FORMATS / "celo2_mlp" / "model.safetensors").read_bytes()
    loaded = weights.load("velo", "me/flax", SHAPES)
    assert (loaded.source, loaded.origin, loaded.sha256) == ("me/flax", "user", VELO_S_CONTENT)
    assert weights.load("celo2", "me/torch").sha256 == CELO2_CONTENT
    hub_server.files["me/empty", "README.md"] = b""
    for _ in range(2):  # the second time from memory
        with pytest.raises(ValueError, match="'me/empty'"):
            weights.load("velo", "me/empty", SHAPES)
    hub_server.files["me/empty", "model.safetensors"] = VELO_S.read_bytes()


def test_hub_id_that_does_not_exist_is_asked_for_once(hub_server):
    for _ in range(2):
        with pytest.raises(ValueError, match="'me/typo'.*404.*weights='bundled'"):
            weights.load("velo", "me/typo", SHAPES)
    assert hub_server.asked == [("HEAD", "me/typo", "theta.state")]


def test_hub_without_any_published_set_falls_back(hub_server):
    with pytest.warns(UserWarning, match="amoudgl/velo-4000.*VeLO_RNN"):
        assert weights.load("velo", "auto", SHAPES).origin == "bundled"


def test_hub_in_trouble_is_asked_once(hub_server):
    hub_server.status = 503
    with pytest.warns(UserWarning, match="HTTP 503"):
        assert weights.load("velo", "auto", SHAPES).origin == "bundled"
    assert len(hub_server.asked) == 1


def test_no_server_at_all(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert weights.load("velo", "auto", SHAPES).origin == "bundled"


@pytest.mark.parametrize("drip", [b"", b"X-Slow: 1\r\n"], ids=["silent", "trickling"])
def test_hub_that_hangs_is_given_up_and_remembered(monkeypatch, drip):
    with stuck_server(drip) as (endpoint, connections):
        use_endpoint(monkeypatch, endpoint)
        monkeypatch.setattr(hub, "FIRST_ANSWER_S", 0.4)
        with pytest.warns(UserWarning, match=r"(gave no answer within 0\.4 s|cannot be used \(ReadTimeout)"):
            assert weights.load("velo", "auto", SHAPES).origin == "bundled"
        for spec in ("published", "me/other"):
            with pytest.raises(ValueError, match="earlier in this process"):
                weights.load("velo", spec, SHAPES)
        assert len(connections) == 1


def test_download_that_stalls_is_given_up(hub_server, monkeypatch):
    hub_server.files["amoudgl/velo-4000", "theta.state"] = VELO_S.read_bytes()
    release = threading.Event()
    monkeypatch.setattr(Hub, "do_GET", lambda self: release.wait(60))
    monkeypatch.setattr(hub, "TOTAL_S", 1.5)
    with pytest.warns(UserWarning, match=r"did not deliver the file within"):
        assert weights.load("velo", "auto", SHAPES).origin == "bundled"
    release.set()


HANGING_SCRIPT = """
from hf_lopt import rules, weights
from hf_lopt.weights import hub
hub.FIRST_ANSWER_S = 0.5
loaded = weights.load("velo", "auto", rules.get("velo").shapes)
print(loaded.source)
"""


def test_process_with_a_hanging_hub_ends_with_one_warning(tmp_path):
    """With the environment variables that users set, and a real end of the process while a request is still open."""
    with stuck_server(b"X-Slow: 1\r\n") as (endpoint, _):
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", HANGING_SCRIPT]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["bundled:velo"]
    assert done.stderr.count("UserWarning") == 1 and "gave no answer" in done.stderr
    assert "Traceback" not in done.stderr and "Retrying" not in done.stderr


# --- several ranks


def rank_main(rank, folder, cached_rank, spec):
    """One of two ranks; only `cached_rank` has published weights in its cache."""
    constants.HF_HUB_OFFLINE = True
    constants.HF_HUB_CACHE = f"{folder}/cache-{rank}"
    if rank == cached_rank:
        put_in_cache("amoudgl/velo-4000", "theta.state", VELO_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded = weights.load("velo", spec, SHAPES)
            result = {"sha256": weights.content_sha256(loaded.theta), "source": loaded.source}
        except ValueError as error:
            result = {"error": str(error)}
    result["warnings"] = sum("hf_lopt" in str(w.message) for w in caught)
    dist.barrier()
    dist.destroy_process_group()
    Path(folder, f"result-{rank}").write_text(json.dumps(result))


def on_two_ranks(folder, cached_rank, spec):
    mp.start_processes(rank_main, (str(folder), cached_rank, spec), nprocs=2, start_method="forkserver")
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in (0, 1)]


def test_rank_0_decides_for_the_embedded_weights(tmp_path):
    zero, one = on_two_ranks(tmp_path, 1, "auto")
    assert zero["source"] == one["source"] == "bundled:velo" and zero["sha256"] == one["sha256"]
    assert (zero["warnings"], one["warnings"]) == (1, 0)


def test_rank_0_decides_for_the_published_weights(tmp_path):
    zero, one = on_two_ranks(tmp_path, 0, "auto")
    assert zero == one == {"source": "amoudgl/velo-4000", "sha256": VELO_S_CONTENT, "warnings": 0}


@pytest.mark.parametrize("spec", ["published", "amoudgl/velo-4000"])
def test_error_of_rank_0_is_raised_everywhere(tmp_path, spec):
    zero, one = on_two_ranks(tmp_path, 1, spec)
    assert "HF_HUB_OFFLINE" in zero["error"] and one["error"] == f"rank 0: {zero['error']}"
