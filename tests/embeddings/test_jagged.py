"""The jagged and keyed tensors against literals, against nested lists, and against torchrec where it is installed."""

import copy
import io
import pickle

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.nn.functional import embedding_bag

from embeddings.jagged import JaggedTensor, KeyedJaggedTensor, KeyedTensor

INTEGERS = [torch.int32, torch.int64]
#         bag 0  bag 1  bag 2
# user    7 8    -      9
# item    1      2      3 4
KEYS, VALUES, LENGTHS, OFFSETS = ["user", "item"], [7, 8, 9, 1, 2, 3, 4], [2, 0, 1, 1, 1, 2], [0, 2, 2, 3, 4, 5, 7]
WEIGHTS = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


def batch(**changes) -> KeyedJaggedTensor:
    defaults = {"keys": KEYS, "values": torch.tensor(VALUES), "weights": torch.tensor(WEIGHTS)}
    return KeyedJaggedTensor(**(defaults | {"lengths": torch.tensor(LENGTHS)} | changes))


def user(**changes) -> JaggedTensor:
    defaults = {"values": torch.tensor([7, 8, 9]), "weights": torch.tensor([0.5, 1.0, 1.5])}
    return JaggedTensor(**(defaults | {"lengths": torch.tensor([2, 0, 1])} | changes))


def pooled(**changes) -> KeyedTensor:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    return KeyedTensor(**({"keys": KEYS, "length_per_key": [1, 2], "values": values} | changes))


def lists(tensors) -> list:
    return [None if tensor is None else tensor.tolist() for tensor in tensors]


def bags(jt: JaggedTensor) -> list[list]:
    """Read in the plainest way, through the offsets."""
    values, offsets = jt.values().tolist(), jt.offsets().tolist()
    return [values[offsets[b] : offsets[b + 1]] for b in range(len(offsets) - 1)]


def nested(kjt: KeyedJaggedTensor) -> list[tuple[str, list[list]]]:
    """(key, bags) of every key, without to_dict, which has one entry for a repeated key."""
    values, offsets, stride = kjt.values().tolist(), kjt.offsets().tolist(), kjt.stride()
    all_bags = [values[offsets[i] : offsets[i + 1]] for i in range(len(offsets) - 1)]
    return [(key, all_bags[f * stride : (f + 1) * stride]) for f, key in enumerate(kjt.keys())]


def build(rows: list[tuple[str, list[list[int]]]], stride: int, weighted: bool, dtype: torch.dtype = torch.int64):
    """The inverse of `nested`; a weight is half its value."""
    values = torch.tensor([value for _, row in rows for bag in row for value in bag], dtype=torch.int64)
    lengths = torch.tensor([len(bag) for _, row in rows for bag in row], dtype=dtype)
    return KeyedJaggedTensor([key for key, _ in rows], values, values / 2 if weighted else None, lengths, stride=stride)


@st.composite
def batches(draw, min_keys: int = 0):
    """(rows, stride, weighted, dtype), empty ones included."""
    stride = draw(st.integers(0, 4))
    row = st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=stride, max_size=stride)
    rows = draw(st.lists(row, min_size=min_keys, max_size=4))
    rows = [(f"f{f}", row) for f, row in enumerate(rows)]
    return rows, stride, draw(st.booleans()), draw(st.sampled_from(INTEGERS))


# JaggedTensor


@pytest.mark.parametrize("dtype", INTEGERS)
def test_lengths_and_offsets_are_made_of_each_other_once_in_the_dtype_given(dtype):
    jt = user(lengths=torch.tensor([2, 0, 1], dtype=dtype))
    assert jt.offsets_or_none() is None
    assert jt.offsets().tolist() == [0, 2, 2, 3] and jt.offsets().dtype == dtype
    assert jt.offsets_or_none() is jt.offsets()
    jt = user(lengths=None, offsets=torch.tensor([0, 2, 2, 3], dtype=dtype))
    assert jt.lengths_or_none() is None
    assert jt.lengths().tolist() == [2, 0, 1] and jt.lengths().dtype == dtype
    assert jt.lengths_or_none() is jt.lengths()


def test_jagged_tensor_keeps_the_tensors_it_is_given():
    values, weights, lengths, offsets = (torch.tensor(x) for x in ([5, 6], [1.0, 2.0], [0, 2], [0, 0, 2]))
    jt = JaggedTensor(values, weights, lengths, offsets)
    assert jt.values() is values and jt.weights() is weights and jt.weights_or_none() is weights
    assert jt.lengths() is lengths and jt.offsets() is offsets


def test_weights_raise_where_there_are_none():
    assert user(weights=None).weights_or_none() is None
    with pytest.raises(ValueError, match="JaggedTensor has no weights"):
        user(weights=None).weights()
    with pytest.raises(ValueError, match="KeyedJaggedTensor has no weights"):
        batch(weights=None).weights()


def test_from_dense_concatenates_the_bags():
    jt = JaggedTensor.from_dense([torch.tensor([1.0]), torch.tensor([]), torch.tensor([7.0, 8.0])])
    assert jt.values().tolist() == [1.0, 7.0, 8.0] and jt.weights_or_none() is None
    assert jt.lengths().tolist() == [1, 0, 2] and jt.lengths().dtype == torch.int32
    jt = JaggedTensor.from_dense([torch.ones(1, 2), torch.zeros(2, 2)], [torch.tensor([3.0]), torch.tensor([4.0, 5.0])])
    assert jt.values().tolist() == [[1, 1], [0, 0], [0, 0]] and jt.weights().tolist() == [3, 4, 5]


def test_from_dense_refuses_no_bags_and_weights_of_other_lengths():
    with pytest.raises(ValueError, match="one tensor or more, got none"):
        JaggedTensor.from_dense([])
    with pytest.raises(ValueError, match=r"weights must have lengths \[1, 2\] as values do, got \[2, 1\]"):
        JaggedTensor.from_dense([torch.ones(1), torch.ones(2)], [torch.ones(2), torch.ones(1)])


def test_from_dense_lengths_takes_the_first_values_of_each_row():
    values, lengths = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([1, 0, 3])
    jt = JaggedTensor.from_dense_lengths(values, lengths, values / 2)
    assert bags(jt) == [[1], [], [7, 8, 9]] and jt.weights().tolist() == [0.5, 3.5, 4.0, 4.5]
    assert jt.lengths() is lengths
    jt = JaggedTensor.from_dense_lengths(torch.arange(8).view(2, 2, 2), torch.tensor([1, 2]))
    assert jt.values().tolist() == [[0, 1], [4, 5], [6, 7]] and jt.weights_or_none() is None


