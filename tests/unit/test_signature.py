"""Signatures: what a function takes is checked by type, rank, size and range, and a refusal names the input."""

from __future__ import annotations

import numpy as np
import pytest

from distill_core.errors import ConfigError
from distill_core.signature import MAX_SIDE, MAX_VALUES, Function, Signature, TensorSpec, described

IMAGE = TensorSpec(dtype="float32", shape=(3, 4, 6), low=-1, high=1)
SIGNAL = TensorSpec(dtype="float32", shape=(2, -1), max_shape=(2, 48), multiple_of=6)
READ = Function(
    inputs={"image": IMAGE, "gain": TensorSpec(dtype="float64", low=0.25, optional=True)},
    outputs={"logits": TensorSpec(dtype="float32", shape=(7,))},
)


def images(count: int = 2, *shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (count, *(shape or IMAGE.shape))).astype(dtype)


def refused(spec: TensorSpec, values: np.ndarray, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        spec.checked("gauge", values)
    assert caught.value.field == "gauge"
    assert str(caught.value).startswith("gauge ")


# -- what a specification may say


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"shape": (3, -2)}, r"shape \(3, -2\): a size is -1 or in 0 to 16777216"),
        ({"shape": (MAX_SIDE + 1,)}, "a size is -1 or in 0 to"),
        ({"shape": (3, -1)}, "has free sizes; max_shape must bound each of its 2 axes"),
        ({"shape": (3, -1), "max_shape": (9,)}, "max_shape must bound each of its 2 axes"),
        ({"shape": (3, -1), "max_shape": (3, -1)}, "max_shape must bound each of its 2 axes"),
        ({"shape": (3, -1), "max_shape": (4, 9)}, r"max_shape \(4, 9\) contradicts shape \(3, -1\)"),
        ({"shape": (-1,), "max_shape": (5,), "multiple_of": 6}, r"\(5,\) leaves no multiple of 6"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"low": 2, "high": 1.5}, r"low = 2 is above high = 1.5, so no value is allowed"),
        ({"low": float("nan")}, "low"),
        ({"dtype": "complex64"}, "dtype = 'complex64' is not allowed"),
        ({"shape": (2**10, 2**10, 2**9)}, f"has more than the {MAX_VALUES} values that are allowed"),
        ({"shape": (2**15, -1), "max_shape": (2**15, 2**14)}, f"has more than the {MAX_VALUES} values"),
    ],
)
def test_a_specification_that_cannot_be_is_refused_in_a_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        TensorSpec.parse({"dtype": "float32", **values})
    assert "\n" not in str(caught.value)


def test_an_item_may_have_as_many_values_as_are_allowed():
    assert TensorSpec(dtype="uint8", shape=(2**14, 2**14)).shape == (2**14, 2**14)
    assert TensorSpec(dtype="uint8", shape=(-1, 2**14), max_shape=(2**14, 2**14)).max_shape == (2**14, 2**14)


def test_specifications_are_described_in_words():
    assert (IMAGE.described, SIGNAL.described) == ("float32 (3, 4, 6)", "float32 (2, <=48)")
    (row,) = described(Signature(functions={"read": READ}))
    assert row == {
        "function": "read",
        "inputs": {"image": "float32 (3, 4, 6)", "gain": "float64 ()"},
        "outputs": {"logits": "float32 (7)"},
    }


# -- shapes


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((2, 6), True),
        ((2, 48), True),
        ((2, 0), False),
        ((2, 7), False),
        ((2, 54), False),
        ((3, 6), False),
        ((2,), False),
        ((2, 6, 1), False),
    ],
)
def test_a_free_size_is_a_multiple_up_to_its_bound(shape, fits):
    assert SIGNAL.fits(shape) is fits
    if fits:
        assert SIGNAL.checked("gauge", images(5, *shape)).shape == (5, *shape)
    else:
        refused(SIGNAL, np.zeros((5, *shape), np.float32), r"items of shape .*takes float32 \(2, <=48\)")


def test_a_size_that_is_not_free_may_be_zero_but_no_other():
    empty = TensorSpec(dtype="float32", shape=(0, 3))
    assert empty.checked("gauge", np.zeros((4, 0, 3), np.float32)).shape == (4, 0, 3)
    refused(empty, np.zeros((4, 1, 3), np.float32), "items of shape")


def test_a_value_without_items_is_refused():
    refused(
        TensorSpec(dtype="float32"), np.float32(0.3) * np.ones(()), "single value; give an array of items"
    )


# -- types and ranges


