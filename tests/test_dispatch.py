"""Which kernels run: a choice of each thread, and what the card and its driver can do."""

import threading
import warnings

import pytest
import torch

from hf_lopt.kernels import cards, dispatch, ops
from hf_lopt.kernels.arguments import Arguments, ZeroNan


def test_plain_is_a_choice_of_the_thread_that_makes_it():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def compare():
        seen.append(dispatch.enabled())
        with ops.plain():
            entered.set()
            leave.wait(30)
            seen.append(dispatch.enabled())
        seen.append(dispatch.enabled())

    thread = threading.Thread(target=compare)
    with ops.plain():
        thread.start()
        assert entered.wait(30)
        assert not dispatch.enabled()
    # The other thread is still within its own context.
    assert dispatch.enabled()
    leave.set()
    thread.join()
    assert seen == [True, False, True]


def test_plain_nests():
    with ops.plain():
        with ops.plain():
            assert not dispatch.enabled()
        assert not dispatch.enabled()
    assert dispatch.enabled()


# ---- cards --------------------

BUILD = "CUDA 13.0, driver 13.1, code sm_80 sm_86 sm_89 sm_90 sm_100 compute_80 compute_100"


@pytest.mark.parametrize(
    "build, capability, reason",
    [
        *((BUILD, capability, "") for capability in [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)]),
        (BUILD, (7, 5), "compute capability 8.0 and newer"),
        (BUILD.replace("driver 13.1", "driver 12.8"), (9, 0), "the driver serves CUDA 12.8"),
        (BUILD.replace("CUDA 13.0", "CUDA 12.6"), (9, 0), ""),
        ("CUDA 13.0, driver 0.0, code sm_90", (9, 0), "the driver serves CUDA 0.0"),
        ("CUDA 13.0, driver 13.0, code sm_90", (10, 0), "they are built for sm_90"),
        ("CUDA 13.0, driver 13.0, code sm_90", (8, 0), "they are built for sm_90"),
        ("CUDA 13.0, driver 13.0, code sm_80", (8, 6), ""),
        ("CUDA 13.0, driver 13.0, code sm_86", (8, 0), "they are built for sm_86"),
    ],
)
def test_what_numbers_tell_of_a_card(build, capability, reason):
    found = cards.mismatch(build, capability)
    assert reason in found and bool(reason) == bool(found)


@pytest.mark.parametrize("launch, capability", [("no kernel image is available", (8, 0)), ("", (7, 5))])
def test_a_card_without_kernels_gets_one_warning_and_plain_pytorch(monkeypatch, launch, capability):
    """Two cards, several calls; on a third one the kernels run."""
    capabilities = {0: capability, 1: capability, 2: (9, 0)}
    launched, plain = [], []

    def cuda_launch(index):
        launched.append(index)
        return launch if index < 2 else ""

    device = torch.device("cuda", 0)
    monkeypatch.setattr(cards, "_runs", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    for name, function in (("cuda_build", lambda: BUILD), ("cuda_launch", cuda_launch)):
        monkeypatch.setattr(torch.ops.hf_lopt, name, function, raising=False)
    monkeypatch.setattr(dispatch, "_loaded", {"cpu", "cuda"})
    monkeypatch.setattr(Arguments, "device", property(lambda self: device))
    monkeypatch.setattr(ops.zero_nan, "reference", lambda arguments: plain.append(device.index))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for index in (0, 1, 2, 0, 1, 2):
            device = torch.device("cuda", index)
            ops.zero_nan(ZeroNan([torch.ones(3)]))
    assert plain == [0, 1, 0, 1] and launched == ([0, 1, 2] if launch else [2])
    (warning,) = found
    assert "Some card" in str(warning.message) and (launch or "8.0 and newer") in str(warning.message)
