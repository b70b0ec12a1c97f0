"""Images, histograms, tables and texts: what is taken, as it is at that moment, and what is not."""

from __future__ import annotations

import io
import math
from collections import namedtuple
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookengine import Histogram, Image, Table, as_medium


def pixels(image: Image) -> np.ndarray[Any, Any]:
    with PIL.Image.open(io.BytesIO(image.png)) as picture:
        return np.array(picture)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_channels_may_be_first_or_last(channels: int) -> None:
    data = torch.randint(256, (5, 6, channels), dtype=torch.uint8)
    expected = data.numpy()[..., 0] if channels == 1 else data.numpy()
    assert (pixels(Image(data)) == expected).all()
    assert (pixels(Image(data.permute(2, 0, 1))) == expected).all()
    assert (pixels(Image(data.numpy())) == expected).all()


def test_a_matrix_is_grey() -> None:
    data = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (pixels(Image(data)) == data).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_go_from_0_to_1_and_what_lies_beyond_is_cut_off(dtype: torch.dtype) -> None:
    values = [0.0, 0.5, 1.0, -3.0, 7.0, math.nan, math.inf, -math.inf]
    image = Image(torch.tensor([values], dtype=dtype))
    assert pixels(image).tolist() == [[0, 128, 255, 0, 255, 0, 255, 0]]


@pytest.mark.parametrize(
    "dtype",
    [*(torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)],
)
def test_whole_numbers_go_from_0_to_255(dtype: torch.dtype) -> None:
    image = Image(torch.tensor([[0, 7, 255, 300]]).to(dtype))
    assert pixels(image).tolist() == [[0, 7, 255, 255]]


def test_small_and_negative_numbers_and_truth_values() -> None:
    small = Image(torch.tensor([[-5, 0, 127]], dtype=torch.int8))
    assert pixels(small).tolist() == [[0, 0, 127]]
    assert pixels(Image(torch.tensor([[False, True]]))).tolist() == [[0, 255]]
    assert pixels(Image(np.array([[-1, 256]]))).tolist() == [[0, 255]]
    assert pixels(Image([[0.0, 1.0]])).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("number", "height", "width"),
    [(1, 4, 3), (2, 4, 8), (3, 10, 8), (5, 10, 13), (9, 16, 13), (10, 16, 18)],
)
def test_a_batch_is_a_grid_as_square_as_can_be(number: int, height: int, width: int) -> None:
    batch = torch.randint(1, 256, (number, 3, 4, 3), dtype=torch.uint8)
    grid = pixels(Image(batch))
    assert grid.shape == (height, width, 3)
    columns = math.ceil(math.sqrt(number))
    for index, one in enumerate(batch):
        top, left = index // columns * 6, index % columns * 5
        assert (grid[top : top + 4, left : left + 3] == one.permute(1, 2, 0).numpy()).all()
    assert int(grid.astype(int).sum()) == int(batch.sum())  # between and after them it is black


def test_a_batch_may_be_of_floats_and_of_one_channel() -> None:
    assert pixels(Image(torch.ones(2, 1, 2, 2))).tolist() == [[255, 255, 0, 0, 255, 255]] * 2


def test_what_is_changed_afterwards_changes_nothing() -> None:
    tensor = torch.zeros(2, 2)
    array = np.zeros((2, 2), np.uint8)
    batch = torch.zeros(1, 1, 2, 2)
    bytes_first = [Image(tensor), Image(array), Image(batch), Image(tensor.unsqueeze(-1))]
    tensor += 1
    array += 255
    batch += 1
    for image in bytes_first:
        assert (pixels(image) == 0).all()


def test_what_numpy_shares_and_torch_cannot_is_copied() -> None:
    fixed = np.asarray(PIL.Image.new("L", (2, 2), 7))
    assert not fixed.flags.writeable
    assert (pixels(Image(fixed)) == 7).all()
    colours = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (pixels(Image(colours[..., ::-1])) == colours[..., ::-1]).all()  # BGR


