"""Folders of images: which folders are sets and classes, what cannot be read, and what an image is read as."""

import os
import re
import socket
import unicodedata

import numpy
import pytest
import torch
from PIL import Image

from sparsity import data
from sparsity.data import disk, survey
from sparsity.data.picture import Reader, Unreadable, range_of
from sparsity.errors import ConfigError, DataError


def write_images(folder, classes=("cat", "dog"), num=6, size=(9, 7)):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(num):
            colour = (40 * index % 256, 100 * number % 256, 7)
            Image.new("RGB", size, colour).save(folder / name / f"{index}.png")


def write_sets(folder, **classes):
    for name, own in classes.items():
        write_images(folder / name, own, num=2)


def split(source, validation=0.0, seed=0):
    return data.split(source, validation=validation, seed=seed, normalize=None)


def folder(root, stream=False, size=(5, 4), channels=3, test=0.25, **more):
    return data.image_folder(root=str(root), size=list(size), channels=channels, test=test, stream=stream, **more)


def refusal(root, **more):
    with pytest.raises(DataError) as caught:
        folder(root, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_image_folder_splits_test_off(tmp_path):
    write_images(tmp_path)
    splits = split(folder(tmp_path), validation=2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (7, 2, 3)
    assert splits.input_shape == (3, 5, 4)
    assert split(folder(tmp_path, channels=1)).input_shape == (1, 5, 4)


def test_image_folder_with_its_own_sets(tmp_path):
    for name, num in (("train", 5), ("val", 2), ("test", 3)):
        write_images(tmp_path / name, num=num)
    splits = split(folder(tmp_path), validation=0.1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10, 4, 6)
    everything = split(folder(tmp_path), validation=0)
    assert everything.validation is None and len(everything.train) == 14


def test_streaming_gives_the_same_batches(tmp_path):
    write_images(tmp_path, num=9)
    held, streamed = (split(folder(tmp_path, stream=stream), validation=3) for stream in (False, True))
    assert isinstance(held.train, data.Images) and isinstance(streamed.train, data.Files)
    order = torch.stack([torch.randperm(len(held.train)) for _ in range(2)])
    batches = list(zip(held.train.batches(order, 4), streamed.train.batches(order, 4), strict=True))
    for one, other in batches:
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert one.images.shape[:2] == (2, len(held.train) % 4 or 4)


@pytest.mark.parametrize(
    ("classes", "num", "message"),
    [
        ((), 0, "holds no class folders"),
        (("cat",), 3, r"holds one class \('cat'\)"),
        (("cat", "dog"), 0, "at least one"),
    ],
)
def test_empty_and_one_class_folders(tmp_path, classes, num, message):
    write_images(tmp_path, classes, num)
    with pytest.raises(DataError, match=message):
        folder(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="is no folder: give a folder that holds"):
        folder(tmp_path / "nothing")


# --- which folders are sets and classes ------------------------------------------------------------------------------


HIDDEN = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".git")


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path):
    write_images(tmp_path)
    for name in HIDDEN:
        write_images(tmp_path, (name,), num=1)
        write_images(tmp_path / "cat", (name,), num=1)
    (tmp_path / ".empty").mkdir()
    for name in ("._0.png", ".hidden.jpg", "Thumbs.db", "desktop.ini"):
        (tmp_path / "dog" / name).write_bytes(b"\0\5\x16\7")
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    source = folder(tmp_path)
    assert source.classes == ["cat", "dog"] and len(source.train) + len(source.test) == 12 and source.notes == []


def test_folders_inside_classes_belong_to_them(tmp_path):
    write_images(tmp_path)
    write_images(tmp_path / "dog", ("young", "old"), num=2)
    write_images(tmp_path / "dog" / "young", ("white",), num=1)
    source = folder(tmp_path, stream=True)
    assert source.classes == ["cat", "dog"] and len(source.train) + len(source.test) == 17
    whole = disk.images_in(tmp_path, sets=None)
    inside = [os.path.relpath(path, tmp_path) for path in whole.paths[6:]]
    assert inside[6:] == [
        "dog/old/0.png",
        "dog/old/1.png",
        "dog/young/0.png",
        "dog/young/1.png",
        "dog/young/white/0.png",
    ]


