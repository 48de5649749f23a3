"""Archives of CSV files and CSV files without a header: read as a stream, each record with its place."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from saferlhf.data import files
from saferlhf.data.report import short_place
from saferlhf.errors import UserError


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """A .tar.gz archive of these files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_members_are_read_one_after_the_other(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "a.tar.gz",
        {
            "b/two.csv": b"\xef\xbb\xbfprompt,note\nbread,x\n",
            "a/one.tsv": b'prompt\tnote\n"two\nlines"\ty\nsoup\tz\n',
            "a/readme.md": b"# no data",
            "a/packed.csv.gz": b"not read",
        },
    )
    found = list(files.read_records(path))
    assert [record.values for record in found] == [
        {"prompt": "bread", "note": "x"},
        {"prompt": "two\nlines", "note": "y"},
        {"prompt": "soup", "note": "z"},
    ]
    assert [record.place for record in found] == [f"{path}:b/two.csv:2", f"{path}:a/one.tsv:3", f"{path}:a/one.tsv:4"]
    assert [record.file for record in found] == ["b/two.csv", "a/one.tsv", "a/one.tsv"]
    assert [short_place(record.place) for record in found[:2]] == ["a.tar.gz:b/two.csv:2", "a.tar.gz:a/one.tsv:3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"], "nothing is unpacked to the disk"


def test_without_a_header_columns_have_numbers(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfbread,,\n\n"soup, hot",x\n'
    (tmp_path / "a.csv").write_bytes(content)
    plain = list(files.read_records(tmp_path / "a.csv", header=False))
    packed = list(files.read_records(pack(tmp_path / "a.tar.gz", {"en/a.csv": content}), header=False))
    expected = [{"1": "bread", "2": "", "3": ""}, {"1": "soup, hot", "2": "x"}]
    assert [record.values for record in plain] == [record.values for record in packed] == expected
    assert [record.place.rpartition(":")[2] for record in plain] == ["1", "3"]
    assert plain[0].file == (tmp_path / "a.csv").as_posix() and packed[0].file == "en/a.csv"


def test_what_is_no_regular_visible_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    secret = tmp_path / "secret.csv"
    secret.write_text("prompt\nnot for you\n")
    with tarfile.open(path, "w:gz") as archive:
        for name, kind in (
            ("soft.csv", tarfile.SYMTYPE),
            ("hard.csv", tarfile.LNKTYPE),
            ("pipe.csv", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        for name in ("._a.csv", "../up.csv", ".hidden/b.csv", "good/c.csv"):
            info = tarfile.TarInfo(name)
            info.size = len(b"prompt\nbread\n")
            archive.addfile(info, io.BytesIO(b"prompt\nbread\n"))
    assert [record.file for record in files.read_records(path)] == ["good/c.csv"]


def test_a_large_member_is_a_fault_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MEMBER_BYTES", 100)
    path = pack(tmp_path / "a.tar.gz", {"big.csv": b"prompt\n" + b"x" * 94, "small.csv": b"prompt\n" + b"x" * 93})
    big, small = files.read_records(path)
    assert big.fault is not None and not big.values
    assert "101 bytes, 100 at most" in str(big.fault) and f"{path}:big.csv" in str(big.fault)
    assert small.values == {"prompt": "x" * 93}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "broken archive"),
        ({"a.csv": b'prompt\n"open\n'}, "not CSV"),
        ({"a.csv": b"prompt\n\xff\n"}, "not UTF-8"),
        ({"a.txt": b"prompt\n"}, "no CSV file in this archive"),
        ({"bad\nname.csv": b"prompt\n\xff\n"}, "bad?name.csv"),
    ],
)
def test_broken_archives_are_one_line_with_a_place(
    tmp_path: Path, content: bytes | dict[str, bytes], message: str
) -> None:
    path = tmp_path / "a.tar.gz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pack(path, content)
    with pytest.raises(UserError) as caught:
        list(files.read_records(path))
    assert message in str(caught.value) and "a.tar.gz" in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_archive_is_broken(tmp_path: Path) -> None:
    noise = bytes(range(33, 127)) * 40
    path = pack(tmp_path / "a.tar.gz", {f"{i}.csv": b"prompt\n" + noise.replace(b'"', b"") for i in range(5)})
    whole = path.read_bytes()
    for kept in (len(whole) - 4, len(whole) - 60, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="broken archive"):
            list(files.read_records(path))


def test_an_archive_counts_where_a_folder_has_nothing_else(tmp_path: Path) -> None:
    pack(tmp_path / "all.tar.gz", {"a.csv": b"prompt\nbread\n"})
    assert [path.name for path in files.find_files(tmp_path).train] == ["all.tar.gz"]
    assert files.find_files(tmp_path / "all.tar.gz").train == (tmp_path / "all.tar.gz",)
    (tmp_path / "a.csv").write_text("prompt\nbread\n")
    assert [path.name for path in files.find_files(tmp_path).train] == ["a.csv"], "mostly the same files, unpacked"