def test_from_dense_lengths_refuses_what_does_not_fit_the_rows():
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"shapes \[B, L, ...\] and \[B\], got \[2, 3\] and \[1\]"):
        JaggedTensor.from_dense_lengths(rows, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"got \[3\] and \[3\]"):
        JaggedTensor.from_dense_lengths(torch.zeros(3), torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match=r"weights must have shape \[2, 3\], got \[2\]"):
        JaggedTensor.from_dense_lengths(rows, torch.tensor([1, 1]), torch.zeros(2))
    with pytest.raises(ValueError, match="lengths must sum to the number of values, 4, got 5"):
        JaggedTensor.from_dense_lengths(rows, torch.tensor([4, 1]))


def test_to_dense_gives_the_bags_as_views():
    jt = user()
    assert lists(jt.to_dense()) == [[7, 8], [], [9]] and lists(jt.to_dense_weights()) == [[0.5, 1.0], [], [1.5]]
    assert jt.to_dense()[2].data_ptr() == jt.values()[2:].data_ptr()
    assert user(weights=None).to_dense_weights() is None
    rows = JaggedTensor(torch.tensor([[1, 2], [3, 4]]), offsets=torch.tensor([0, 0, 2]))
    assert lists(rows.to_dense()) == [[], [[1, 2], [3, 4]]]


def test_padded_dense_cuts_and_pads():
    jt = user()
    assert jt.to_padded_dense().tolist() == [[7, 8], [0, 0], [9, 0]]
    assert jt.to_padded_dense(1).tolist() == [[7], [0], [9]]
    assert jt.to_padded_dense(3, padding_value=-1).tolist() == [[7, 8, -1], [-1, -1, -1], [9, -1, -1]]
    assert jt.to_padded_dense().dtype == torch.int64
    assert jt.to_padded_dense(0).shape == (3, 0)
    assert jt.to_padded_dense_weights(2, 9.0).tolist() == [[0.5, 1.0], [9.0, 9.0], [1.5, 9.0]]
    assert user(weights=None).to_padded_dense_weights() is None
    rows = JaggedTensor(torch.tensor([[1, 2], [3, 4]]), offsets=torch.tensor([0, 0, 2]))
    assert rows.to_padded_dense().tolist() == [[[0, 0], [0, 0]], [[1, 2], [3, 4]]]
    with pytest.raises(ValueError, match="desired_length must not be negative, got -1"):
        jt.to_padded_dense(-1)


def test_padded_dense_gives_each_value_its_gradient_and_the_cut_ones_none():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    (user(values=values).to_padded_dense(1) * torch.tensor([[2.0], [3.0], [5.0]])).sum().backward()
    assert values.grad.tolist() == [2.0, 0.0, 5.0]


@given(batches(min_keys=1), st.one_of(st.none(), st.integers(0, 4)))
def test_every_key_pads_as_a_loop_over_its_bags_does(drawn, length):
    rows, stride, weighted, dtype = drawn
    for key, row in rows:
        jt = build(rows, stride, weighted, dtype)[key]
        width = max([len(bag) for bag in row], default=0) if length is None else length
        expected = [(bag + [-1] * width)[:width] for bag in row]
        assert jt.to_padded_dense(length, -1).tolist() == expected
        assert jt.to_padded_dense(length, -1).shape == (stride, width)
        assert lists(jt.to_dense()) == row


# KeyedJaggedTensor


def test_keyed_jagged_tensor_says_what_it_holds():
    kjt = batch()
    assert kjt.keys() == KEYS and kjt.values().tolist() == VALUES and kjt.weights().tolist() == WEIGHTS
    assert kjt.lengths().tolist() == LENGTHS and kjt.offsets().tolist() == OFFSETS
    assert kjt.stride() == 3 and kjt.stride_per_key() == [3, 3] and kjt.variable_stride_per_key() is False
    assert kjt.length_per_key() == [3, 4] and kjt.offset_per_key() == [0, 3, 7]
    assert kjt.device() == torch.device("cpu")
    by_offsets = batch(lengths=None, offsets=torch.tensor(OFFSETS, dtype=torch.int32), stride=3)
    assert by_offsets.stride() == 3 and by_offsets.length_per_key() == [3, 4]
    assert by_offsets.lengths().tolist() == LENGTHS and by_offsets.lengths().dtype == torch.int32


def test_a_key_looks_up_its_bags_as_views():
    kjt = batch()
    item = kjt["item"]
    assert bags(item) == [[1], [2], [3, 4]] and item.weights().tolist() == [2.0, 2.5, 3.0, 3.5]
    assert item.lengths().tolist() == [1, 1, 2] and item.offsets().tolist() == [0, 1, 2, 4]
    assert item.values().data_ptr() == kjt.values()[3:].data_ptr()
    assert batch(weights=None)["user"].weights_or_none() is None


def test_an_unknown_key_is_named_beside_the_keys_there_are():
    for thing in (batch(), pooled()):
        with pytest.raises(KeyError, match=r"no key 'price'; the keys are \['user', 'item'\]"):
            thing["price"]


def test_to_dict_splits_by_key():
    jts = batch().to_dict()
    assert list(jts) == KEYS
    assert bags(jts["user"]) == [[7, 8], [], [9]] and jts["user"].weights().tolist() == [0.5, 1.0, 1.5]
    assert bags(jts["item"]) == [[1], [2], [3, 4]] and jts["item"].weights().tolist() == [2.0, 2.5, 3.0, 3.5]
    assert jts["item"].lengths().tolist() == [1, 1, 2] and jts["item"].offsets().tolist() == [0, 1, 2, 4]


def test_values_may_have_dimensions_of_their_own():
    values = torch.arange(14.0).view(7, 2)
    kjt = batch(values=values)
    assert torch.equal(kjt["item"].values(), values[3:]) and torch.equal(kjt.to_dict()["user"].values(), values[:3])
    assert torch.equal(kjt.permute([1, 0]).values(), torch.cat([values[3:], values[:3]]))
    assert kjt.split([0, 2])[0].values().shape == (0, 2) and kjt.permute([]).values().shape == (0, 2)
    assert KeyedJaggedTensor.empty_like(kjt).values().shape == (0, 2)


def test_split_divides_keys():
    first, none, second = batch().split([1, 0, 1])
    assert nested(first) == [("user", [[7, 8], [], [9]])] and first.weights().tolist() == [0.5, 1.0, 1.5]
    assert nested(second) == [("item", [[1], [2], [3, 4]])] and second.length_per_key() == [4]
    assert none.keys() == [] and none.stride() == 3 and none.weights().tolist() == [] and none.to_dict() == {}
    (whole,) = batch().split([2])
    assert nested(whole) == nested(batch()) and whole.offset_per_key() == [0, 3, 7]