def test_links_that_lead_back_end(tmp_path):
    write_images(tmp_path)
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "same").symlink_to(tmp_path / "cat")
    (tmp_path / "dog" / "self").symlink_to(tmp_path / "dog" / "self")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path.parent / "elsewhere")
    write_images(tmp_path.parent / "elsewhere", ("more",), num=3)
    (tmp_path / "emu").symlink_to(tmp_path.parent / "elsewhere" / "more")
    assert len(disk.images_in(tmp_path, sets=None).paths) == 15
    (tmp_path / "emu" / "cats").symlink_to(tmp_path / "cat")
    assert "of class cat too, by a link" in refusal(tmp_path)
    (tmp_path / "emu" / "cats").unlink()
    (tmp_path / "fox").symlink_to(tmp_path / "nowhere")
    assert "fox is a link to nothing" in refusal(tmp_path)


def test_accents_are_the_same_however_they_are_written(tmp_path):
    one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert one != other
    write_sets(tmp_path, train=(one, "tea"), test=(other, "tea"))
    source = folder(tmp_path)
    assert source.classes == [one, "tea"] and source.test.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("lacking", [("cat", "dog"), ("dog", "emu"), ("emu",)])
def test_a_class_that_a_set_lacks_shifts_no_label(tmp_path, lacking):
    write_sets(tmp_path, train=("cat", "dog", "emu"), val=lacking, test=("cat", "dog", "emu"))
    (tmp_path / "val" / "cat").mkdir(exist_ok=True)
    source = folder(tmp_path)
    names = [source.classes[label] for label in source.validation.labels]
    assert names == [name for name in lacking for _ in range(2)]
    notes = split(source, validation=0.1).notes
    missing = [name for name in ("cat", "dog", "emu") if name not in lacking]
    assert len(notes) == 1 and notes[0].startswith("validation has no image of") and all(m in notes[0] for m in missing)


def test_classes_that_train_lacks_are_refused_by_name(tmp_path):
    write_sets(tmp_path, train=("cat", "dog"), test=("Cat", "cat", "dog", "emu"))
    assert "test has classes that train lacks: Cat, emu (train has cat)" in refusal(tmp_path)


def test_class_folders_without_images_are_named(tmp_path):
    write_sets(tmp_path / "a", train=("cat", "dog"), test=("cat", "dog"))
    (tmp_path / "a/train/emu").mkdir()
    (tmp_path / "a/train/emu/0.heic").write_bytes(b"?")
    assert "the class folder emu of train holds no image (1 .heic): put at least one" in refusal(tmp_path / "a")
    write_sets(tmp_path / "b", train=("cat", "dog"))
    (tmp_path / "b/test/cat").mkdir(parents=True)
    assert "test holds no image" in refusal(tmp_path / "b")


@pytest.mark.parametrize(
    ("names", "read_as"),
    [
        (("Training", "testing", "DEV"), ("train", "test", "validation")),
        (("train", "Valid", "evaluation"), ("train", "validation", "test")),
        (("TRAIN", "Eval"), ("train", "test")),
        (("training_set", "test_set"), ("train", "test")),
        (("train2017", "val2017"), ("train", "validation")),
        (("trainset", "testset"), ("train", "test")),
    ],
)
def test_names_of_sets_in_any_case(tmp_path, names, read_as):
    for number, name in enumerate(names):
        write_images(tmp_path / name, ("0", "1"), num=2 + number)
    source = folder(tmp_path)
    assert source.classes == ["0", "1"]
    sizes = {name: 2 * (2 + number) for number, name in enumerate(read_as)}
    assert len(source.validation or ()) == sizes.get("validation", 0)
    if "test" in sizes:
        assert (len(source.train), len(source.test)) == (sizes["train"], sizes["test"])
    else:
        assert len(source.train) + len(source.test) == sizes["train"]


