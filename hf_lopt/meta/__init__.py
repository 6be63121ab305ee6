"""Making meta-weights: construction, distillation and meta-training."""
