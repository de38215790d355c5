"""Names of outputs tell images apart, and stay when others come or go."""

from __future__ import annotations

from pathlib import Path

import pytest

from agln_fast.runtime.names import output_names, telling_ends

PATHS = {
    "alone": (["a/x.png"], ["x.png"], ["x"]),
    "different": (["a/x.png", "b/y.png"], ["x.png", "y.png"], ["x", "y"]),
    "folders": (["a/x.png", "b/x.png", "y.png"], ["a/x.png", "b/x.png", "y.png"], ["a_x", "b_x", "y"]),
    "grandparents": (["a/c/x.png", "b/c/x.png"], ["a/c/x.png", "b/c/x.png"], ["a_c_x", "b_c_x"]),
    "formats": (["x.png", "x.jpg"], ["x.png", "x.jpg"], ["x_png", "x_jpg"]),
    "case": (["X.png", "x.png"], ["X.png", "x.png"], ["X_png", "x_png_2"]),
    "joined-name-is-taken": (["a/x.png", "b/x.png", "a_x.png"], ["a/x.png", "b/x.png", "a_x.png"], None),
    "dots": (["a/../x.png", "b/x.png"], None, None),
    "same-file-twice": (["x.png", "a/../x.png"], None, None),
}


@pytest.mark.parametrize(("paths", "ends", "names"), PATHS.values(), ids=PATHS)
def test_names_tell_images_apart(paths, ends, names):
    found = telling_ends([Path(path) for path in paths])
    assert ends is None or found == ends
    chosen = output_names(found)
    assert names is None or chosen == names
    assert len({name.casefold() for name in chosen}) == len(paths)
    assert all("/" not in name and not name.startswith(".") for name in chosen)


def test_name_does_not_depend_on_the_order_or_on_other_images():
    few, more = ["a/x.png", "b/x.png"], ["c/x.png", "b/x.png", "y.png", "a/x.png"]
    few_names = dict(zip(few, output_names(telling_ends([Path(path) for path in few])), strict=True))
    more_names = dict(zip(more, output_names(telling_ends([Path(path) for path in more])), strict=True))
    assert few_names == {path: more_names[path] for path in few}


def test_folders_are_kept_where_they_are_asked_for():
    paths = ["a/x.png", "a/x.jpg", "A/y.png", "a/Y.tif", "a_x.png"]
    assert output_names(paths, "/") == ["a/x_png", "a/x_jpg", "A/y_png", "a/Y_tif", "a_x"]
