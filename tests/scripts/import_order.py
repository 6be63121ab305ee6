"""What ``import hf_lopt`` loads, and that transformers learns the names whenever it is imported. Prints JSON."""

import json
import sys

import hf_lopt


light = not {"transformers", "accelerate"} & set(sys.modules)

from transformers.training_args import OptimizerNames  # noqa: E402


names = {name: OptimizerNames(name).value for name in hf_lopt.available()}
without_trainer = "transformers.trainer" not in sys.modules

import transformers.trainer as trainer  # noqa: E402


json.dump(
    {
        "light": light,
        "names": names,
        "without_trainer": without_trainer,
        "callbacks": [callback.__name__ for callback in trainer.DEFAULT_CALLBACKS],
        "handlers": [name for name in names if name in getattr(trainer, "_OPTIMIZER_HANDLERS", names)],
        "loader": type(trainer.__loader__).__name__,
        "spec_loader": type(trainer.__spec__.loader).__name__,
    },
    sys.stdout,
)