@pytest.mark.parametrize("segments", [[1], [1, 2], [3, -1], []])
def test_split_refuses_segments_that_do_not_divide_the_keys(segments):
    with pytest.raises(ValueError, match=rf"segments must divide the 2 keys, got \[{str(segments)[1:-1]}\]"):
        batch().split(segments)


def test_permute_reorders_drops_and_repeats_keys():
    swapped = batch().permute([1, 0])
    assert nested(swapped) == [("item", [[1], [2], [3, 4]]), ("user", [[7, 8], [], [9]])]
    assert swapped.weights().tolist() == [2.0, 2.5, 3.0, 3.5, 0.5, 1.0, 1.5] and swapped.length_per_key() == [4, 3]
    repeated = batch().permute([1, 1])
    assert repeated.keys() == ["item", "item"] and repeated.values().tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert bags(repeated["item"]) == [[1], [2], [3, 4]]
    nothing = batch().permute([])
    assert nothing.keys() == [] and nothing.values().tolist() == [] and nothing.stride() == 3


@pytest.mark.parametrize("index", [-1, 2])
def test_permute_refuses_an_index_without_a_key(index):
    with pytest.raises(ValueError, match=rf"indices must be 0 to 1, got \[0, {index}\]"):
        batch().permute([0, index])


def test_flatten_lengths_keeps_all_but_the_offsets():
    flat = batch(lengths=None, offsets=torch.tensor(OFFSETS)).sync().flatten_lengths()
    assert flat.lengths().tolist() == LENGTHS and flat.offsets_or_none() is None
    assert nested(flat) == nested(batch()) and flat.weights().tolist() == WEIGHTS and flat.length_per_key() == [3, 4]


def test_concat_puts_the_keys_of_all_in_a_row():
    price = build([("price", [[5], [], [6, 6]])], 3, weighted=True)
    joined = KeyedJaggedTensor.concat([batch(), price])
    assert nested(joined) == nested(batch()) + [("price", [[5], [], [6, 6]])]
    assert joined.weights().tolist() == [*WEIGHTS, 2.5, 3.0, 3.0] and joined.length_per_key() == [3, 4, 3]
    assert KeyedJaggedTensor.concat([batch().sync(), price]).offset_per_key() == [0, 3, 7, 10]
    assert KeyedJaggedTensor.concat([batch().sync(), price.sync()]).offset_per_key() == [0, 3, 7, 10]


def test_concat_refuses_what_does_not_stand_in_one_row():
    other = build([("price", [[5], [], [6, 6]])], 3, weighted=True)
    with pytest.raises(ValueError, match="one KeyedJaggedTensor or more to concatenate, got none"):
        KeyedJaggedTensor.concat([])
    with pytest.raises(ValueError, match=r"strides must be equal, got \[3, 1\]"):
        KeyedJaggedTensor.concat([other, build([("age", [[5]])], 1, weighted=True)])
    with pytest.raises(ValueError, match="all or none must have weights, got 1 of 2"):
        KeyedJaggedTensor.concat([batch(weights=None), other])
    with pytest.raises(ValueError, match=r"keys must be distinct, got \['item', 'user'\] repeated"):
        KeyedJaggedTensor.concat([batch(), batch()])


def test_from_jt_dict_is_the_inverse_of_to_dict():
    kjt = KeyedJaggedTensor.from_jt_dict(batch().to_dict())
    assert nested(kjt) == nested(batch()) and kjt.weights().tolist() == WEIGHTS and kjt.stride() == 3
    with pytest.raises(ValueError, match=r"strides must be equal, got \[3, 0\] for keys \[\['a'\], \['b'\]\]"):
        KeyedJaggedTensor.from_jt_dict({"a": user(), "b": JaggedTensor.empty(is_weighted=True)})
    with pytest.raises(ValueError, match="all or none must have weights"):
        KeyedJaggedTensor.from_jt_dict({"a": user(), "b": user(weights=None)})
    with pytest.raises(ValueError, match="got none"):
        KeyedJaggedTensor.from_jt_dict({})


def test_sync_reads_the_lengths_once_and_unsync_forgets():
    lengths = torch.tensor(LENGTHS)
    kjt = batch(lengths=lengths)
    assert kjt.sync() is kjt
    lengths[0], lengths[3] = 1, 2  # a caller's fault, which tells what was kept from what is read
    assert kjt.length_per_key() == [3, 4]
    assert kjt.unsync() is kjt and kjt.length_per_key() == [2, 5]


def test_sync_constructors_take_lengths_or_offsets():
    values, weights = torch.tensor(VALUES), torch.tensor(WEIGHTS)
    for kjt in (
        KeyedJaggedTensor.from_lengths_sync(KEYS, values, torch.tensor(LENGTHS), weights, stride=3),
        KeyedJaggedTensor.from_offsets_sync(KEYS, values, torch.tensor(OFFSETS), weights, stride=3),
    ):
        assert kjt._length_per_key == [3, 4] and nested(kjt) == nested(batch()) and kjt.weights() is weights


@given(batches(), st.data())
def test_split_permute_concat_and_dicts_agree_with_nested_lists(drawn, data):
    rows, stride, weighted, dtype = drawn
    kjt = build(rows, stride, weighted, dtype)
    assert nested(kjt) == rows and kjt.lengths().dtype == kjt.offsets().dtype == dtype
    assert kjt.stride() == stride and kjt.stride_per_key() == [stride] * len(rows)
    assert kjt.length_per_key() == [sum(map(len, row)) for _, row in rows]
    assert {key: bags(jt) for key, jt in kjt.to_dict().items()} == dict(rows)
    assert {key: bags(kjt[key]) for key in kjt.keys()} == dict(rows)
    cut = data.draw(st.integers(0, len(rows)))
    left, right = kjt.split([cut, len(rows) - cut])
    assert nested(left) == rows[:cut] and nested(right) == rows[cut:]
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6) if rows else st.just([]))
    permuted = kjt.permute(indices)
    assert nested(permuted) == [rows[i] for i in indices]
    results = [permuted, KeyedJaggedTensor.concat([left, right])]
    results += [KeyedJaggedTensor.from_jt_dict(kjt.to_dict())] if rows else []
    assert all(nested(result) == rows for result in results[1:])
    for result in [left, right, *results]:
        assert result.lengths().dtype == dtype and result.stride() == stride
        assert result.length_per_key() == copy.copy(result).unsync().length_per_key()
        if weighted:
            assert torch.equal(result.weights(), result.values() / 2)


# both, and KeyedTensor


