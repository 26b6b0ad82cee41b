"""Shards as blocks: the row groups of parquet files, and pieces of tar files; indexed once, then opened one by one."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from hf_ssl_or.data.arguments import DataArguments
from hf_ssl_or.data.decode import progress_bar
from hf_ssl_or.data.hf_dataset import find_image_column
from hf_ssl_or.data.image_files import extension, image_extensions
from hf_ssl_or.data.pixel_store import replacing
from hf_ssl_or.data.remote import RemoteFile
from hf_ssl_or.data.webdataset import choose_image, is_visible_file, sample_and_field
from hf_ssl_or.errors import InputError
from hf_ssl_or.models.image_conversion import open_image

_LAYOUT = 2  # part of every index's name: a change of how blocks are cut makes older ones void
_TAR_BLOCK = 8 * 2**20  # bytes from which a piece of a tar file ends with the sample
_READ_AHEAD = 256 * 2**10  # bytes of a remote tar file that are read at a time for its headers
_CONNECTIONS = 16  # files that are indexed at a time
_DAMAGE = (pa.ArrowException, tarfile.TarError, OSError)  # what the readers say of foreign bytes
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """What is known of a shard without its images. It is stored as JSON.

    Attributes:
        column: Column of the images' bytes as parquet names it; of a tar file, the field that is read, or empty.
        blocks: Number of the row group or first byte of the piece, bytes in memory, and rows of each block.
    """

    column: str
    blocks: list[list[int]]


class OpenBlock:
    """The encoded images of a block.

    Args:
        rows: How many there are.
        content: Returns the bytes of a row's image; None where there are none.
        describe: Says where the image of a row is.
    """

    def __init__(
        self, rows: int, content: Callable[[int], bytes | memoryview | None], describe: Callable[[int], str]
    ) -> None:
        self.rows, self._content, self.describe = rows, content, describe

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Opens the image of row i."""
        content = self._content(i)
        if content is None:
            raise ValueError("the cell is empty")
        return open_image(content)


class DamagedBlock:
    """Stands for a block that cannot be opened: none of its images can be read."""

    def __init__(self, name: str, reason: str) -> None:
        self._name, self._reason = name, reason

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Raises what is wrong with the block."""
        raise ValueError(self._reason)

    def describe(self, i: int) -> str:
        """Returns the place of the damaged block."""
        return self._name


class Shards:
    """The blocks of a set of shards.

    Args:
        name: What the user calls the set.
        files: The shards.
        indexes: Their indexes.

    Attributes:
        rows_K: Rows of each block, at least 1.
        nbytes_K: Bytes of each in memory.
        first_K: Number of each one's first row in the whole set.
        fingerprint: Changes when the shards do.
    """

    def __init__(self, name: str, files: Sequence[RemoteFile], indexes: Sequence[ShardIndex]) -> None:
        self.name, self._files, self._columns = name, list(files), [index.column for index in indexes]
        blocks = [(shard, *block) for shard, index in enumerate(indexes) for block in index.blocks if block[2]]
        if not blocks:
            raise InputError(f"data.dataset: there is no image in {name}")
        self._shard_K, self._place_K, self.nbytes_K, self.rows_K = np.array(blocks, dtype=np.int64).T
        self.first_K = np.cumsum(self.rows_K) - self.rows_K
        digest = hashlib.blake2b(self.rows_K.tobytes(), digest_size=12)
        for file in files:
            digest.update(f"{os.path.basename(file.name)}:{file.size}:{file.tag}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self.first_K[-1] + self.rows_K[-1])

    def block_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the blocks of rows."""
        return np.searchsorted(self.first_K, rows, side="right") - 1

    def open(self, block: int) -> OpenBlock | DamagedBlock:
        """Reads a block; a damaged one opens as such.

        Raises:
            InputError: The shard is gone, or has changed, or cannot be reached.
        """
        file, column = self._files[self._shard_K[block]], self._columns[self._shard_K[block]]
        place, nbytes, rows = (int(values_K[block]) for values_K in (self._place_K, self.nbytes_K, self.rows_K))
        is_table = file.name.endswith(".parquet")
        where = (
            f"row group {place} of {file.name}" if is_table else f"bytes {place} to {place + nbytes} of {file.name}"
        )
        file.check()
        try:
            if is_table:
                opened = _open_group(file, place, column)
            else:
                opened = _open_piece(file, place, place + nbytes, column or None)
        except _DAMAGE as error:
            return DamagedBlock(where, _reason(error))
        if opened.rows != rows:
            return DamagedBlock(where, f"{opened.rows} images instead of {rows}")
        return opened


def index_shards(urls: Sequence[str], arguments: DataArguments, name: str) -> Shards:
    """Indexes shards, or reads what an earlier run wrote about the same files.

    Of a parquet file that takes the end, of a local tar file the headers, of a remote tar file most of its bytes.
    Each shard's index is kept, in the folder of the cache, under its address, size and tag.

    Raises:
        InputError: A shard is not there, or more than allowed cannot be read, or they hold no images.
    """
    found = []
    with ThreadPoolExecutor(_CONNECTIONS) as pool, progress_bar(f"indexing {name}", len(urls)) as advance:
        try:
            for one in pool.map(lambda url: _find_index(RemoteFile(url), arguments), urls):
                found.append(one)
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    damaged = [index for _, index in found if isinstance(index, str)]
    if len(damaged) > arguments.max_corrupt * len(urls):
        raise InputError(
            f"{name}: {len(damaged)} of {len(urls)} shards cannot be read, and data.max_corrupt="
            f"{arguments.max_corrupt:g} allows {int(arguments.max_corrupt * len(urls))}; the first is {damaged[0]}"
        )
    if damaged:
        _logger.warning("%s: left out %d unreadable shards: %s", name, len(damaged), "; ".join(damaged[:3]))
    sound = [(file, index) for file, index in found if isinstance(index, ShardIndex)]
    return Shards(name, [file for file, _ in sound], [index for _, index in sound])