def test_a_tensor_of_the_graph_is_taken_without_it() -> None:
    leaf = torch.rand(2, 2, requires_grad=True)
    expected = (leaf.detach() * 255).round().numpy()
    assert (pixels(Image(leaf)) == expected).all()
    assert (pixels(Image(leaf * 1.0)) == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_pil_image_is_taken_as_it_is_at_that_moment(mode: str) -> None:
    picture = PIL.Image.new(mode, (3, 2))
    image = Image(picture)
    picture.paste(1, (0, 0, 3, 2))
    with PIL.Image.open(io.BytesIO(image.png)) as saved:
        assert saved.size == (3, 2)
        assert not any(any(low_high) for low_high in _extrema(saved.convert("RGB")))


def _extrema(picture: PIL.Image.Image) -> list[tuple[Any, ...]]:
    found: Any = picture.getextrema()
    return list(found)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "F", "I"])
def test_a_pil_image_that_png_does_not_know_is_converted(mode: str) -> None:
    picture = PIL.Image.new("L", (3, 2), 128)
    picture = (picture if mode in "FI" else picture.convert("RGB")).convert(mode)
    assert pixels(Image(picture)).reshape(-1)[0] in (127, 128)


def test_a_figure_is_taken_as_it_is_at_that_moment() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1), dpi=50)
    axes = figure.add_subplot()
    axes.plot([0, 1])
    image, same = Image(figure), Image(figure)
    axes.plot([1, 0])
    assert pixels(image).shape == (50, 50, 4)
    assert (pixels(image) == pixels(same)).all()
    assert (pixels(image) != pixels(Image(figure))).any()


def test_a_png_file_is_itself() -> None:
    png = Image(torch.zeros(2, 2)).png
    assert Image(png).png == png
    with pytest.raises(ValueError, match="must be a PNG file"):
        Image(b"\xff\xd8\xff\xe0")


@pytest.mark.parametrize(
    "shape", [(), (7,), (2, 5, 5), (5, 5, 2), (2, 2, 4, 4), (2, 5, 5, 3), (1, 1, 1, 2, 2)]
)
def test_another_shape_is_refused_with_those_that_are_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(H, W\), \(C, H, W\), \(H, W, C\) or \(N, C, H, W\)"):
        Image(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2), (0, 3, 4, 4)])
def test_no_pixels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="has no pixels"):
        Image(torch.zeros(shape))


@pytest.mark.parametrize("what", [Image, Histogram])
@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 3, dtype=torch.complex64), torch.eye(3).to_sparse()]
)
def test_complex_and_sparse_tensors_are_refused(what: Any, tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="pass their parts instead"):
        what(tensor)


@pytest.mark.parametrize("what", [Image, Histogram])
@pytest.mark.parametrize("value", [None, "text", object(), {}, [[1, 2], [3]], np.array(["a"])])
def test_what_holds_no_numbers_is_refused(what: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="holds no numbers"):
        what(value)


def test_a_caption_is_part_of_how_it_is_shown() -> None:
    assert repr(Image(torch.zeros(1, 1))) == "Image()"
    assert repr(Image(torch.zeros(1, 1), "a cat")) == "Image(caption='a cat')"


numbers = st.floats(-1e30, 1e30, allow_subnormal=False) | st.integers(-50, 50).map(float)


@given(values=st.lists(numbers, min_size=1, max_size=60), bins=st.integers(1, 70))
def test_a_histogram_is_numpys(values: list[float], bins: int) -> None:
    histogram = Histogram(np.array(values), bins=bins)
    assert sum(histogram.counts) == len(values)
    try:
        with np.errstate(invalid="ignore"):
            counts, edges = np.histogram(np.array(values), bins=bins)
    except (ValueError, IndexError):  # no room for so many bins; an IndexError in numpy 1
        return
    assert histogram.edges == edges.tolist()
    assert histogram.counts == counts.tolist()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.uint16, torch.bool]
)
def test_values_of_every_type_are_counted(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 1]]).to(dtype)
    assert Histogram(tensor, bins=2).counts == [1, 3]


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30, 1e20])
def test_values_that_are_all_the_same_are_counted(value: float) -> None:
    histogram = Histogram(torch.full((7,), value), bins=4)
    assert sum(histogram.counts) == 7
    assert all(map(math.isfinite, histogram.edges))