def test_empty_has_no_bags_and_the_dtypes_asked_for():
    for kind in (JaggedTensor, KeyedJaggedTensor):
        plain = kind.empty()
        assert type(plain) is kind and plain.values().dtype == torch.float32 and plain.weights_or_none() is None
        assert plain.lengths().tolist() == [] and plain.offsets().tolist() == [0]
        assert plain.lengths().dtype == plain.offsets().dtype == torch.int32
        asked = kind.empty(True, "meta", torch.int64, torch.float16, torch.int64)
        assert asked.device() == torch.device("meta") and asked.values().shape == asked.weights().shape == (0,)
        dtypes = asked.values().dtype, asked.weights().dtype, asked.lengths().dtype
        assert dtypes == (torch.int64, torch.float16, torch.int64)
        with pytest.raises(ValueError, match="lengths must be torch.int32 or torch.int64, got torch.float32"):
            kind.empty(lengths_dtype=torch.float32)
    assert JaggedTensor.empty().to_dense() == [] and JaggedTensor.empty(True).to_dense_weights() == []
    assert JaggedTensor.empty().to_padded_dense().shape == (0, 0)
    assert JaggedTensor.empty().to_padded_dense(4).shape == (0, 4)


def test_a_batch_without_keys_answers_everything():
    kjt = KeyedJaggedTensor.empty(is_weighted=True)
    assert kjt.keys() == kjt.length_per_key() == kjt.stride_per_key() == [] and kjt.stride() == 0
    assert kjt.offset_per_key() == [0] and kjt.to_dict() == {} and kjt.split([]) == []
    for other in (kjt.permute([]), kjt.flatten_lengths(), kjt.split([0])[0], KeyedJaggedTensor.concat([kjt, kjt])):
        assert other.keys() == [] and other.values().shape == other.weights().shape == (0,) and other.stride() == 0


def test_a_batch_of_no_bags_answers_everything():
    kjt = KeyedJaggedTensor(
        KEYS, torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(0, dtype=torch.int32), stride=0
    )
    assert kjt.stride() == 0 and kjt.length_per_key() == [0, 0] and kjt.offset_per_key() == [0, 0, 0]
    assert nested(kjt) == [("user", []), ("item", [])] and list(kjt.to_dict()) == KEYS
    for jt in (kjt["item"], kjt.to_dict()["item"]):
        assert jt.lengths().tolist() == [] and jt.offsets().tolist() == [0] and jt.to_padded_dense(2).shape == (0, 2)


def test_empty_like_keeps_dtypes_and_stride():
    kjt = batch(lengths=None, offsets=torch.tensor(OFFSETS, dtype=torch.int32), weights=torch.ones(7).half())
    empty = KeyedJaggedTensor.empty_like(kjt)
    assert empty.keys() == [] and empty.stride() == 3 and empty.values().tolist() == empty.lengths().tolist() == []
    dtypes = empty.values().dtype, empty.weights().dtype, empty.lengths().dtype
    assert dtypes == (torch.int64, torch.float16, torch.int32)
    assert empty.values().untyped_storage().nbytes() == 0  # a slice would keep the batch alive
    assert KeyedJaggedTensor.empty_like(batch(weights=None), "meta").device() == torch.device("meta")
    assert KeyedJaggedTensor.empty_like(batch(weights=None)).weights_or_none() is None


def test_keyed_tensor_looks_up_by_name():
    kt = pooled()
    assert kt.keys() == KEYS and kt.key_dim() == 1 and kt.device() == torch.device("cpu")
    assert kt.length_per_key() == [1, 2] and kt.offset_per_key() == [0, 1, 3]
    assert kt["user"].tolist() == [[1.0], [4.0]] and kt["item"].tolist() == [[2.0, 3.0], [5.0, 6.0]]
    assert {key: value.tolist() for key, value in kt.to_dict().items()} == {key: kt[key].tolist() for key in KEYS}
    assert kt["item"].data_ptr() == kt.values()[:, 1:].data_ptr()


@pytest.mark.parametrize("key_dim", [0, -2])
def test_keyed_tensor_divides_the_dimension_it_is_told(key_dim):
    kt = KeyedTensor(["a", "b"], [2, 1], torch.arange(6).view(3, 2), key_dim)
    assert kt["a"].tolist() == [[0, 1], [2, 3]] and kt.to_dict()["b"].tolist() == [[4, 5]]
    assert KeyedTensor.regroup([kt], [["b", "a"]])[0].tolist() == [[4, 5], [0, 1], [2, 3]]


def test_keyed_tensor_of_tensors():
    kt = KeyedTensor.from_tensor_list(KEYS, [torch.tensor([[1], [4]]), torch.tensor([[2, 3], [5, 6]])])
    assert kt.values().tolist() == [[1, 2, 3], [4, 5, 6]] and kt.length_per_key() == [1, 2]
    kt = KeyedTensor.from_tensor_list(KEYS, [torch.tensor([[1, 4]]), torch.tensor([[2, 5], [3, 6]])], 0, 0)
    assert kt["item"].tolist() == [[2, 5], [3, 6]] and kt.key_dim() == 0
    with pytest.raises(ValueError, match="one tensor or more, got none"):
        KeyedTensor.from_tensor_list([], [])
    with pytest.raises(ValueError, match=r"sum to the 3 of dimension 1, got \[3, 3\]"):
        KeyedTensor.from_tensor_list(KEYS, [torch.zeros(2, 3)] * 2, key_dim=1, cat_dim=0)
    assert KeyedTensor([], [], torch.zeros(2, 0)).to_dict() == {}


def test_keyed_tensor_keeps_its_keys_whatever_becomes_of_the_callers():
    keys, lengths = list(KEYS), [1, 2]
    kt = pooled(keys=keys, length_per_key=lengths)
    keys.append("price"), lengths.append(1)
    assert kt.keys() == KEYS and kt.length_per_key() == [1, 2]


def test_regroup_collects_keys_of_many():
    other = KeyedTensor(["price"], [1], torch.tensor([[7.0], [8.0]]))
    groups = [["price", "item"], [], ["user", "price"]]
    expected = [[[7.0, 2.0, 3.0], [8.0, 5.0, 6.0]], [[], []], [[1.0, 7.0], [4.0, 8.0]]]
    assert lists(KeyedTensor.regroup([pooled(), other], groups)) == expected
    named = KeyedTensor.regroup_as_dict([pooled(), other], groups, ["x", "y", "z"])
    assert list(named) == ["x", "y", "z"] and lists(named.values()) == expected