@pytest.mark.parametrize(
    "names",
    [("dev", "eval"), ("Test", "Val"), ("train", "Training"), ("test", "train", "eval"), ("seg_train", "seg_test")],
)
def test_sets_that_cannot_be_told_are_refused_by_name(tmp_path, names):
    write_sets(tmp_path, **dict.fromkeys(names, ("0", "1")))
    said = refusal(tmp_path)
    assert sum(name in said for name in names) >= 2


def test_sets_of_images_without_classes_are_no_classes(tmp_path):
    write_images(tmp_path, ("train", "test"))
    assert "holds no class folders" in refusal(tmp_path)
    write_images(tmp_path, ("bus",))
    assert "say data.loader.sets=false where train is a class" in refusal(tmp_path)
    assert folder(tmp_path, sets=False).classes == ["bus", "test", "train"]


def test_sets_inside_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        write_sets(tmp_path, **{name: ("train", "test")})
    assert re.search(r"the class .*cat holds sets \(test, train\)", refusal(tmp_path))
    assert len(folder(tmp_path, sets=False).classes) == 2


def test_a_folder_too_high_up_is_told(tmp_path):
    write_images(tmp_path / "pets")
    assert f"is it data.root={tmp_path}/pets?" in refusal(tmp_path)


def test_what_is_left_out_is_told(tmp_path):
    write_sets(tmp_path, train=("cat", "dog"), test=("cat", "dog"), unlabelled=("x",))
    Image.new("L", (3, 3)).save(tmp_path / "train" / "0.png")
    for number in range(3):
        (tmp_path / "train" / "cat" / f"{number}.HEIC").write_bytes(b"?")
    (tmp_path / "val").symlink_to(tmp_path / "test")
    notes = " | ".join(folder(tmp_path).notes)
    assert "unlabelled beside the sets is left out" in notes and "beside the class folders are left out" in notes
    assert "3 .heic" in notes and "val and test are the same folder" in notes


def test_folds_are_told(tmp_path):
    write_sets(tmp_path, fold1=("cat", "dog"), fold2=("cat", "dog"))
    assert folder(tmp_path).notes[0].endswith("all hold cat, dog: name sets train, test, val if these are the classes")
    (tmp_path / "fold1" / "cat").rename(tmp_path / "fold1" / "emu")
    assert folder(tmp_path).notes == []


def test_settings_that_the_folder_makes_no_use_of(tmp_path):
    write_sets(tmp_path, train=("cat", "dog"), test=("cat", "dog"), val=("cat", "dog"))
    kept, joined = (split(folder(tmp_path), validation=validation) for validation in (0.1, 0))
    assert {"data.validation", "data.loader.test", "data.loader.range", "data.loader.background"} < kept.idle.keys()
    assert "data.validation" not in joined.idle


# --- what cannot be read ---------------------------------------------------------------------------------------------