def test_what_is_not_finite_is_not_counted() -> None:
    values = [math.nan, -math.inf, 0.0, 1.0, 2.0, math.inf, math.inf, math.nan]
    histogram = Histogram(torch.tensor(values), bins=2)
    assert histogram.counts == [1, 2]
    assert histogram.edges == [0.0, 1.0, 2.0]
    for number in range(1, 40):
        values = [0.0, 1.0, 1.0] + [math.nan, math.inf, -math.inf] * number
        assert sum(Histogram(torch.tensor(values), bins=5).counts) == 3
    nothing = Histogram(torch.tensor([math.nan, math.inf]), bins=3)
    assert nothing.counts == [0, 0, 0]
    assert all(map(math.isfinite, nothing.edges))


def test_a_histogram_is_counted_at_that_moment() -> None:
    tensor = torch.tensor([0.0, 1.0], dtype=torch.float64)
    histogram = Histogram(tensor, bins=2)
    tensor.fill_(9)
    assert (histogram.counts, histogram.edges) == ([1, 1], [0.0, 0.5, 1.0])


def test_a_histogram_needs_values_and_bins() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Histogram(torch.zeros(0))
    with pytest.raises(ValueError, match="at least one bin, got 0"):
        Histogram(torch.zeros(3), bins=0)


def test_what_is_counted_already_is_taken() -> None:
    histogram = Histogram.counted(iter([2, 3]), (0, 1, 2))
    assert (histogram.counts, histogram.edges) == ([2.0, 3.0], [0.0, 1.0, 2.0])
    assert repr(histogram) == "Histogram(2 bins)"
    with pytest.raises(ValueError, match=r"N counts need N \+ 1 edges, got 2 counts and 2 edges"):
        Histogram.counted([2, 3], [0, 1])


def test_the_cells_of_a_table_are_plain() -> None:
    row = [torch.tensor(2), np.float32(0.5), np.array([1, 2]), None, True, "x", 1 + 2j]
    table = Table(["a", 2, "c", "d", "e", "f", "g"], [row])  # type: ignore[list-item]
    assert table.columns == ["a", "2", "c", "d", "e", "f", "g"]
    assert table.rows == [[2, 0.5, "[1 2]", None, True, "x", "(1+2j)"]]
    assert [type(cell) for cell in table.rows[0][:2]] == [int, float]
    assert Table([], []).rows == []
    with pytest.raises(ValueError, match="row 1 of the table has 1 cells, but there are 2 columns"):
        Table(["a", "b"], [[1, 2], [3]])


class Frame:
    """As pandas has it."""

    columns = ("name", "score")

    def itertuples(self, index: bool = True) -> Any:
        assert not index
        row = namedtuple("row", "name score")
        return iter([row("cat", np.float64(0.5)), row("dog", None)])


def test_what_a_value_is_can_be_told() -> None:
    frame = as_medium(Frame())
    assert isinstance(frame, Table)
    assert frame.columns == ["name", "score"]
    assert frame.rows == [["cat", 0.5], ["dog", None]]
    for one in ("text", Image(torch.zeros(1, 1)), Histogram([1.0]), Table([], [])):
        assert as_medium(one) is one
    for many in (torch.zeros(5), np.zeros(5)):
        assert isinstance(as_medium(many), Histogram)
    for shape in ((2, 2), (3, 2, 2), (2, 3, 2, 2)):
        assert isinstance(as_medium(torch.zeros(shape)), Image)
        assert isinstance(as_medium(np.zeros(shape)), Image)
    assert isinstance(as_medium(PIL.Image.new("L", (1, 1))), Image)


@pytest.mark.parametrize("value", [None, [1, 2], {"a": 1}, b"bytes", object(), 1 + 2j])
def test_what_is_none_of_these_is_told_what_would_be(value: Any) -> None:
    with pytest.raises(TypeError, match=r"wrap the value in hookengine\.Image"):
        as_medium(value)
    with pytest.raises(ValueError, match="at least one value"):
        as_medium(torch.zeros(0))
