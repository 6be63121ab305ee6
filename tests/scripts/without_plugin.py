"""Opens training_args.bin in a process that knows nothing of hf_lopt. Prints JSON."""

import json
import sys

import torch
import transformers  # noqa: F401  (the pickle names classes of it)


args = torch.load(sys.argv[1], weights_only=False)
assert "hf_lopt" not in sys.modules
json.dump(
    {
        "optim": args.optim,
        "type": type(args.optim).__name__,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler_type,
        "as_dict": args.to_dict()["optim"],
    },
    sys.stdout,
)
