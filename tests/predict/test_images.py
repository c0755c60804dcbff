"""Which images a prediction reads, and what it reports of those that it cannot read."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.errors import raises
from tests.nasty import file_names
from trainer.errors import DataError
from trainer.names import escape_unprintable
from trainer.predict.images import MAX_FILE_BYTES, ImageFile, list_images, list_images_of_paths, read_image


def write_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name, "PNG")
    return folder


def list_names(images: list[ImageFile], folder: Path) -> list[str]:
    return [image.name.removeprefix(f"{folder}/") for image in images]


def test_a_folder_has_all_images_below_it_sorted_by_path(tmp_path: Path) -> None:
    write_images(tmp_path, "b/2.png", "a/1.JPG", "3.webp", ".hidden.png", "a/.trash/4.png", "__MACOSX/5.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert list_names(list_images(str(tmp_path)), tmp_path) == ["3.webp", "a/1.JPG", "b/2.png"]
    assert list_names(list_images(f"{tmp_path}/[ab]/*"), tmp_path) == ["a/1.JPG", "b/2.png"]
    assert list_names(list_images(f"{tmp_path}/3.webp"), tmp_path) == ["3.webp"]


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    write_images(tmp_path, "photos [2024]/1.png", "photos 2/2.png")
    folder = f"{tmp_path}/photos [2024]"
    assert list_names(list_images(folder), tmp_path) == ["photos [2024]/1.png"]
    assert list_names(list_images(f"{folder}/*.png"), tmp_path) == ["photos [2024]/1.png"]


def test_a_list_has_paths_relative_to_it_in_its_order(tmp_path: Path) -> None:
    write_images(tmp_path, "lists/x/1.png", "up.png", "lists/=2.png")
    rows = [
        "\ufefflabel,file,note",
        '"a,b",x/1.png,',
        "c,../up.png,later",
        "d,'=2.png",
        "e,x/1.png",
        "f,gone.png",
        "g,",
    ]
    (tmp_path / "lists" / "L.csv").write_text("\r\n".join(rows) + "\r\n", encoding="utf-8")
    images = list_images(str(tmp_path / "lists" / "L.csv"))
    assert [image.name for image in images] == ["x/1.png", "../up.png", "=2.png", "x/1.png", "gone.png", ""]
    read = [read_image(image) for image in images]
    assert [isinstance(content, bytes) for content in read] == [True, True, True, True, False, False]
    assert read[4:] == ["no such file or directory", "the list has no file name in this row"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"name\nx.png\n", "no column file"), (b"", "no column file"), (b"file\n", "has no image"), (b"file\n\xff.png\n", "UTF-8"),
     (b'file\n"' + b"x" * 200_000 + b'"\n', "not a CSV")],
)  # fmt: skip
def test_a_list_that_cannot_be_used(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "L.csv").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        list_images(str(tmp_path / "L.csv"))


def test_nothing_at_the_address(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for address, problem in ((f"{tmp_path}/*.png", "matches no"), (f"{tmp_path}/empty", "has no image")):
        with raises(DataError, key="images", value=address, problem=problem, fix="a folder of images"):
            list_images(address)


def test_files_of_any_name_are_read(tmp_path: Path) -> None:
    names = [f"{name}.png" for name in file_names(5, 60) if len(os.fsencode(name)) < 200]
    names = [name for name in names if not name.startswith(".")]
    for name in names:
        (tmp_path / name).write_bytes(b"content")
    images = list_images(str(tmp_path))
    assert {image.name for image in images} == {escape_unprintable(f"{tmp_path}/{name}") for name in names}
    assert all(read_image(image) == b"content" for image in images)
    assert all("\n" not in image.name for image in images)


def test_what_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    paths = [tmp_path / name for name in ("pipe.png", "empty.png", "large.png", "gone.png")]
    reasons = [read_image(image) for image in list_images_of_paths([*paths, "a\0b.png"])]
    assert reasons[:4] == ["is not a file", "is empty", "is larger than 256 MiB", "no such file or directory"]
    assert isinstance(reasons[4], str)


def test_a_changed_file_has_another_version(tmp_path: Path) -> None:
    file = tmp_path / "1.png"
    file.write_bytes(b"a")
    before = list_images_of_paths([file])
    assert list_images_of_paths([file]) == before
    file.write_bytes(b"ab")
    assert list_images_of_paths([file]) != before