def damage(root):
    """Seven files that are no images, by what they are."""
    noise = numpy.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype="uint8")
    Image.fromarray(noise).save(root / "cat" / "cut.jpg")
    content = (root / "cat" / "cut.jpg").read_bytes()
    (root / "cat" / "cut.jpg").write_bytes(content[: len(content) // 2])
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "cat" / "page.jpg").write_bytes(b"<html><body>not found</body></html>")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "folder.png").mkdir()
    (root / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "dog" / "device.png").symlink_to("/dev/zero")
    return {
        "cut.jpg": "cut short",
        "empty.png": "an empty file",
        "page.jpg": "no image of a known format",
        "pipe.png": "a pipe",
        "folder.png": "a folder",
        "gone.png": "a link to nothing",
        "device.png": "a device",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_everything_that_cannot_be_read_is_named_at_once(tmp_path, stream):
    write_images(tmp_path)
    reasons = damage(tmp_path)
    said = refusal(tmp_path, stream=stream)
    assert "7 of 19 images cannot be read: cat/cut.jpg (cut short), cat/empty.png (an empty file)" in said
    assert "and 4 more: mend or remove them" in said
    for path in sorted(tmp_path.glob("*/*")):
        if path.name in reasons:
            with pytest.raises(Unreadable) as caught:
                Reader((5, 4), 3, "white")(str(path))
            assert caught.value.why == reasons[path.name]


@pytest.mark.slow
def test_sockets_and_large_images_are_refused_by_what_they_are(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("cat/socket.png")
        assert "1 of 13 images cannot be read: cat/socket.png (a socket): mend or remove it" in refusal(tmp_path)
    os.remove("cat/socket.png")
    Image.new("1", (20_000, 10_000)).save("dog/huge.png")
    assert "dog/huge.png (too large: 200000000 pixels" in refusal(tmp_path)


def test_files_are_read_by_what_they_hold_and_never_run(tmp_path):
    write_images(tmp_path)
    Image.new("L", (9, 7), 3).save(tmp_path / "cat" / "0.png", format="GIF")
    assert len(folder(tmp_path).train) == 9
    Image.new("RGB", (9, 7)).save(tmp_path / "cat" / "0.png", format="EPS")  # read by Ghostscript, which runs it
    assert "cat/0.png (no image of a known format)" in refusal(tmp_path)


def test_names_that_cannot_be_printed_stay_in_one_line(tmp_path):
    write_images(tmp_path)
    (tmp_path / "cat" / "a\nb\x1b.png").write_bytes(b"")
    (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    said = refusal(tmp_path)
    said.encode("utf-8")
    assert r"a\nb\x1b.png" in said and r"\udcff.png" in said


def test_a_survey_that_took_long_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(survey, "WORTH_KEEPING", 0.0)
    root = tmp_path / "images"
    write_images(root)
    looked = []
    examine = survey.examine
    monkeypatch.setattr(survey, "examine", lambda *given: looked.append(given) or examine(*given))
    first, second = folder(root, stream=True), folder(root, stream=True)
    assert len(looked) == 12 and torch.equal(first.train.digests, second.train.digests)
    changed = root / "cat" / "0.png"
    times = changed.stat()
    content = bytearray(changed.read_bytes())
    content[-30] ^= 1
    changed.write_bytes(bytes(content))
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and time
    with pytest.raises(DataError, match=r"1 of 12 images cannot be read: cat/0.png"):
        folder(root, stream=True)
    next((tmp_path / "cache" / "sparsity").iterdir()).write_bytes(b"damaged")
    changed.write_bytes((root / "cat" / "1.png").read_bytes())
    assert len(folder(root, stream=True).train) == 9


# --- what an image is read as ----------------------------------------------------------------------------------------


def pixels_of(path, size, channels=1, background="white", ranges=None):
    return Reader(size, channels, background, ranges or {})(str(path))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(tmp_path, ending):
    shown = numpy.zeros((8, 16), "uint8")
    shown[:4, :8] = 255  # upper left
    upright = Image.fromarray(shown)
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how an image is stored, by PIL's transpositions
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(ending, {})
        stored.convert("RGB").save(tmp_path / f"0.{ending}", exif=exif, **options)
        read = pixels_of(tmp_path / f"0.{ending}", (8, 16))[0].float()
        assert (read - torch.from_numpy(shown)).abs().max() < 20, orientation


def test_damaged_notes_do_not_make_an_image_unreadable(tmp_path):
    Image.new("L", (9, 7), 50).save(tmp_path / "0.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert pixels_of(tmp_path / "0.png", (7, 9)).unique().tolist() == [50]


def write_ramps(root, save, *tops):
    """One image in each of two classes of train and test; the ramps reach from 0 to the tops."""
    ramp = numpy.repeat(numpy.arange(63)[None], 8, 0) / 62
    for part in ("train", "test"):
        for name, top in zip(("a", "b"), tops * 2):
            (root / part / name).mkdir(parents=True)
            save(ramp * top, root / part / name)


RAMPS = {
    "12 bits in 16": ("png", "uint16", 4095, [0, 4095]),
    "10 bits in 16": ("png", "uint16", 1023, [0, 1023]),
    "16 bits": ("png", "uint16", 65535, None),
    "the other order of bytes": ("tif", ">u2", 65535, None),
    "floats to 1": ("tif", "float32", 1, [0, 1]),
    "floats to 255": ("tif", "float32", 255, [0, 255]),
    "floats to 20": ("tif", "float32", 20, [0, 20]),
    "whole numbers to 200": ("tif", "int32", 200, [0, 255]),
    "whole numbers to 100000": ("tif", "int32", 100_000, [0, 100_000]),
}


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize("stream", [False, True])
def test_more_than_8_bits_by_their_range(tmp_path, kind, stream):
    ending, dtype, top, taken = RAMPS[kind]

    def save(pixels, place):
        Image.fromarray(pixels.astype(dtype)).save(place / f"0.{ending}")

    write_ramps(tmp_path, save, top)
    source = folder(tmp_path, stream, size=(8, 63), channels=1)
    row = next(source.train.batches(torch.zeros(1, 1, dtype=torch.long), 1)).images[0, 0, 0, 0].int()
    assert len(row.unique()) >= 60 and bool((row.diff() >= 0).all()) and row[0] == 0
    assert row[-1] == (200 if "200" in kind else 255)
    notes = " ".join(source.notes)
    assert ("data.loader.range" in notes) == (taken is not None)
    if taken:
        assert f"data.loader.range=[{taken[0]:g},{taken[1]:g}]" in notes


def test_the_range_is_that_of_all_images(tmp_path):
    def save(pixels, place):
        Image.fromarray(pixels.astype("uint16")).save(place / "0.png")

    write_ramps(tmp_path, save, 500, 4095)
    for stream in (False, True):
        batch = next(folder(tmp_path, stream, size=(8, 63), channels=1).train.batches(torch.arange(2)[None], 2))
        assert batch.images[0].amax((1, 2, 3)).tolist() == [500 >> 4, 255]
    given = folder(tmp_path, size=(8, 63), channels=1, range=[0, 500])
    assert given.train.images.amax((1, 2, 3)).tolist() == [255, 255] and given.notes == []


def test_16_bits_are_their_upper_8_and_floats_to_255_are_cut_as_ever(tmp_path):
    values = numpy.arange(0, 65536, 7, dtype="uint16")[:9300].reshape(93, 100)
    Image.fromarray(values).save(tmp_path / "0.png")
    read = pixels_of(tmp_path / "0.png", (93, 100), ranges={"I;16": (0, 65535)})
    assert torch.equal(read[0], torch.from_numpy((values >> 8).astype("uint8")))
    floats = numpy.linspace(0, 255, 9300, dtype="float32").reshape(93, 100)
    Image.fromarray(floats).save(tmp_path / "0.tif")
    read = pixels_of(tmp_path / "0.tif", (93, 100), ranges={"F": (0, 255)})
    assert torch.equal(read[0], torch.from_numpy(numpy.array(Image.fromarray(floats).convert("L"))))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 255, (0, 255)),
        (0, 20000, (0, 65535)),
        (-1000, 3000, (-1000, 3000)),
        (0, 9, (0, 9)),
        (0, 0, (0, 1)),
        (7, 7, (7, 8)),
        (-0.01, 1.02, (0, 1)),
        (0.5, 0.5, (0, 1)),
        (-1.0, 1.0, (-1, 1)),
        (0.25, 254.5, (0, 255)),
    ],
)
def test_ranges(low, high, expected):
    assert range_of(low, high) == expected


def test_dark_colours_of_16_bits_are_refused_by_their_mode(tmp_path):
    import struct
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def save(pixels, place):  # PIL writes no colours of 16 bits
        colours = numpy.repeat(pixels[..., None], 3, -1).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in colours)
        head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
        body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (place / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)

    write_ramps(tmp_path / "dark", save, 4095)
    assert "images of mode RGB;16 reach up to 6% of white" in refusal(tmp_path / "dark")
    assert folder(tmp_path / "dark", range=[0, 65535]).train.images.max() < 16
    write_ramps(tmp_path / "bright", save, 65535)
    assert folder(tmp_path / "bright", size=(8, 63)).train.images.max() == 255


