"""Documents that end with their checksum; errors of writing that say what to do."""

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import files

plain = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3)


@given(st.lists(plain.filter(lambda document: document and "sha256" not in document), min_size=1, max_size=4))
def test_what_is_sealed_comes_back_in_its_order_alone(documents):
    checksums, texts = [""], []
    for document in documents:
        text, checksum = files.sealed(json.dumps(document), checksums[-1])
        checksums.append(checksum)
        texts.append(text)
    for text, before, after, document in zip(texts, checksums, checksums[1:], documents, strict=False):
        assert json.loads(text) == {**document, "sha256": after}
        assert files.unsealed(text, before) == (document, after)
        with pytest.raises(ValueError, match="sha256"):
            files.unsealed(text, "0" * 64)


def test_the_reason_the_size_and_the_room_are_in_the_error(tmp_path):
    target = tmp_path / "file"
    said = r"file was not written\. 12,345 bytes were"
    with pytest.raises(OSError, match=said) as raised, files.explained(target, 12345):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.errno == errno.ENOSPC
    assert "bytes are free" in str(raised.value)
    with pytest.raises(PermissionError), files.explained(target):
        raise PermissionError(errno.EACCES, "no")


def test_a_folder_that_is_not_there_is_named_with_the_room_on_its_disk(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent/deep/file was not written"):
        files.write_atomically(tmp_path / "absent" / "deep" / "file", b"")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file"):
        files.read(tmp_path / "pipe")


def test_new_files_obey_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