def test_regroup_refuses_what_it_cannot_place():
    with pytest.raises(KeyError, match="no key 'price'"):
        KeyedTensor.regroup([pooled()], [["price"]])
    with pytest.raises(ValueError, match=r"keys of keyed_tensors must be distinct, got \['item', 'user'\] repeated"):
        KeyedTensor.regroup([pooled(), pooled()], [["user"]])
    with pytest.raises(ValueError, match=r"the same key_dim, got key_dim \[1, 0\]"):
        KeyedTensor.regroup([pooled(), KeyedTensor(["a"], [2], torch.zeros(2, 1), 0)], [["user"]])
    with pytest.raises(ValueError, match="keyed_tensors must be one or more"):
        KeyedTensor.regroup([], [])
    with pytest.raises(ValueError, match=r"keys must be one for each of 2 groups, got \['x'\]"):
        KeyedTensor.regroup_as_dict([pooled()], [["user"], ["item"]], ["x"])
    with pytest.raises(ValueError, match=r"keys must be distinct, got \['x'\] repeated"):
        KeyedTensor.regroup_as_dict([pooled()], [["user"], ["item"]], ["x", "x"])


def test_gradients_reach_what_was_pooled():
    left, right = (torch.zeros(2, size, requires_grad=True) for size in (1, 2))
    kt = KeyedTensor.from_tensor_list(KEYS, [left, right])
    (KeyedTensor.regroup([kt], [["item", "user"]])[0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert left.grad.tolist() == [[3.0], [3.0]] and right.grad.tolist() == [[1.0, 2.0], [1.0, 2.0]]


def test_bytes_are_those_of_the_tensors_there():
    assert user().size_in_bytes() == 3 * 8 + 3 * 4 + 3 * 8
    kjt = batch(lengths=torch.tensor(LENGTHS, dtype=torch.int32), weights=None)
    assert kjt.size_in_bytes() == 7 * 8 + 6 * 4
    kjt.offsets()
    assert kjt.size_in_bytes() == 7 * 8 + 6 * 4 + 7 * 4
    assert pooled().size_in_bytes() == 6 * 4


def test_repr_is_the_constructors_call():
    assert repr(user()) == (
        "JaggedTensor(values=tensor([7, 8, 9]), weights=tensor([0.5000, 1.0000, 1.5000]), lengths=tensor([2, 0, 1]))"
    )
    assert repr(batch(weights=None)).startswith("KeyedJaggedTensor(keys=['user', 'item'], values=tensor([7, 8, 9, 1,")
    assert repr(pooled()).startswith("KeyedTensor(keys=['user', 'item'], length_per_key=[1, 2], key_dim=1, values=")


def test_to_moves_every_tensor_and_keeps_what_sync_read():
    for thing in (user(), batch().sync(), pooled()):
        moved = thing.to("meta", non_blocking=True)
        assert type(moved) is type(thing) and moved.device() == torch.device("meta")
        for before, after in zip(thing._parts(), moved._parts(), strict=True):
            assert (after is None) if before is None else (after.is_meta and after.shape == before.shape)
        assert thing.device() == torch.device("cpu")
    kjt = batch().sync().to("meta")
    assert kjt.keys() == KEYS and kjt.length_per_key() == [3, 4] and kjt["item"].values().shape == (4,)
    assert KeyedJaggedTensor.empty_like(batch()).to("meta").stride() == 3
    kt = KeyedTensor(["a"], [2], torch.zeros(2, 1), 0).to("meta")
    assert kt.keys() == ["a"] and kt.length_per_key() == [2] and kt.key_dim() == 0


def test_to_takes_a_dtype_for_the_weights_alone():
    kjt = batch()
    half = kjt.to("cpu", dtype=torch.float16)
    assert half.weights().dtype == torch.float16 and half.weights().tolist() == WEIGHTS
    assert half.values().dtype == half.lengths().dtype == torch.int64 and kjt.weights().dtype == torch.float32
    assert batch(weights=None).to("cpu", dtype=torch.float16).weights_or_none() is None


class Spy(torch.Tensor):
    """Counts what only a GPU does."""

    def to(self, device, non_blocking=False):
        return self + 10 if non_blocking else self

    def pin_memory(self):
        return self + 100

    def record_stream(self, stream):
        stream.append(self.tolist())


def test_what_only_a_gpu_does_reaches_every_tensor():
    jt = user(values=torch.tensor([7, 8, 9]).as_subclass(Spy), lengths=torch.tensor([2, 0, 1]).as_subclass(Spy))
    jt = JaggedTensor._of([jt.values(), None, jt.lengths(), None])
    assert lists(jt.pin_memory()._parts()) == [[107, 108, 109], None, [102, 100, 101], None]
    assert lists(jt.to("cuda", non_blocking=True)._parts()) == [[17, 18, 19], None, [12, 10, 11], None]
    assert lists(jt.to("cuda")._parts()) == [[7, 8, 9], None, [2, 0, 1], None]
    stream = []
    jt.record_stream(stream)
    assert stream == [[7, 8, 9], [2, 0, 1]]
    values = torch.tensor(VALUES).as_subclass(Spy)
    kjt = KeyedJaggedTensor._of([values, None, None, torch.tensor(OFFSETS).as_subclass(Spy)], KEYS, None, [3, 4])
    assert kjt.pin_memory().length_per_key() == [3, 4] and kjt.pin_memory().values().tolist()[0] == 107
    kt = KeyedTensor(["a"], [2], torch.tensor([[1, 2]]).as_subclass(Spy))
    assert kt.pin_memory()["a"].tolist() == [[101, 102]]


def test_nothing_changes_the_tensors_of_the_caller():
    parts = [torch.tensor(x) for x in (VALUES, WEIGHTS, LENGTHS, OFFSETS)]
    before = [tensor.clone() for tensor in parts]
    keys = list(KEYS)
    kjt = KeyedJaggedTensor(keys, *parts)
    kjt.permute([1, 0]), kjt.split([1, 1]), kjt.to_dict(), KeyedJaggedTensor.concat([kjt]), kjt.flatten_lengths()
    kjt["item"].to_padded_dense(3, 5), kjt.to("cpu", dtype=torch.float16), KeyedJaggedTensor.from_jt_dict(kjt.to_dict())
    assert all(torch.equal(now, then) for now, then in zip(parts, before, strict=True)) and keys == KEYS
    keys.append("price")
    assert kjt.keys() == KEYS


def test_copies_and_safe_loads_are_equal():
    saved = io.BytesIO()
    torch.save([user(), batch().sync(), pooled()], saved)
    saved.seek(0)
    for loaded in (
        torch.load(saved, weights_only=True),
        pickle.loads(pickle.dumps([user(), batch().sync(), pooled()])),
        copy.deepcopy([user(), batch().sync(), pooled()]),
    ):
        assert bags(loaded[0]) == bags(user()) and nested(loaded[1]) == nested(batch())
        assert loaded[1]._length_per_key == [3, 4] and torch.equal(loaded[2]["item"], pooled()["item"])


# what is refused


NOTHING = {"values": torch.zeros(0), "weights": None, "lengths": torch.zeros(0, dtype=torch.int64)}
BAD_PARTS = {
    "values must have shape": {"values": torch.tensor(1)},
    r"weights must be one for each of 3 values, got shape \[2\]": {"weights": torch.ones(2)},
    r"weights must be one for each of 3 values, got shape \[\]": {"weights": torch.tensor(1.0)},
    "lengths or offsets must be given, got None for both": {"lengths": None},
    "lengths must be torch.int32 or torch.int64, got torch.float32": {"lengths": torch.tensor([2.0, 0.0, 1.0])},
    "lengths must be torch.int32 or torch.int64, got torch.int16": {"lengths": torch.tensor([3], dtype=torch.int16)},
    "offsets must be torch.int32 or torch.int64, got torch.float64": {"offsets": torch.zeros(4).double()},
    r"lengths must have one dimension, got shape \[1, 3\]": {"lengths": torch.tensor([[2, 0, 1]])},
    r"offsets must have one dimension, got shape \[1, 2\]": {"lengths": None, "offsets": torch.tensor([[0, 3]])},
    "offsets must begin with 0, got none": {"lengths": None, "offsets": torch.tensor([], dtype=torch.int64)},
    "offsets must be one more than the 3 lengths, got 3": {"offsets": torch.tensor([0, 2, 3])},
}
BAD_NUMBERS = {
    "lengths must not be negative, got -1": {"lengths": torch.tensor([2, -1, 2])},
    "lengths must sum to the number of values, 3, got 4": {"lengths": torch.tensor([2, 1, 1])},
    "lengths must sum to the number of values, 3, got 0": {"lengths": torch.zeros(2, dtype=torch.int32)},
    "number of values, 3, got 18446744073709551619": {"lengths": torch.tensor([2**63 - 1, 2**63 - 1, 5])},
    "offsets must begin with 0 and end with the number of values, 3, got 1 and 3": {
        "offsets": torch.tensor([1, 1, 1, 3])
    },
    "offsets must begin with 0 and end with the number of values, 3, got 0 and 2": {
        "offsets": torch.tensor([0, 2, 2, 2])
    },
    r"offsets must not descend, got \[2, 1\] for bag 1": {"offsets": torch.tensor([0, 2, 1, 3])},
    r"not descend, got \[2147483647, -5\] for bag 1": {
        "offsets": torch.tensor([0, 2**31 - 1, -5, 3], dtype=torch.int32)
    },
    r"steps between offsets, got length 0 and offsets \[2, 3\] for bag 1": {"offsets": torch.tensor([0, 2, 3, 3])},
}


@pytest.mark.parametrize("message", BAD_PARTS | BAD_NUMBERS)
def test_what_is_not_cut_into_bags_is_refused(message):
    changes = (BAD_PARTS | BAD_NUMBERS)[message]
    with pytest.raises(ValueError, match=message):
        user(**changes)
    parts = {"values": torch.tensor([7, 8, 9]), "weights": None, "lengths": torch.tensor([2, 0, 1])} | changes
    with pytest.raises(ValueError, match=message):
        KeyedJaggedTensor(["user"], **parts)


@pytest.mark.parametrize("message", BAD_NUMBERS)
def test_numbers_that_cannot_be_read_without_waiting_are_not(message):
    changes = {name: tensor.to("meta") for name, tensor in BAD_NUMBERS[message].items()}
    assert user(**changes).values().tolist() == [7, 8, 9]
    with FakeTensorMode():
        assert JaggedTensor(torch.empty(3), lengths=torch.tensor([2, 2, 2])).offsets().shape == (4,)


@pytest.mark.parametrize("message", BAD_PARTS)
def test_shapes_and_dtypes_are_checked_on_every_device(message):
    changes = {name: None if tensor is None else tensor.to("meta") for name, tensor in BAD_PARTS[message].items()}
    with pytest.raises(ValueError, match=message):
        user(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keys": ["a", "b", "c", "d"]}, "number of lengths must be a multiple of the 4 keys, got 6"),
        ({"keys": []}, "number of lengths must be a multiple of the 0 keys, got 6"),
        ({"keys": ["user", "user"]}, r"keys must be distinct, got \['user'\] repeated"),
        ({"keys": [], "stride": -1} | NOTHING, "stride must be that of 0 lengths by 0 keys, got -1"),
        ({"stride": 2}, "stride must be that of 6 lengths by 2 keys, got 2"),
        ({"stride": -3}, "stride must be that of 6 lengths by 2 keys, got -3"),
        ({"lengths": None, "offsets": torch.tensor([0, 1, 5, 7])}, "multiple of the 2 keys, got 3"),
    ],
)
def test_keys_that_do_not_divide_the_lengths_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        batch(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keys": ["a", "a"]}, r"keys must be distinct, got \['a'\] repeated"),
        ({"key_dim": 2}, r"key_dim must be a dimension of values, of shape \[2, 3\], got 2"),
        ({"key_dim": -3}, r"key_dim must be a dimension of values, of shape \[2, 3\], got -3"),
        ({"length_per_key": [3]}, r"one length for each of \['user', 'item'\], got \[3\]"),
        ({"length_per_key": [1, 1]}, r"must sum to the 3 of dimension 1, got \[1, 1\]"),
        ({"length_per_key": [4, -1]}, r"must sum to the 3 of dimension 1, got \[4, -1\]"),
        ({"key_dim": 0}, r"must sum to the 2 of dimension 0, got \[1, 2\]"),
    ],
)
def test_keyed_tensor_refuses_keys_that_do_not_divide_it(changes, message):
    with pytest.raises(ValueError, match=message):
        pooled(**changes)


