"""One step of a learned optimizer over a list of tensors: what the rules are put together from."""
