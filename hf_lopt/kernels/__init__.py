"""The operators of a step: their arguments, schemas, plain kernels, and the choice between these and compiled ones."""
