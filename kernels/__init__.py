"""One file per operation of the model: tensors in, tensors out, independent of the engine.

Every operation is *row-invariant*: a row's result has the same bits whatever other rows are in the call, if the call
has at least `row_floor` rows (see `linear`). The engine's promise that a request's bytes do not depend on its batch
rests on this, and tests check it for every file here.
"""

__version__ = "0.0.0"
