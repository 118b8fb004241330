import math
from datetime import date, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.training import reward_wire

SCALARS = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text() | st.binary()
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())


@given(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
        max_leaves=20,
    )
)
def test_what_goes_in_comes_out(value):
    line = reward_wire.dumps(value)
    assert line.count(b"\n") == 1
    got = reward_wire.loads(line)
    assert got == value
    assert repr(got) == repr(value)  # 1, 1.0 and True are equal but not the same


def test_rare_kinds():
    value = {"!tuple": [1], "set": {3, 1}, "day": date(2024, 2, 29), "at": datetime(2024, 2, 29, 1, 2, 3)}
    assert reward_wire.loads(reward_wire.dumps(value)) == value
    assert reward_wire.loads(reward_wire.dumps([{"!tuple": [1, 2]}])) == [{"!tuple": [1, 2]}]
    assert math.isnan(reward_wire.loads(reward_wire.dumps([math.nan]))[0])
    assert reward_wire.loads(reward_wire.dumps([np.int64(3), np.float32(0.5), np.bool_(True)])) == [3, 0.5, True]


def test_what_is_no_data_is_named_with_its_place():
    with pytest.raises(TypeError, match=r"`row.images\[1\]` is a object"):
        reward_wire.dumps({"row": {"images": ["x", object()]}})
