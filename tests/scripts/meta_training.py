"""Run on each rank: a meta-training of a configuration (JSON), in a folder, up to an outer step."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_lopt.meta import config  # noqa: E402
from hf_lopt.meta.train import Trainer  # noqa: E402
from ranks import leave  # noqa: E402


torch.set_num_threads(1)
dist.init_process_group("gloo")
path, folder, until = sys.argv[1:]
trainer = Trainer(config.from_dict(json.loads(Path(path).read_text())), folder)
assert len(trainer.search.estimators) == 1
trainer.run(until=int(until))
leave()
