import os


# No test may depend on a hub; those that talk to a stand-in set these themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: the tensors are small, and several ranks share the cores in some tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
