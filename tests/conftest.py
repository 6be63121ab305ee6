import gc
import os

import pytest


# No test may depend on a hub; those that talk to a stand-in set these themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: the tensors are small, and several ranks share the cores in some tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """All imports are done: garbage collections, such as Trainer asks for in every run, leave what they made alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _settings_of_launchers_end_with_a_test():
    """``TrainingArguments(fsdp=...)`` of transformers 4 writes them into the environment, for all that follows."""
    names = ("ACCELERATE_", "FSDP_")
    before = {name: value for name, value in os.environ.items() if name.startswith(names)}
    yield
    for name in [name for name in os.environ if name.startswith(names) and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its configuration in process-wide singletons."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