def test_floats_that_are_not_finite_are_named(tmp_path):
    def save(pixels, place):
        Image.fromarray((pixels / pixels).astype("float32")).save(place / "0.tif")

    with numpy.errstate(invalid="ignore"):
        write_ramps(tmp_path, save, 1)
    assert "4 of 4 images cannot be read: test/a/0.tif (mode F with NaN or infinity)" in refusal(tmp_path)


def transparent_images():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    half.putpixel((0, 0), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.putpixel((0, 0), 0)
    grey = Image.new("L", (4, 4), 0)
    grey.putpixel((0, 0), 77)
    deep = Image.fromarray(numpy.array([[500] + [0] * 3] + [[0] * 4] * 3, dtype="uint16"))
    return [(clear, {}), (half, {}), (half.convert("LA"), {}), (palette, {"transparency": 0})] + [
        (each, {"transparency": value}) for each, value in ((grey, 77), (deep, 500))
    ]


@pytest.mark.parametrize("number", range(6))
def test_a_ground_is_seen_through_transparent_pixels(tmp_path, number):
    image, options = transparent_images()[number]
    image.save(tmp_path / "0.png", **options)
    ranges = {"I;16": (0, 65535)}
    for background, colour in (("white", [255, 255, 255]), ("black", [0, 0, 0]), ("#102030", [16, 32, 48])):
        read = pixels_of(tmp_path / "0.png", (4, 4), 3, background, ranges)
        assert read[:, 0, 0].tolist() == colour
        assert read[:, 1, 1].tolist() == (colour if number == 0 else [0, 0, 0])


def test_opaque_images_are_read_as_ever(tmp_path):
    noise = numpy.random.default_rng(0).integers(0, 256, (7, 9, 4), dtype="uint8")
    noise[..., 3] = 255
    image = Image.fromarray(noise)
    made = [image, image.convert("RGB"), image.convert("L"), image.convert("1"), image.convert("RGB").quantize(30)]
    for number, each in enumerate([*made, image.convert("LA")]):
        each.save(tmp_path / f"{number}.png")
        for channels, mode in ((1, "L"), (3, "RGB")):
            expected = torch.from_numpy(numpy.array(each.convert(mode))).view(7, 9, channels).permute(2, 0, 1)
            assert torch.equal(pixels_of(tmp_path / f"{number}.png", (7, 9), channels), expected)
    image.convert("CMYK").save(tmp_path / "0.tif")
    expected = torch.from_numpy(numpy.array(image.convert("CMYK").convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(pixels_of(tmp_path / "0.tif", (7, 9), 3), expected)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_the_first_frame_counts(tmp_path, ending):
    frames = [Image.new("RGB", (4, 4), (value,) * 3) for value in (0, 255, 128)]
    frames[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=frames[1:])
    assert pixels_of(tmp_path / f"0.{ending}", (4, 4)).max() < 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"background": "nothing"}, "data.loader.background=nothing is no colour"),
        ({"range": [5.0, 5.0]}, r"data.loader.range must be \[black, white\]"),
        ({"range": [1.0]}, r"data.loader.range must be \[black, white\]"),
        ({"channels": 2}, "data.loader.channels must be 1"),
        ({"size": (3,)}, "data.loader.size must be"),
    ],
)
def test_settings_are_checked(tmp_path, setting, message):
    write_images(tmp_path)
    with pytest.raises(ConfigError, match=message):
        folder(tmp_path, **setting)


# --- splits ----------------------------------------------------------------------------------------------------------


def test_random_splits_keep_every_class_in_train(tmp_path):
    labels = torch.tensor([0] * 57 + [1] * 2 + [2])
    for seed in range(20):
        kept, held = data.hold_out(labels, 12, seed)
        assert labels[kept].unique().tolist() == [0, 1, 2] and len(held) == 12
        assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(60))
        same = data.hold_out(labels, 12, seed)
        assert torch.equal(same[0], kept) and torch.equal(same[1], held)


def test_splits_that_lost_no_class_are_as_ever():
    labels = torch.arange(200) % 10
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    kept, held = data.hold_out(labels, 50, 3)
    assert torch.equal(kept, order[50:]) and torch.equal(held, order[:50])


def test_fewer_images_than_classes_are_told():
    images, labels = torch.rand(6, 3), torch.arange(6)
    splits = split(((images, labels), (images[:5], labels[:5]), 6), validation=4)
    assert len(splits.train) == 2 and "train has no image of 4 of 6 classes:" in splits.notes[0]
    assert splits.notes[-1] == "test has no image of class 5"
