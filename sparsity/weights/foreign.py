"""What a file is that torch did not write: by what it is on the disk, its first bytes, and what an archive holds."""

import tarfile
import zipfile
from pathlib import Path

import torch

from sparsity import files

SAVE = "save its state_dict by torch.save(model.state_dict(), …)"
BEGINNINGS = (  # the first bytes, what begins so, and what to do
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "fetch it by git lfs pull"),
    (b"\x89HDF\r\n", "is an HDF5 file, as Keras writes", "give the weights of a torch module"),
    (b"\x93NUMPY", "is a NumPy array", f"put it into the module and {SAVE}"),
    (b"GGUF", "is a GGUF file of llama.cpp's", "give the weights of a torch module"),
    (b"\x1f\x8b", "is compressed by gzip", "unpack it"),
    (b"BZh", "is compressed by bzip2", "unpack it"),
    (b"\xfd7zXZ\x00", "is compressed by xz", "unpack it"),
    (b"(\xb5/\xfd", "is compressed by zstd", "unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive", "unpack it"),
    (b"Rar!", "is a RAR archive", "unpack it"),
    (b"%PDF", "is a PDF", "give the weights of a torch module"),
    (b"\x89PNG", "is a PNG image", "give the weights of a torch module"),
    (b"\xff\xd8\xff", "is a JPEG image", "give the weights of a torch module"),
    (b"\x7fELF", "is a program", "give the weights of a torch module"),
)
TORCH_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's number, pickled: what it wrote before version 1.6
MANY_BYTES = 512


def no_file(path: Path) -> str | None:
    """What keeps a path from being read as a file, or None."""
    try:
        if not path.exists():
            return f"is no file: {GIVE}"
        what = files.obstacle(path)
        inside = sorted(each.name for each in path.iterdir() if each.suffix in WEIGHTS) if path.is_dir() else []
    except (OSError, ValueError) as error:  # no permission; a name with a zero byte
        return f"is no file that can be read: {getattr(error, 'strerror', None) or error}"
    return what and f"is {what}, not a weights file: give {f'{inside[0]} in it' if inside else 'a file'}"


LONGEST_HEADER = 2**32  # eight letters of a text would be far more
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")


def begins_as_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < LONGEST_HEADER


def is_foreign(path: Path) -> str | None:
    """What a regular file is, and the remedy, if it is known to be of another kind than torch's; else None."""
    with path.open("rb") as file:
        head = file.read(MANY_BYTES)
    if not head:
        return "is empty: take another copy"
    for beginning, what, remedy in BEGINNINGS:
        if head.startswith(beginning):
            return f"{what}: {remedy}"
    if head[:4] == b"PK\x03\x04":
        return _zip(path)
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    if text[:1] == "<" and ("<html" in text.lower() or text.lower().startswith(("<!doctype", "<?xml"))):
        return "is a web page, not weights: the download led to a page; take the file itself"
    if head[4:8] == b"TFL3":
        return f"is a TFLite model: {GIVE}"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] in b"\x12\x1a\x3a\x42" and head[1] < 32):
        return f"is an ONNX model: {GIVE}"
    if _is_tar(path):
        return f"is a tar archive, as torch wrote before version 0.1.9: load it with torch, and {SAVE}"
    if head[:1] == b"\x80" and TORCH_LEGACY not in head[:40]:
        return f"is a pickle that torch.save did not write: {SAVE}"
    if _is_text(head):
        return f"is text that begins with {text.splitlines()[0][:40]!r}: {GIVE}" if text else "is text: " + GIVE
    return None


GIVE = "give a safetensors file or a state_dict saved by torch.save"


def _zip(path: Path) -> str | None:
    """What a zip archive is that is no file of torch.save's; whatever torch opens is asked in torch's own way."""
    try:
        records = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except Exception:  # a damaged one has it trip over whatever comes
        records = None
    if records is not None and "constants.pkl" in records:
        return f"is a TorchScript archive: {SAVE.replace('model', 'torch.jit.load(FILE)')}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if records is not None and "data.pkl" in records:
                return _changed(archive)
    except Exception:
        return "is damaged or cut short: take another copy"
    if names and all(name.endswith(".npy") for name in names):
        return f"is a NumPy archive (npz) of {', '.join(names[:3])}, …: put it into the module and {SAVE}"
    if any(name.endswith(("archive_format", "model.json")) for name in names):
        return f"is a program of torch.export's: {SAVE}"
    return f"is a zip archive of {', '.join(names[:3]) or 'nothing'}, not written by torch.save: {GIVE}"


def _changed(archive: zipfile.ZipFile) -> str | None:
    """That a record is not what its checksum says, which torch leaves unread; a writer may have left out all."""
    is_right = {entry.filename: _is_right(archive, entry) for entry in archive.infolist() if entry.CRC}
    wrong = [name for name, right in is_right.items() if not right]
    if not wrong or len(wrong) == len(is_right):
        return None
    return f"is damaged: {wrong[0]} in it is not what its checksum says; take another copy"


def _is_right(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as record:
            while record.read(READ_AT_A_TIME):
                pass
    except zipfile.BadZipFile:
        return False
    return True


READ_AT_A_TIME = 2**24


def _is_tar(path: Path) -> bool:
    """Whether torch would take the file for a tar archive, and unpack it."""
    try:
        tarfile.open(path, mode="r:").close()
    except tarfile.TarError:
        return False
    return True


def _is_text(head: bytes) -> bool:
    return not set(head) & (set(range(32)) - set(b"\t\n\r\f\x1b"))
