"""Images in folders, and whose they are."""

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fedsim
from fedsim import registry
from fedsim.data.folder import folder
from fedsim.errors import DataError

PATHS = (
    "train/cat/a.png",
    "train/cat/b.png",
    "train/dog/old/c.png",
    "test/ape/d.png",
    "test/dog/e.png",
)
X = {
    path: np.random.default_rng(place).integers(0, 256, (4, 5), np.uint8)
    for place, path in enumerate(PATHS)
}


def save(root, path, content, **options):
    """Write pixels, an image, bytes or text."""
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content)
    if isinstance(content, Image.Image):
        content.save(place, **options)
    elif isinstance(content, bytes):
        place.write_bytes(content)
    else:
        place.write_text(content, encoding="utf-8")


def fill(root):
    for path, pixels in X.items():
        save(root, path, pixels)


@pytest.fixture
def root(tmp_path):
    """A folder with five grey images of three classes."""
    fill(tmp_path)
    return tmp_path


def only(root, content, path="train/cat/a.png", **options):
    """Read the folder with one image in another's place, and return that image."""
    (root / "train/cat/a.png").unlink()
    save(root, path, content, **options)
    return folder(str(root)).x_train[0]


class TestFolder:
    def test_both_splits_sorted_by_path(self, root):
        source = folder(str(root))
        np.testing.assert_array_equal(source.x_train[:, 0], [X[path] for path in PATHS[:3]])
        np.testing.assert_array_equal(source.x_test[:, 0], [X[path] for path in PATHS[3:]])
        # ape, cat and dog are 0, 1 and 2, though no split has all of them.
        assert source.y_train.tolist() == [1, 1, 2]
        assert source.y_test.tolist() == [0, 2]
        assert source.num_classes == 3
        assert source.class_names == ("ape", "cat", "dog")
        assert source.client_names == ()
        assert source.x_train.dtype == np.uint8
        assert source.name == f"folder:{root}"
        assert source.group_train is None
        assert not source.flip
        assert folder(str(root), flip=True).flip

    @pytest.mark.parametrize(
        "suffix", ["PNG", "bmp", "gif", "tif", "TIFF", "ppm", "Pgm", "jpg", "jpeg", "webp"]
    )
    def test_formats(self, root, suffix):
        pixels = np.full((4, 5), 120, np.uint8)
        options = {"lossless": True} if suffix == "webp" else {}
        read = only(root, pixels, f"train/cat/A.{suffix}", **options)
        # WebP has no grey images, and those of GIF have a palette.
        assert len(read) == (3 if suffix in ("gif", "webp") else 1)
        np.testing.assert_array_equal(read[0], pixels)

    def test_the_content_counts_not_the_name(self, root):
        np.testing.assert_array_equal(
            only(root, X[PATHS[0]], "train/cat/a.jpg", format="PNG"), X[PATHS[0]][None]
        )

    def test_the_first_frame(self, root):
        frames = [Image.fromarray(np.full((4, 5), value, np.uint8)) for value in (7, 80)]
        read = only(root, frames[0], "train/cat/a.gif", save_all=True, append_images=frames[1:])
        assert read.max() == read.min() == 7

    def test_grey_images_among_coloured_ones_get_three_channels(self, root):
        pixels = np.random.default_rng(9).integers(0, 256, (4, 5, 3), np.uint8)
        np.testing.assert_array_equal(only(root, pixels), np.moveaxis(pixels, 2, 0))
        source = folder(str(root))
        np.testing.assert_array_equal(source.x_train[1], np.stack([X[PATHS[1]]] * 3))
        assert source.x_test.shape == (2, 3, 4, 5)

    def test_grey(self, root):
        # 0.299 R + 0.587 G + 0.114 B = 29.9 + 117.4 + 5.7 = 153.
        only(root, np.full((4, 5, 3), (100, 200, 50), np.uint8))
        source = folder(str(root), grey=True)
        assert source.x_train.shape == (3, 1, 4, 5)
        assert source.x_train[0].tolist() == [[[153] * 5] * 4]
        np.testing.assert_array_equal(source.x_train[1, 0], X[PATHS[1]])

    def test_grey_with_transparency(self, root):
        pixels = np.random.default_rng(9).integers(0, 256, (4, 5, 2), np.uint8)
        read = only(root, Image.fromarray(pixels, "LA"))
        grey, alpha = np.moveaxis(pixels.astype(float), 2, 0)
        on_white = (grey * alpha + 255 * (255 - alpha)) / 255
        np.testing.assert_allclose(read[0], on_white, atol=1)

    def test_strokes_in_the_alpha_channel_are_seen(self, root):
        strokes = np.random.default_rng(9).integers(0, 256, (4, 5), np.uint8)
        pixels = np.zeros((4, 5, 4), np.uint8)
        pixels[:, :, 3] = strokes
        read = only(root, Image.fromarray(pixels, "RGBA"))
        np.testing.assert_array_equal(read, [255 - strokes] * 3)

    def test_a_palette_with_transparent_colours(self, root):
        image = Image.fromarray(np.array([[0, 1, 0, 1, 1]] * 4, np.uint8), "P")
        image.putpalette([10, 20, 30, 40, 50, 60])
        read = only(root, image, transparency=b"\x00\x80")
        # Nothing of the first one; of the second 128 of 255 parts on white.
        assert read[:, 0, :2].tolist() == [[255, 147], [255, 152], [255, 157]]

    def test_an_image_is_turned_as_its_camera_was(self, root):
        exif = Image.Exif()
        exif[0x0112] = 6  # the first row is at the right
        x = X[PATHS[0]]
        turned = only(root, np.ascontiguousarray(np.rot90(x)), exif=exif)
        np.testing.assert_array_equal(turned[0], x)

    def test_resized_from_the_square_in_the_centre(self, root):
        # The outer columns are cut off. Pillow weights the other four by the distance of their
        # centres 0.5, 1.5, 2.5, 3.5 from the new ones, 1 and 3, as (1 - distance / 2):
        # (3 * 0 + 3 * 70 + 140) / 7 = 50 and (70 + 3 * 140 + 3 * 210) / 7 = 160.
        wide = np.array([[9, 0, 70, 140, 210, 9]] * 4, np.uint8)
        save(root, PATHS[0], wide)
        save(root, PATHS[1], wide.T.copy())
        source = folder(str(root), size=2)
        assert source.x_train[0, 0].tolist() == [[50, 160], [50, 160]]
        assert source.x_train[1, 0].tolist() == [[50, 50], [160, 160]]
        # Five columns and four rows: the last column goes.
        np.testing.assert_array_equal(
            folder(str(root), size=4).x_test[0, 0], X["test/ape/d.png"][:, :4]
        )

    def test_what_file_managers_leave_behind(self, root):
        for path in ("train/.DS_Store", "train/cat/Thumbs.db", "test/dog/Desktop.ini"):
            save(root, path, b"x")
        # What begins with a dot is left out whatever it is: macOS and Jupyter hide copies so.
        save(root, "train/cat/._a.png", b"x")
        save(root, "train/cat/.ipynb_checkpoints/a.png", X[PATHS[0]])
        save(root, "train/.hidden/a.png", X[PATHS[0]])
        source = folder(str(root))
        assert (len(source.y_train), source.num_classes) == (3, 3)

    def test_links_are_followed(self, root, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        save(elsewhere, "deep/f.png", X[PATHS[0]])
        (root / "train/ape").mkdir()
        (root / "train/ape/more").symlink_to(elsewhere)
        assert folder(str(root)).y_train.tolist() == [0, 1, 1, 2]

    def test_unlabelled_images_come_last(self, root):
        extra = np.full((4, 5), 7, np.uint8)
        for path in ("unlabelled/b.png", "unlabelled/a/c.png"):
            save(root, path, extra)
        source = folder(str(root))
        assert source.y_train.tolist() == [1, 1, 2, -1, -1]
        assert source.num_classes == 3
        np.testing.assert_array_equal(source.x_train[3:, 0], [extra, extra])
        rows = [*zip(PATHS[:3], "xyx", strict=True), ("unlabelled/a/c.png", "y")]
        rows.append(("unlabelled/b.png", "z"))
        lines = "".join(f"{path},{client}\n" for path, client in rows)
        (root / "clients.csv").write_text("file,client\n" + lines)
        assert folder(str(root)).group_train.tolist() == [0, 1, 0, 1, 2]

    def test_a_class_folder_may_be_empty_in_one_split(self, root):
        (root / "train/ape").mkdir()
        assert folder(str(root)).num_classes == 3

    @given(order=st.permutations(PATHS))
    @settings(max_examples=10)
    def test_the_order_of_writing_is_of_no_account(self, order):
        owner = {path: str(20 - place) for place, path in enumerate(PATHS)}
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            for path in order:
                save(root, path, X[path])
            save(root, "clients.csv", "file,client\n" + "".join(f"{p},{owner[p]}\n" for p in order))
            source = folder(place)
        np.testing.assert_array_equal(source.x_train[:, 0], [X[path] for path in PATHS[:3]])
        np.testing.assert_array_equal(source.x_test[:, 0], [X[path] for path in PATHS[3:]])
        assert source.y_train.tolist() == [1, 1, 2]
        assert source.group_train.tolist() == [4, 3, 2]
        assert source.group_test.tolist() == [1, 0]


def groups(root, clients, **options):
    """Write the clients of the images in the order of PATHS and read the folder."""
    rows = "".join(f"{path},{client}\n" for path, client in zip(PATHS, clients, strict=False))
    (root / "clients.csv").write_text(f"file,client\n{rows}", **options)
    source = folder(str(root))
    return [
        None if group is None else group.tolist()
        for group in (source.group_train, source.group_test)
    ]


class TestClients:
    def test_names_in_sorted_order(self, root):
        assert groups(root, ["bo", "Zoe", "bo", "al", "Zoe"]) == [[2, 0, 2], [1, 0]]
        assert folder(str(root)).client_names == ("Zoe", "al", "bo")

    @pytest.mark.parametrize(
        ("clients", "names"), [([205, 101, 205], ("101", "205")), ([1, 0, 1], ())]
    )
    def test_numbers_are_names_where_they_are_others(self, root, clients, names):
        groups(root, clients)
        assert folder(str(root)).client_names == names

    def test_numbers_by_value(self, root):
        assert groups(root, [10, 9, 10, -1, 9]) == [[2, 1, 2], [0, 1]]

    def test_numbers_among_names_are_names(self, root):
        assert groups(root, [10, 9, "x", 9, 9]) == [[0, 1, 2], [1, 1]]

    def test_the_training_images_alone(self, root):
        assert groups(root, [1, 0, 1]) == [[1, 0, 1], None]

    def test_as_spreadsheets_write_it(self, root):
        rows = [f'"Bo, jr",{path}' for path in PATHS[:2]] + [f"Zoë,{PATHS[2]}"]
        content = "\r\n".join(["client,file", *rows, ""])
        (root / "clients.csv").write_text(content, encoding="utf-8-sig", newline="")
        assert folder(str(root)).group_train.tolist() == [0, 0, 1]


def message(root, **settings):
    with pytest.raises(DataError, match=f"^folder:{root}: ") as error:
        folder(str(root), **settings)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"folder:{root}: ")


