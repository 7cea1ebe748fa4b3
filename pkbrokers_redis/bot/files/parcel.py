"""A file as Telegram takes it: zipped, in parts of a size, with the checksum of the whole."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory


@dataclass(frozen=True, slots=True)
class Parcel:
    """A zip on disk. `name` is what it is called in the chat."""

    path: Path
    name: str
    size_bytes: int
    sha256: str
    part_bytes_max: int

    @property
    def parts_total(self) -> int:
        return max(1, -(-self.size_bytes // self.part_bytes_max))

    def part_name(self, number: int) -> str:
        """`ticks.json.zip`, or `ticks.json.part01.zip`: `cat` with a `*` joins them in their order."""
        if self.parts_total == 1:
            return self.name
        digits = max(2, len(str(self.parts_total)))
        return f"{self.name.removesuffix('.zip')}.part{number:0{digits}d}.zip"

    def parts(self) -> Iterator[tuple[int, str, bytes]]:
        """`(number from 1, name, content)`, one in memory at a time."""
        with self.path.open("rb") as file:
            for number in range(1, self.parts_total + 1):
                yield number, self.part_name(number), file.read(self.part_bytes_max)


@contextmanager
def packed(paths: Sequence[Path], title: str, root: Path, part_bytes_max: int) -> Iterator[Parcel]:
    """Zip files into a temporary folder that is gone afterwards. One file is named `title` inside."""
    with TemporaryDirectory(prefix="pkb-bot-") as folder:
        target = Path(folder) / "parcel.zip"
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for path in paths:
                inside = path.name if len(paths) == 1 else str(path.relative_to(root))
                archive.write(path, inside)
        with target.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        yield Parcel(target, f"{title}.zip", target.stat().st_size, digest, part_bytes_max)
