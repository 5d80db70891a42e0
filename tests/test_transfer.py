"""Several tensors in one copy."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.transfer import packed, read, unpacked

NUMBERS = {
    torch.int64: st.integers(-(2**53), 2**53),
    torch.float32: st.floats(width=32, allow_nan=False),
    torch.float64: st.floats(allow_nan=False),
}


@given(st.data())
def test_tensors_read_in_one_copy_are_unchanged(data: st.DataObject) -> None:
    tensors = []
    for dtype in data.draw(st.lists(st.sampled_from(list(NUMBERS)), min_size=1, max_size=4)):
        shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
        size = int(torch.tensor(shape).prod())
        numbers = data.draw(st.lists(NUMBERS[dtype], min_size=size, max_size=size))
        tensors.append(torch.tensor(numbers, dtype=dtype).view(shape))
    expected = [tensor.tolist() for tensor in tensors]
    assert unpacked(packed(tensors), tensors) == expected == read(*tensors)


def test_nan_and_infinity_survive_the_copy() -> None:
    bad = torch.tensor([torch.nan, torch.inf, 1.0])
    (found,) = unpacked(packed([bad]), [bad])
    assert found[0] != found[0] and found[1:] == [torch.inf, 1.0]
