"""Which index is which kind of expert."""

from __future__ import annotations

from moepp_ds.kinds import ExpertKinds


def test_index_order_is_ffn_constant_copy_zero() -> None:
    # 3 FFN are 0 1 2, 2 constant are 3 4, one copy is 5, 4 zero are 6 7 8 9: ten in all, seven of them
    # compute nothing.
    kinds = ExpertKinds(num_ffn=3, num_constant=2, num_copy=1, num_zero=4)
    assert kinds.total == 10
    assert kinds.num_zero_computation == 7
    ranges = {kind: list(range(10))[indices] for kind, indices in kinds.slices().items()}
    assert ranges == {"ffn": [0, 1, 2], "constant": [3, 4], "copy": [5], "zero": [6, 7, 8, 9]}
    assert list(ranges) == ["ffn", "constant", "copy", "zero"]


def test_a_kind_without_experts_has_an_empty_range() -> None:
    vanilla = ExpertKinds(num_ffn=2, num_constant=0, num_copy=0, num_zero=0)
    assert (vanilla.total, vanilla.num_zero_computation) == (2, 0)
    assert [len(range(2)[indices]) for indices in vanilla.slices().values()] == [2, 0, 0, 0]
    # With the copy expert absent, the zero expert follows the constant one.
    no_copy = ExpertKinds(num_ffn=2, num_constant=1, num_copy=0, num_zero=1)
    assert no_copy.slices()["zero"] == slice(3, 4)
