import pytest
from PIL import Image

from sjd_engine.images import save_png


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "cat.png"
    path.write_bytes(b"old")

    def fail(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (4, 4)), path, {"prompt": "a cat"})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError, match="missing"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "missing" / "cat.png", {})


def test_other_tools_find_the_prompt(tmp_path):
    save_png(Image.new("RGB", (4, 4)), tmp_path / "cat.png", {"prompt": "a cat", "seed": 3})
    with Image.open(tmp_path / "cat.png") as image:
        assert image.text["parameters"] == "a cat\nseed: 3"
