"""Lists of classes: names, numbers of lines, and what is refused."""

from pathlib import Path

import pytest

from lightning_moevlm.common.errors import UserError
from lightning_moevlm.contracts.answer_list import AnswerList, read_classes, write_answers


def lines(folder: Path, text: str) -> Path:
    path = folder / "classnames.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_class_is_a_name_or_the_number_of_its_line(tmp_path: Path) -> None:
    classes = read_classes(lines(tmp_path, "\ufeffcat\n\n dog \ncat-like\n"))
    assert classes.names == ("cat", "dog", "cat-like")
    assert [classes.number(label) for label in ("dog", "0", "cat-like")] == [1, 0, 2]
    for label in ("3", "-1", "bird", "1.0"):
        with pytest.raises(UserError, match=f"has the class '{label}', which is not one of the 3 names in"):
            classes.number(label)


def test_a_counted_list_has_names_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    write_answers(AnswerList(("7", "0"), (5, 2), "digest"), path)  # by frequency, so 0 is no line
    classes = read_classes(path)
    assert [classes.number(label) for label in ("7", "0")] == [0, 1]
    with pytest.raises(UserError, match="is not one of the 2 names"):
        classes.number("1")


def test_names_may_repeat_where_samples_have_numbers(tmp_path: Path) -> None:
    classes = read_classes(lines(tmp_path, "crane\ncar\ncrane\n"))
    assert (classes.number("0"), classes.number("2")) == (0, 2)
    with pytest.raises(UserError, match=r"gives to lines \[0, 2\] \(from 0\)"):
        classes.number("crane")


def test_names_that_are_numbers_must_be_in_their_place(tmp_path: Path) -> None:
    assert read_classes(lines(tmp_path, "0\n1\n2\n")).number("2") == 2
    with pytest.raises(UserError, match=r"gives to lines \[0, 1\]"):
        read_classes(lines(tmp_path, "1\n2\n0\n")).number("1")


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty; give one per line"):
        read_classes(lines(tmp_path, "\n \n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_classes(tmp_path / "none.txt")