def _find_index(file: RemoteFile, arguments: DataArguments) -> tuple[RemoteFile, ShardIndex | str]:
    """Returns a shard's index, or what is wrong with the shard."""
    key = f"{_LAYOUT}/{file.url}/{file.size}/{file.tag}/{arguments.image_column}"
    digest = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    path = arguments.cache_folder() / "shards" / f"{digest}.json"
    try:
        return file, ShardIndex(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass  # none yet, or a damaged one
    try:
        index = _scan_table(file, arguments) if file.name.endswith(".parquet") else _scan_tar(file, arguments)
    except _DAMAGE as error:
        return file, f"{file.name}: {_reason(error)}"
    write_json(path, json.dumps(asdict(index)))
    return file, index


def write_json(path: Path, content: str) -> None:
    """Writes a small file in one piece, whoever else writes it.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content.encode())
    except OSError as error:
        raise InputError(f"data.cache_dir: cannot write to {path.parent} ({error.strerror}); name another") from error


def _reason(error: BaseException) -> str:
    """Returns the first line of what a reader says, without the foreign bytes that it may quote."""
    words = "".join(sign for sign in str(error).strip().split("\n")[0] if sign.isprintable())
    return words or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Parquet: a block is a row group, of which the images' column is read


def _scan_table(file: RemoteFile, arguments: DataArguments) -> ShardIndex:
    with file.open() as stream:
        table = pq.ParquetFile(stream)
        column = find_image_column(datasets.Features.from_arrow_schema(table.schema_arrow), arguments)
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
    chunks = [{group.column(j).path_in_schema: group.column(j) for j in range(group.num_columns)} for group in groups]
    leaf = f"{column.name}.bytes" if column.holds_images else column.name
    if (
        column.inner is not None
        or not (column.holds_images or column.holds_bytes)
        or (chunks and leaf not in chunks[0])
    ):
        raise InputError(
            f"data.image_column: {column.name!r} of {file.name} holds no bytes of one image per row, which streaming "
            "reads; name another column, or leave out data.streaming"
        )
    sizes = [
        (chunk[leaf].total_uncompressed_size, group.num_rows) for chunk, group in zip(chunks, groups, strict=True)
    ]
    return ShardIndex(leaf, [[number, *size] for number, size in enumerate(sizes)])


def _open_group(file: RemoteFile, number: int, column: str) -> OpenBlock:
    with file.open() as stream:
        table = pq.ParquetFile(stream).read_row_group(number, columns=[column], use_threads=False)
    cells = table.column(0)
    while pa.types.is_struct(cells.type):  # of which only what leads to the bytes was read
        cells = pc.struct_field(cells, 0)
    return OpenBlock(len(cells), lambda i: cells[i].as_py(), lambda i: f"row {i} of row group {number} of {file.name}")


# ---------------------------------------------------------------------------------------------------------------------
# Tar files in the WebDataset layout: a block is a piece of several MiB from the beginning of a sample to another's


def _scan_tar(file: RemoteFile, arguments: DataArguments) -> ShardIndex:
    blocks, start, rows = [], 0, 0
    seen: set[str] = set()
    with io.BufferedReader(file.open(), 4096 if file.is_local else _READ_AHEAD) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for sample, images in _samples(archive):
                if sample in seen:
                    raise InputError(
                        f"data.dataset: in {file.name}, images of the sample {sample!r} are apart from each other; "
                        "write its files one after the other (tar --sort=name)"
                    )
                seen.add(sample)
                begin = images[0].offset
                if begin - start >= _TAR_BLOCK:
                    blocks.append([start, begin - start, rows])
                    start, rows = begin, 0
                names = [image.name for image in images]
                rows += choose_image(names, arguments.image_column, file.name) is not None
            end = archive.offset
        blocks.append([start, end - start, rows])
        stream.seek(end)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"cut off or damaged at byte {end:,}")
    return ShardIndex(arguments.image_column or "", blocks)


def _open_piece(file: RemoteFile, start: int, stop: int, image_field: str | None) -> OpenBlock:
    content = file.read(start, stop)
    chosen: list[tarfile.TarInfo] = []
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for _, images in _samples(archive):
            number = choose_image([image.name for image in images], image_field, file.name)
            chosen += [] if number is None else [images[number]]
    view, places = memoryview(content), [(image.offset_data, image.offset_data + image.size) for image in chosen]
    names = [image.name for image in chosen]
    return OpenBlock(len(chosen), lambda i: view[slice(*places[i])], lambda i: f"{names[i]} in {file.name}")


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Returns the images of each sample that has any, side by side in the file, with the sample's name."""
    known = image_extensions()
    images = (member for member in archive if is_visible_file(member) and extension(member.name) in known)
    for sample, members in itertools.groupby(images, lambda member: sample_and_field(member.name)[0]):
        yield sample, list(members)