class TestFolderFailure:
    def test_missing_folders(self, root):
        assert message(root / "none") == f"no folder {root / 'none'}"
        (root / "test").rename(root / "tests")
        assert message(root) == "has no folder test"

    def test_a_folder_of_nobody(self):
        with pytest.raises(DataError, match=r"^folder:~no_such_user/x: can't read ~no_such_user/x"):
            folder("~no_such_user/x")

    def test_a_folder_that_is_closed(self, root, monkeypatch):
        def iterdir(path):
            raise PermissionError(13, "Permission denied", str(path))

        # Nothing is closed to the user root, who may run this.
        monkeypatch.setattr(Path, "iterdir", iterdir)
        assert message(root).startswith("can't read the folder train: [Errno 13] Permission denied")

    def test_another_kind_of_file(self, root):
        save(root, "train/dog/notes.txt", "x")
        assert message(root).startswith("train/dog/notes.txt is no image; allowed: .png, .jpg")

    def test_an_image_outside_the_classes(self, root):
        save(root, "test/z.png", X[PATHS[0]])
        assert message(root) == "test/z.png is in no class's folder; must be test/CLASS/z.png"

    @pytest.mark.parametrize("spelt", ["unlabeled", "Unlabelled"])
    def test_another_spelling(self, root, spelt):
        save(root, f"{spelt}/a.png", X[PATHS[0]])
        assert message(root) == f"the folder {spelt} must be called unlabelled"

    def test_unlabelled_images_among_the_classes(self, root):
        save(root, "train/unlabelled/a.png", X[PATHS[0]])
        assert message(root) == (
            "unlabelled is a class; unlabelled images must be in the folder unlabelled beside"
            " train and test"
        )

    def test_a_class_without_images(self, root):
        (root / "train/old").mkdir()
        assert message(root) == "the class 'old' has no images; remove its folder"

    def test_a_split_without_images(self, root):
        for path in PATHS[3:]:
            (root / path).unlink()
        save(root, "train/ape/d.png", X[PATHS[0]])
        assert message(root) == "test has no images"

    def test_a_single_class(self, root):
        for path in (PATHS[2], PATHS[4], PATHS[3]):
            (root / path).unlink()
        save(root, "test/cat/f.png", X[PATHS[0]])
        for empty in ("train/dog/old", "train/dog", "test/ape", "test/dog"):
            (root / empty).rmdir()
        assert message(root).startswith("num_classes = 1; must be a whole number, 2..")

    def test_another_size(self, root):
        save(root, "test/ape/d.png", np.zeros((3, 5), np.uint8))
        assert message(root) == (
            "test/ape/d.png has 3 x 5 pixels, but train/cat/a.png 4 x 5; all must have one size,"
            " or set data.size, to which all are resized"
        )

    @pytest.mark.parametrize("size", [-1, 4097, 2.0, True])
    def test_a_size_out_of_range(self, root, size):
        with pytest.raises(DataError, match=r"^data\.size = .*: must be a whole number from 0 to"):
            folder(str(root), size=size)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tif", "ppm", "pgm"])
    def test_images_cut_short(self, root, suffix):
        place = root / f"train/cat/a.{suffix}"
        (root / PATHS[0]).unlink()
        save(root, f"train/cat/a.{suffix}", X[PATHS[0]])
        data = place.read_bytes()
        for length in (0, 1, len(data) // 3, len(data) // 2):
            place.write_bytes(data[:length])
            assert message(root).startswith(f"train/cat/a.{suffix}: can't read the image: ")

    def test_a_damaged_image(self, root):
        data = bytearray((root / PATHS[1]).read_bytes())
        data[data.index(b"IDAT") + 6] ^= 0xFF
        (root / PATHS[1]).write_bytes(data)
        assert message(root).startswith("train/cat/b.png: can't read the image: ")

    def test_a_format_that_another_program_would_read(self, root):
        save(root, PATHS[1], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\n")
        assert message(root).endswith(
            "train/cat/b.png: can't read the image: it is none of PNG, JPEG, BMP, GIF, WEBP, TIFF,"
            " PPM, or its header is damaged"
        )

    def test_a_link_to_nothing(self, root):
        (root / "train/cat/x.png").symlink_to(root / "gone.png")
        assert "train/cat/x.png: can't read the image: [Errno 2] No such file" in message(root)

    @pytest.mark.parametrize("goes_to", ["train", "train/cat", "."])
    def test_a_link_that_leads_back(self, root, goes_to):
        (root / "train/cat/again").symlink_to(root / goes_to)
        assert message(root) == (
            "train/cat/again is a symbolic link to a folder that it is in; remove it"
        )

    def test_links_that_lead_to_each_other(self, root):
        (root / "train/cat/x").symlink_to(root / "test/dog")
        (root / "test/dog/y").symlink_to(root / "train/cat")
        assert message(root).startswith("train/cat/x/y is a symbolic link to a folder that it is")

    @pytest.mark.parametrize("path", ["train/cat/pipe.png", "unlabelled/pipe.png"])
    def test_a_pipe(self, root, path):
        (root / "unlabelled").mkdir()
        os.mkfifo(root / path)  # to open it would wait for ever
        assert message(root) == f"{path} is a pipe, socket or device; must be a file"

    def test_unlabelled_is_a_file(self, root):
        save(root, "unlabelled", b"")
        expected = "unlabelled must be a folder of training images, or not be there"
        assert message(root) == expected

    def test_a_pixel_mode(self, root):
        save(root, PATHS[1], np.zeros((4, 5), np.uint16))
        assert message(root).startswith("train/cat/b.png has the pixel mode I")

    @pytest.mark.parametrize("limit", [19, 9])
    def test_a_decompression_bomb(self, root, monkeypatch, limit):
        # Pillow warns above the limit and refuses twice as much; the images have 20 pixels.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert "train/cat/a.png: can't read the image: Image size (20 pixels)" in message(root)


class TestClientsFailure:
    def message(self, root, content, encoding="utf-8"):
        (root / "clients.csv").write_text(content, encoding=encoding)
        return message(root).removeprefix("clients.csv")

    def rows(self, *rows):
        return "\n".join(["file,client", *rows])

    @pytest.mark.parametrize(
        ("content", "columns"),
        [("", ""), ("file;client\n", "file;client"), ("file,client,age\n", "file,client,age")],
    )
    def test_columns(self, root, content, columns):
        assert self.message(root, content) == f" has the columns {columns!r}; must be file,client"

    @pytest.mark.parametrize(
        "row", ["train/cat/b.png", "train/cat/b.png,", ",bo", "train/cat/b.png,bo,1"]
    )
    def test_a_row_of_another_form(self, root, row):
        found = self.message(root, self.rows("train/cat/a.png,al", row))
        assert found == ", line 3 must be a file and its client, both not empty"

    @pytest.mark.parametrize("path", ["cat/a.png", "train\\cat\\a.png", "train/.DS_Store"])
    def test_an_unknown_file(self, root, path):
        save(root, "train/.DS_Store", b"")
        found = self.message(root, self.rows(f"{path},al"))
        assert found == (
            f", line 2 names {path!r}, which is no image here; must be as in train/CLASS/FILE,"
            " with forward slashes"
        )

    def test_a_file_named_twice(self, root):
        found = self.message(root, self.rows("train/cat/a.png,al", "train/cat/a.png,bo"))
        assert found == ", line 3 names train/cat/a.png a second time"

    @pytest.mark.parametrize("missing", ["train/cat/b.png", "test/dog/e.png"])
    def test_images_without_a_client(self, root, missing):
        rows = [f"{path},al" for path in PATHS if path != missing]
        assert self.message(root, self.rows(*rows)) == (
            f" names no client for {missing}; must name one for every training image, and for every"
            " test image or none"
        )

    def test_no_file(self, root):
        place = root / "clients.csv"
        for make in (place.mkdir, lambda: os.mkfifo(place), lambda: place.symlink_to("gone.csv")):
            make()
            assert message(root) == "clients.csv must be a file, or not be there"
            if place.is_dir():
                place.rmdir()
            else:
                place.unlink()

    def test_an_open_quote(self, root):
        assert self.message(root, self.rows('train/cat/a.png,"al')).startswith(" can't be read: ")

    def test_another_encoding(self, root):
        found = self.message(root, self.rows("train/cat/a.png,Zoë"), "latin-1")
        assert found.startswith(" can't be read: 'utf-8' codec can't decode")


def test_the_source_is_registered_and_needs_a_location():
    loader, arguments = registry.find_dataset("folder:some/place")
    assert (loader, arguments) == (folder, ("some/place",))
    assert set(registry.options(loader).model_fields) == {"flip", "size", "grey"}


def natural_clients_train_on_their_own(**data):
    """Run a source of two clients.

    al has one cat and is tested on an ape; bo has a cat and a dog and is tested on a dog.
    """
    result = fedsim.simulate(
        fedsim.Experiment(
            data=data,
            clients={"count": 2, "partition": "group"},
            model={"name": "linear"},
            training={"rounds": 1, "participation": 1.0, "batch_size": 1},
            evaluation={"every": 1},
            engine={"backend": "inline"},
        )
    )
    held = result.partition[["client", "class", "labelled", "test"]]
    assert held.to_numpy().tolist() == [[0, 0, 0, 1], [0, 1, 1, 0], [1, 1, 1, 0], [1, 2, 1, 1]]
    assert result.rounds["failures"].tolist() == [0]


def test_each_natural_client_trains_on_its_own_images(root):
    groups(root, ["bo", "al", "bo", "al", "bo"])
    natural_clients_train_on_their_own(source=f"folder:{root}", size=3)
