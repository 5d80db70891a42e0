"""One file per operation of the model: tensors in, tensors out, nothing of the engine.

Every operation is *row-invariant*: a row's result is the same to the last bit whatever other rows are in the call, as
long as a call has at least `row_floor` rows (see `linear`). The engine's promise that a request's bytes do not depend
on its batch rests on this; the tests hold every file here to it.
"""

__version__ = "0.0.0"