def test_lengths_on_the_meta_device_cannot_be_divided_by_key():
    with pytest.raises(NotImplementedError):
        batch().to("meta").to_dict()


# pytrees, torch.compile, torch.export


@pytest.mark.parametrize("make", [user, batch, pooled, lambda: KeyedJaggedTensor.empty_like(batch())])
def test_flatten_and_unflatten_give_the_same(make):
    thing = make()
    leaves, spec = pytree.tree_flatten(thing)
    back = pytree.tree_unflatten(leaves, spec)
    assert type(back) is type(thing) and all(a is b for a, b in zip(back._parts(), thing._parts(), strict=True))
    assert back._context() == thing._context()
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(thing)[0]]
    assert paths == [f".{name}" for name in thing.NAMES]
    doubled = pytree.tree_map(lambda leaf: None if leaf is None else leaf * 2, thing)
    assert doubled.values().tolist() == (thing.values() * 2).tolist()


def compiled(function):
    """The function in one graph, and the counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(function, backend=counter, fullgraph=True), counter


LENGTHS_OF_MANY = [
    [2, 0, 1, 1, 1, 2],
    [1, 1, 0, 0, 3, 1],
    [0, 0, 0, 0, 0, 0],
    [0, 0, 4, 0, 0, 0],
    [3, 1, 1, 2, 2, 2, 0, 5],
]


def many(lengths: list[int]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(KEYS, torch.arange(sum(lengths)), torch.arange(sum(lengths)) / 2, torch.tensor(lengths))


def unchecked(lengths: list[int]) -> KeyedJaggedTensor:
    """Four values, whatever the lengths say, as from a device, where they are not read."""
    return KeyedJaggedTensor._of([torch.arange(4), torch.arange(4) / 2, torch.tensor(lengths), None], KEYS, None)


def test_compiled_lookup_reads_the_lengths_of_each_batch():
    total, counter = compiled(lambda kjt: kjt.to_dict()["item"].values().sum())
    for lengths in LENGTHS_OF_MANY:
        half = len(lengths) // 2
        assert total(many(lengths)).item() == sum(range(sum(lengths[:half]), sum(lengths)))
    assert counter.frame_count <= 4  # static, no values, and then with as many values and bags as may come


@pytest.mark.slow
def test_inductor_slices_by_lengths_it_does_not_know():
    torch._dynamo.reset()
    both = torch.compile(lambda kjt: (kjt["item"].values() * 2, kjt["user"].values() * 3), fullgraph=True)
    assert lists(both(batch())) == [[2, 4, 6, 8], [21, 24, 27]]
    assert lists(both(many([0, 1, 1, 2]))) == [[2, 4, 6], [0]]
    with pytest.raises(RuntimeError, match="u0 [+] u1"):  # torch's words for the sum of two keys' lengths
        both(unchecked([0, 1, 1, 1]))


def test_compiled_lookup_takes_a_synced_batch():
    total, _ = compiled(lambda kjt: kjt.to_dict()["item"].values().sum())
    assert total(batch().sync()).item() == 10 and total(many([5, 1, 2, 2]).sync()).item() == 6 + 7 + 8 + 9


def test_compiled_functions_take_and_return_all_three():
    def through(kjt, jt, kt):
        swapped = kjt.permute([1, 0])
        doubled = JaggedTensor(jt.values() * 2, lengths=jt.lengths())
        joined = KeyedJaggedTensor.concat([kjt, KeyedJaggedTensor.from_jt_dict({"price": jt})])
        parts = swapped.split([1, 1])
        return parts, doubled, joined, KeyedTensor.from_tensor_list(["x"], [kt["item"] + 1]), kjt.to("cpu").unsync()

    run, _ = compiled(through)
    parts, doubled, joined, kt, moved = run(batch(), user(), pooled())
    assert [nested(part) for part in parts] == [[row] for row in nested(batch())[::-1]]
    assert bags(doubled) == [[14, 16], [], [18]] and kt["x"].tolist() == [[3.0, 4.0], [6.0, 7.0]]
    assert nested(joined) == nested(batch()) + [("price", bags(user()))] and joined.length_per_key() == [3, 4, 3]
    assert nested(moved) == nested(batch())


class Pooling(nn.Module):
    """Sums of rows by key, of different sizes."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ParameterDict(
            {"user": torch.arange(60.0).view(30, 2), "item": -torch.arange(30.0).view(30, 1)}
        )

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        sums = [
            embedding_bag(jt.values(), self.tables[key], jt.offsets(), mode="sum", include_last_offset=True)
            for key, jt in kjt.to_dict().items()
        ]
        return KeyedTensor.from_tensor_list(kjt.keys(), sums)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_module_takes_batches_and_returns_a_keyed_tensor(strict):
    auto = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(Pooling(), (batch(),), dynamic_shapes=([auto, auto, auto, None],), strict=strict)
    saved = io.BytesIO()
    torch.export.save(exported, saved)
    saved.seek(0)
    module = torch.export.load(saved).module()
    out = module(batch())
    # user: rows 7 + 8, none, 9 of [2i, 2i + 1]; item: rows 1, 2, 3 + 4 of [-i]
    assert type(out) is KeyedTensor and out.keys() == KEYS and out.length_per_key() == [2, 1]
    assert out["user"].tolist() == [[30, 32], [0, 0], [18, 19]] and out["item"].tolist() == [[-1], [-2], [-7]]
    for lengths in LENGTHS_OF_MANY:
        assert torch.equal(module(many(lengths)).values(), Pooling()(many(lengths)).values())
    with pytest.raises(RuntimeError, match="u0 [+] u1"):  # torch's words for the sum of two keys' lengths
        module(unchecked([0, 1, 1, 1]))
    with pytest.raises(ValueError, match="but actually got inputs with tree spec"):
        module(batch(keys=KEYS[::-1]))  # torchrec takes the keys of the example for these


