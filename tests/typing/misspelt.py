"""A user's file in which a type checker has to find one error per marked line, of the kind that the mark names."""

import torch
from torch import nn

import hf_lopt


model = nn.Linear(8, 1)

hf_lopt.VeLO(model.parameters(), num_trainig_steps=100)  # error: call-arg
hf_lopt.VeLO(model.parameters(), num_training_steps="100")  # error: arg-type
hf_lopt.Celo(model.parameters(), bank_scale=1.0)  # error: call-arg
hf_lopt.CeloAdam(model.parameters(), axis_order="tf")  # error: arg-type
hf_lopt.SmallFC(model.parameters(), lr="fast")  # error: arg-type
hf_lopt.MuLO(model)  # error: arg-type
hf_lopt.Celo2(model.parameters(), branch="muon")  # error: arg-type
hf_lopt.RNNMLP(model.parameters(), weights=3)  # error: arg-type
hf_lopt.ELO(model.parameters(), orthogonalize=True)  # error: call-arg
optimizer = hf_lopt.ELOCelo2(model.parameters(), ns_dtype="float16")  # error: arg-type
hf_lopt.LearnedOptimizer(model.parameters())  # error: call-arg
optimizer.step("loss")  # error: call-overload
optimizer.observe_loss([torch.ones(())])  # error: arg-type
hf_lopt.VELO(model.parameters())  # error: attr-defined