@pytest.mark.parametrize(
    ("dtype", "given", "result"),
    [
        ("float32", np.float64, np.float32),
        ("float16", np.int64, np.float16),
        ("float64", np.uint8, np.float64),
        ("int64", np.uint8, np.int64),
        ("int32", np.int64, np.int32),
        ("uint8", np.uint32, np.uint8),
        ("bool", np.bool_, np.bool_),
    ],
)
def test_numbers_that_a_type_can_hold_are_taken_as_it(dtype, given, result):
    values = np.array([0, 1, 0, 1, 1]).astype(given)
    found = TensorSpec(dtype=dtype).checked("gauge", values)
    assert found.dtype == result
    assert found.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        ("int64", np.float32),
        ("uint8", np.int8),
        ("uint8", np.bool_),
        ("bool", np.uint8),
        ("float32", np.bool_),
        ("float32", np.complex64),
        ("float32", object),
        ("int32", "U3"),
    ],
)
def test_another_kind_of_number_is_refused(dtype, given):
    refused(
        TensorSpec(dtype=dtype), np.array([1, 0]).astype(given), rf"holds .* values, the model takes {dtype}"
    )


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("int32", np.array([2**31])),
        ("int32", np.array([-(2**31) - 1])),
        ("int64", np.array([2**63], np.uint64)),
        ("uint8", np.array([256], np.uint16)),
        ("float16", np.array([70000.0])),
        ("float32", np.array([-1e39])),
    ],
)
def test_a_number_beyond_its_type_is_refused_and_never_wrapped(dtype, values):
    refused(TensorSpec(dtype=dtype), values, f"beyond {dtype}")


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(broken):
    values = images()
    values[1, 2, 0, 3] = broken
    refused(IMAGE, values, "holds NaN or infinity")
    refused(IMAGE.model_copy(update={"low": None, "high": None}), values, "holds NaN or infinity")


@pytest.mark.parametrize(
    ("low", "high", "values", "allowed"),
    [
        (-1, 1, [0.0, 1.25], "from 0 to 1.25; allowed are -1 to 1"),
        (-1, 1, [-1.5, 0.0], "from -1.5 to 0; allowed are -1 to 1"),
        (None, 2, [7.0], "from 7 to 7; allowed are -inf to 2"),
        (0.25, None, [0.0], "from 0 to 0; allowed are 0.25 to inf"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(low, high, values, allowed):
    refused(TensorSpec(dtype="float32", low=low, high=high), np.array(values), allowed)


def test_the_ends_of_a_range_belong_to_it():
    spec = TensorSpec(dtype="float32", low=-0.1, high=0.3)
    ends = np.array([-0.1, 0.3], np.float32)
    assert spec.checked("gauge", ends).tolist() == ends.tolist()
    assert TensorSpec(dtype="int64", low=0, high=9).checked("gauge", np.array([0, 9])).tolist() == [0, 9]


# -- texts


TEXT = TensorSpec(dtype="text")


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_texts_are_strings_or_utf8(shape):
    found = TEXT.checked("gauge", np.array(["a cat", "ä dog".encode()], object).reshape(shape))
    assert found.tolist() == ["a cat", "ä dog"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.array([["a", "b"]], object), r"has the shape \(1, 2\); give one text an item"),
        (np.array(["a", 3], object), "holds 3, the model takes texts"),
        (np.array([b"\xff"], object), "is not UTF-8 text"),
    ],
)
def test_what_is_no_text_is_refused(values, sentence):
    refused(TEXT, values, sentence)


# -- functions


def test_a_request_is_checked_input_by_input_and_optional_ones_may_be_absent():
    given = READ.checked({"image": images(2, dtype=np.float64)})
    assert list(given) == ["image"]
    assert given["image"].dtype == np.float32
    assert READ.checked({"image": images(), "gain": np.array([1, 2])})["gain"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("arrays", "sentence", "field"),
    [
        ({"imge": images()}, "the model has no input 'imge'; did you mean 'image'", "imge"),
        ({"gain": np.ones(2)}, r"input image is missing: float32 \(3, 4, 6\)", "image"),
        ({"image": images() * 3}, "image holds values from", "image"),
        ({"image": images(), "gain": np.zeros(2)}, "gain holds values from 0 to 0", "gain"),
        ({"image": images(2), "gain": np.ones(3)}, "equally many items.*image 2, gain 3", None),
        ({"image": images(0)}, "at least one; given are image 0", None),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_the_name_of_its_input(arrays, sentence, field):
    with pytest.raises(ConfigError, match=sentence) as caught:
        READ.checked(arrays)
    assert caught.value.field == field


def test_a_function_without_inputs_is_given_none():
    with pytest.raises(ConfigError, match="at least one; given are none"):
        Function(inputs={}, outputs={}).checked({})


def test_the_first_function_is_the_one_of_the_bare_name_and_others_are_asked_by_theirs():
    signature = Signature(functions={"read": READ, "encode": READ.model_copy(update={"batched": False})})
    assert (signature.default, signature.function().batched, signature.function("encode").batched) == (
        "read",
        True,
        False,
    )
    with pytest.raises(
        ConfigError, match="the model has no function 'encod'; did you mean 'encode'"
    ) as caught:
        signature.function("encod")
    assert caught.value.field == "function"
    with pytest.raises(ConfigError, match="the model has no function ''"):
        Signature().function()


@pytest.mark.parametrize("name", ["", "1st", "a-b", "a/b", "..", "x" * 64])
def test_a_name_that_a_file_or_an_address_could_not_have_is_no_function(name):
    with pytest.raises(ConfigError):
        Signature.parse({"functions": {name: READ.model_dump()}})