def test_exported_module_pads_and_permutes():
    class Padding(nn.Module):
        def forward(self, kjt):
            return (
                kjt["item"].to_padded_dense(2, -1),
                kjt.permute([1, 0]),
                JaggedTensor(kjt.values(), offsets=kjt.offsets()),
            )

    auto = {0: torch.export.Dim.AUTO}
    module = torch.export.export(Padding(), (batch(),), dynamic_shapes=([auto, auto, auto, None],)).module()
    padded, permuted, jt = module(many([3, 1, 1, 2, 0, 1, 0, 5]))
    assert padded.tolist() == [[-1, -1], [7, -1], [-1, -1], [8, 9]]
    assert nested(permuted)[0] == ("item", [[], [7], [], [8, 9, 10, 11, 12]])
    assert bags(jt)[:3] == [[0, 1, 2], [3], [4]]


@pytest.mark.cuda
def test_cuda_tensors_are_checked_without_waiting_for_them():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lengths = torch.tensor([9, -9, 1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kjt = KeyedJaggedTensor(["user"], torch.zeros(3, device="cuda"), lengths=lengths)
        assert kjt.offsets().shape == (4,) and kjt.lengths() is lengths
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_batch_goes_through_pinned_memory_to_the_device_and_back():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pinned = batch().pin_memory()
    assert all(part is None or part.is_pinned() for part in pinned._parts())
    moved = pinned.to("cuda", non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    assert moved.device().type == "cuda" and nested(moved.permute([1, 0]).to("cpu")) == nested(batch())[::-1]
    assert moved["item"].to_padded_dense(2, -1).tolist() == [[1, -1], [2, -1], [3, 4]]


# torchrec


@pytest.fixture(scope="module")
def torchrec():
    return pytest.importorskip("torchrec")


def random_parts(seed: int) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Keys, and values, weights and lengths of a batch; of few bags, many of them empty, some batches of ones alone."""
    random = torch.Generator().manual_seed(seed)
    num_keys, stride = (int(torch.randint(1, 6, (), generator=random)) for _ in range(2))
    lengths = torch.randint(0, 4 if seed % 3 else 2, (num_keys * stride,), generator=random)
    num_values = int(lengths.sum())
    parts = {
        "values": torch.randint(0, 1000, (num_values,), generator=random),
        "weights": torch.rand(num_values, generator=random) if seed % 2 else None,
        "lengths": lengths.to(INTEGERS[seed // 2 % 2]),
    }
    return [f"f{f}" for f in range(num_keys)], parts


def assert_equals(ours, theirs):
    """Values and dtypes of every tensor, and keys and counts."""
    for name in ("values", "weights_or_none", "lengths", "offsets"):
        mine, other = getattr(ours, name)(), getattr(theirs, name)()
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert mine.dtype == other.dtype and torch.equal(mine, other), name
    if isinstance(ours, KeyedJaggedTensor):
        for name in ("keys", "stride", "stride_per_key", "length_per_key", "offset_per_key", "variable_stride_per_key"):
            assert getattr(ours, name)() == getattr(theirs, name)(), name


@pytest.mark.torchrec
@pytest.mark.parametrize("seed", range(12))
def test_keyed_jagged_tensor_equals_torchrecs(torchrec, seed):
    keys, parts = random_parts(seed)
    ours, theirs = KeyedJaggedTensor(keys, **parts), torchrec.KeyedJaggedTensor(keys, **parts)
    assert_equals(ours, theirs)
    offsets = {"offsets": ours.offsets(), "lengths": None}
    assert_equals(KeyedJaggedTensor(keys, **(parts | offsets)), torchrec.KeyedJaggedTensor(keys, **(parts | offsets)))
    assert list(ours.to_dict()) == list(theirs.to_dict())
    for key in keys:
        assert_equals(ours[key], theirs[key])
        assert_equals(ours.to_dict()[key], theirs.to_dict()[key])
    indices = [i for i in range(len(keys)) if (seed >> i) & 1] + [len(keys) - 1, 0]
    assert_equals(ours.permute(indices), theirs.permute(indices))
    assert_equals(ours.flatten_lengths(), theirs.flatten_lengths())
    for mine, other in zip(ours.split([1, len(keys) - 1]), theirs.split([1, len(keys) - 1]), strict=True):
        if mine.keys():  # of no keys torchrec's has int32 lengths, no offsets and no stride
            assert_equals(mine, other)
    renamed = ours.to_dict() | {f"{key}'": jt for key, jt in ours.to_dict().items()}
    theirs_renamed = theirs.to_dict() | {f"{key}'": jt for key, jt in theirs.to_dict().items()}
    both = KeyedJaggedTensor.from_jt_dict(renamed), torchrec.KeyedJaggedTensor.from_jt_dict(theirs_renamed)
    assert_equals(*both)
    primes = [f"{key}''" for key in keys]
    assert_equals(
        KeyedJaggedTensor.concat([both[0], KeyedJaggedTensor(primes, **parts)]),
        torchrec.KeyedJaggedTensor.concat([both[1], torchrec.KeyedJaggedTensor(primes, **parts)]),
    )
    assert ours.size_in_bytes() == theirs.size_in_bytes()


@pytest.mark.torchrec
@pytest.mark.parametrize("seed", range(12))
def test_jagged_tensor_equals_torchrecs(torchrec, seed):
    _, parts = random_parts(seed)
    ours, theirs = JaggedTensor(**parts), torchrec.JaggedTensor(**parts)
    assert_equals(ours, theirs)
    assert lists(ours.to_dense()) == lists(theirs.to_dense())
    for length in (None, 0, 2, 9):
        assert torch.equal(ours.to_padded_dense(length, 7), theirs.to_padded_dense(length, 7))
        if parts["weights"] is not None:
            mine, other = (jt.to_padded_dense_weights(length, 0.5) for jt in (ours, theirs))
            assert torch.equal(mine, other)
    weights = ours.to_dense_weights()
    assert_equals(
        JaggedTensor.from_dense(ours.to_dense(), weights), torchrec.JaggedTensor.from_dense(ours.to_dense(), weights)
    )
    rows, row_weights = ours.to_padded_dense(), ours.to_padded_dense_weights()
    dense = (
        kind.from_dense_lengths(rows, parts["lengths"], row_weights) for kind in (JaggedTensor, torchrec.JaggedTensor)
    )
    assert_equals(*dense)
    vectors = parts["values"].unsqueeze(1) * torch.tensor([1.0, 10.0])
    parts = {"values": vectors, "lengths": parts["lengths"]}
    mine, other = (kind(**parts).to_padded_dense(None, 7) for kind in (JaggedTensor, torchrec.JaggedTensor))
    assert torch.equal(mine, other)


@pytest.mark.torchrec
def test_empty_equals_torchrecs(torchrec):
    for weighted in (False, True):
        assert_equals(KeyedJaggedTensor.empty(weighted), torchrec.KeyedJaggedTensor.empty(weighted))
    for mine, other in zip(
        JaggedTensor.empty(True)._parts()[:3], (torchrec.JaggedTensor.empty(True),) * 3, strict=True
    ):
        assert mine.shape == other.values().shape
    theirs = torchrec.KeyedJaggedTensor.empty_like(
        torchrec.KeyedJaggedTensor(KEYS, batch().values(), lengths=batch().lengths())
    )
    assert_equals(KeyedJaggedTensor.empty_like(batch(weights=None)), theirs)


@pytest.mark.torchrec
def test_keyed_tensor_equals_torchrecs(torchrec):
    values, more = torch.rand(3, 6), torch.rand(3, 4)
    ours, theirs = (
        [kind("abc", [1, 2, 3], values), kind("de", [4, 0], more)] for kind in (KeyedTensor, torchrec.KeyedTensor)
    )
    assert ours[0].offset_per_key() == theirs[0].offset_per_key()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in "abc")
    assert all(torch.equal(ours[0].to_dict()[key], theirs[0].to_dict()[key]) for key in "abc")
    for groups in ([["a", "d"], ["c", "b", "e"]], [["b"], [], ["d", "b"]]):
        for mine, other in zip(
            KeyedTensor.regroup(ours, groups), torchrec.KeyedTensor.regroup(theirs, groups), strict=True
        ):
            assert torch.equal(mine, other)
        names = ["x", "y", "z"][: len(groups)]
        mine, other = (kind[0].regroup_as_dict(kind, groups, names) for kind in (ours, theirs))
        assert list(mine) == list(other) and all(torch.equal(mine[name], other[name]) for name in names)
    tensors = [torch.rand(3, 2), torch.rand(3, 1)]
    mine, other = (kind.from_tensor_list(["a", "b"], tensors) for kind in (KeyedTensor, torchrec.KeyedTensor))
    assert torch.equal(mine.values(), other.values()) and mine.length_per_key() == other.length_per_key()
