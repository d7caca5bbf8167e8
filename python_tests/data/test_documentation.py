"""documentation: prose stays, code and mark-up go; the same files give the same bytes."""

from pathlib import Path

import pytest

from stackbert_kernels.data import documentation as module
from stackbert_kernels.data.documentation import documentation, prose, prose_of_file

CASES = {
    "signature and doctest": (
        """index(value, start=0)

        Return the index of the first occurrence of the value.

        >>> [1, 2].index(2)
        1
        >>> "never shown to anyone. Not this."

        Raises an error where the value is not present.
        """,
        ["Return the index of the first occurrence of the value.", "Raises an error where the value is not present."],
    ),
    "google": (
        """Adds two tensors of the same shape.

        Args:
            input (Tensor): The first of the two
                tensors to add.
            other (Tensor, *optional*, defaults to `None`): The second of them all.
            alpha: float
        Returns:
            The sum of both tensors.
        """,
        [
            "Adds two tensors of the same shape.",
            "The first of the two tensors to add.",
            "The second of them all.",
            "The sum of both tensors.",
        ],
    ),
    "numpy": (
        """
        Return a sorted copy of an array.

        Parameters
        ----------
        a : array_like
            The array to be sorted.
        axis : int or None, optional
            The axis along which the array is sorted.
        """,
        ["Return a sorted copy of an array.", "The array to be sorted.", "The axis along which the array is sorted."],
    ),
    "restructured text": (
        """
        The :class:`~torch.Tensor` holds *many* **different** ``numbers`` at once.

        .. note::
            It is shared between the processes.

        .. math::
            It is not seen.

        For example, one may write the following::

            This code is not prose at all.

        After the code the text goes on.

        - A list item that goes on
          over a second line.
        """,
        [
            "The torch.Tensor holds many different numbers at once.",
            "It is shared between the processes.",
            "For example, one may write the following:",
            "After the code the text goes on.",
            "A list item that goes on over a second line.",
        ],
    ),
    "markdown": (
        """The [`BertModel`] is described [in the paper](https://arxiv.org/abs/1810.04805) at length.

        ```python
        This is code inside of a fence.
        ```

        | a table | of things. |
        """,
        ["The BertModel is described in the paper at length."],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prose_stays_and_code_goes(name):
    text, expected = CASES[name]
    assert prose(text) == expected


def test_documents_are_modules_classes_and_added_docstrings(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('''"""The text of the whole module."""
raise SystemExit("never imported")
def f():
    """The text of a single function."""
class C:
    """The text of one class."""
    def g(self):
        """The text of one method."""
add_docstr(f, """
The text of a function in C.
""")
''')
    assert prose_of_file(str(path)) == [
        ["The text of the whole module.", "The text of a single function."],
        ["The text of one class.", "The text of one method."],
        ["The text of a function in C."],
    ]
    path.write_text("this is not Python")
    assert prose_of_file(str(path)) == []


def test_repeats_are_dropped_and_the_bytes_are_the_same(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    common = "This paragraph stands in both of the modules and is long enough to be kept on its own."
    for name in ("a", "b", "c"):
        (package / f"{name}.py").write_text(
            f'"""{common}\n\nThe module {name} says something that no other module of the package says."""'
        )
    monkeypatch.setattr(module, "_roots", lambda: iter([Path(package)]))
    out = documentation(tmp_path / "deep" / "out.txt", progress=False)
    text = out.read_text()
    assert text.count(common) == 1
    assert [d.count("says something") for d in text.rstrip("\n").split("\n\n")] == [1, 1, 1]
    assert documentation(tmp_path / "again.txt", progress=False).read_text() == text
    assert [p.name for p in out.parent.iterdir()] == ["out.txt"]
