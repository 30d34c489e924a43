"""The text of a policy: its file and the modules that it imports, as they were when it was accepted.

Theory of operation
    A policy comes into force at a start or a reload, by order of the administrator.  A worker that
    replaces a crashed one must follow the same text, whatever lies on disk by then: a draft, a file
    half copied, nothing at all.  So the first worker of a text keeps what it read while it loaded
    (PolicyTexts), seals it into a memory file and sends that to the master, which keeps the
    descriptor and never looks inside; a replacement gets it by its fork, and loads from it alone.

    What counts as text are source and byte code files, of the policy and of every module found in
    its directory, in /etc/zorp, or in a place that the policy itself adds to sys.path; of a zip
    file there, the file.  Hooks of the import system (_Finder, _ArchiveFinder) read these places:
    from disk at a load that was ordered, from the accepted text at a replacement.  There a module
    that was not found at the acceptance is not found now either.  Lines of a traceback are those
    of the text that runs (linecache), too.

    Not kept: what Python and its packages are, PYTHONPATH among them; extension modules; files
    that the policy opens or runs itself; modules that are first imported when the load has ended,
    by a callback.  These are as they lie on disk at that moment, in every worker.

    Byte code beside the source is never used: its time stamp counts whole seconds, and an edit
    within the same second would be missed.

For the main thread, while it loads; imports of later threads only read what does not change.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import io
import json
import linecache
import os
import stat
import sys
import zipfile
from collections.abc import Callable, Collection

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_READ_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class AcceptedText:
    """What a policy was when it came into force."""

    file_stamp: int                  # modification time of the policy file, epoch seconds
    files: dict[str, bytes]          # content by path

    def seal(self) -> int:
        """Return the descriptor of a memory file with all of it, which nobody can change.  Raises OSError."""
        texts = {path: data.decode("latin-1") for path, data in self.files.items()}
        descriptor = os.memfd_create("policy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(json.dumps({"file_stamp": self.file_stamp, "files": texts}).encode("ascii"))
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    @classmethod
    def unseal(cls, descriptor: int) -> AcceptedText:
        """Read what seal() wrote; the descriptor stays open."""
        size = os.fstat(descriptor).st_size
        data = b""
        while len(data) < size and (part := os.pread(descriptor, _READ_BYTES, len(data))):
            data += part
        content = json.loads(data)
        return cls(content["file_stamp"], {path: text.encode("latin-1") for path, text in content["files"].items()})

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file."""
        return {path: hashlib.sha256(data).hexdigest() for path, data in self.files.items()}

    def changed_files(self) -> list[str]:
        """Return the files that are not on disk as they are here."""
        return [path for path, data in self.files.items() if _content_of(path) != data]


def _content_of(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


class WritableByAnybody(OSError):
    """The file may be written by everybody."""


class PolicyTexts:
    """Where a load gets its texts, and what it got: from disk, or what was accepted before."""

    def __init__(self, path: str, directories: tuple[str, ...], accepted: AcceptedText | None = None) -> None:
        """directories: where modules are looked for first; accepted: load this instead of what is on disk."""
        self._path = path
        self._directories = directories
        self._accepted = accepted
        self._own_places: tuple[str, ...] = ()
        self._files: dict[str, bytes] = {}
        self._is_loading = False
        self.file_stamp = -1 if accepted is None else accepted.file_stamp

    def begin(self) -> None:
        """Let imports come through us from now on."""
        self._own_places = tuple(place for place in sys.path if place and place not in self._directories)
        sys.path[:0] = [directory for directory in self._directories if directory not in sys.path]
        sys.path_hooks.insert(0, self._finder_of)
        for place in filter(self.is_ours, list(sys.path_importer_cache)):
            del sys.path_importer_cache[place]
        self._is_loading = True

    def end(self) -> AcceptedText:
        """The load has ended: return what it was made of, and keep nothing of it."""
        self._is_loading = False
        text = self._accepted or AcceptedText(self.file_stamp, self._files)
        self._accepted, self._files = None, {}
        return text

    @property
    def accepted(self) -> AcceptedText | None:
        """The text of a replacement while it loads; None: texts are read from disk."""
        return self._accepted

    def is_ours(self, place: str) -> bool:
        """Return whether modules of this directory are text of the policy: the nearest known place decides."""
        def is_below(directory: str) -> bool:
            return place == directory or place.startswith(directory.rstrip("/") + "/")

        if not isinstance(place, str) or not place:
            return False
        nearest = max(filter(is_below, (*self._directories, *self._own_places)), key=len, default=None)
        return nearest not in self._own_places

    def read_policy(self) -> bytes:
        """Return the policy file.  Raises OSError, WritableByAnybody."""
        if self._accepted is None:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())     # before the content: an edit meanwhile must show as not reloaded
                if status.st_mode & stat.S_IWOTH:
                    raise WritableByAnybody
                self.file_stamp = int(status.st_mtime)
                self._files[self._path] = file.read()
        return self.read(self._path)

    def read(self, path: str) -> bytes:
        """Return the content of one file of the policy.  Raises OSError."""
        source = self._files if self._accepted is None else self._accepted.files
        data = source.get(path)
        if data is None:
            with open(path, "rb") as file:
                data = file.read()
            if self._is_loading:
                self._files[path] = data
        if path == self._path or path.endswith(".py"):
            _show_in_tracebacks(path, data)
        return data

    def _finder_of(self, place: str) -> _Finder | _ArchiveFinder:
        """The hook of the import system.  Raises ImportError for places that are not ours."""
        if not self.is_ours(place):
            raise ImportError(f"no place of the policy: {place}", path=place)
        archive = self._archive_of(place)
        if archive is None:
            return _Finder(self, place)
        if self._accepted is None and not zipfile.is_zipfile(archive):
            raise ImportError(f"neither a directory nor a zip file: {archive}", path=place)
        return _ArchiveFinder(archive, self.read(archive), place)

    def _archive_of(self, place: str) -> str | None:
        """Return the file that this place is, or that it is a directory in."""
        is_file = os.path.isfile if self._accepted is None else self._accepted.files.__contains__
        while not is_file(place):
            above = os.path.dirname(place)
            if above in ("", place):
                return None
            place = above
        return place


def _show_in_tracebacks(path: str, data: bytes) -> None:
    """Let tracebacks show these lines, also when the file changes."""
    try:
        text = importlib.util.decode_source(data)
    except (UnicodeDecodeError, SyntaxError):
        text = data.decode("latin-1")
    never = None                         # compared with the disk
    linecache.cache[path] = (len(text), never, text.splitlines(keepends=True), path)


class _FromTexts:
    """The part of a loader that reads: from the policy's texts."""

    def __init__(self, read: Callable[[str], bytes], name: str, path: str) -> None:
        super().__init__(name, path)
        self._read = read

    def get_data(self, path):
        return self._read(path)


class _Source(_FromTexts, importlib.machinery.SourceFileLoader):
    """A module with its source."""

    def path_stats(self, path):
        raise OSError("byte code is not used")


class _ByteCode(_FromTexts, importlib.machinery.SourcelessFileLoader):
    """A module without its source."""


def _text_loaders(read: Callable[[str], bytes]) -> dict[str, Callable]:
    """Return what loads a module of each kind, by suffix, the better one first."""
    return {".py": functools.partial(_Source, read), ".pyc": functools.partial(_ByteCode, read)}


def _spec_among(files: Collection[str], directory: str, fullname: str, loaders: dict[str, Callable]):
    """Return the spec of a module of this directory when it is one of these files, else None."""
    base = os.path.join(directory, fullname.rpartition(".")[2])
    for stem, locations in ((os.path.join(base, "__init__"), [base]), (base, None)):
        for suffix, loader in loaders.items():
            path = stem + suffix
            if path in files:
                return importlib.util.spec_from_file_location(
                    fullname, path, loader=loader(fullname, path), submodule_search_locations=locations)
    if not any(path.startswith(base + os.sep) for path in files):
        return None
    spec = importlib.machinery.ModuleSpec(fullname, None)        # a directory without __init__
    spec.submodule_search_locations = [base]
    return spec


class _Finder(importlib.machinery.FileFinder):
    """The modules of one directory of the policy."""

    def __init__(self, texts: PolicyTexts, directory: str) -> None:
        self._texts = texts
        self._text_loaders = _text_loaders(texts.read)
        super().__init__(
            directory, (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
            *((loader, [suffix]) for suffix, loader in self._text_loaders.items()))

    def find_spec(self, fullname, target=None):
        if self._texts.accepted is None:
            return super().find_spec(fullname, target)
        accepted = _spec_among(self._texts.accepted.files, self.path, fullname, self._text_loaders)
        return accepted or self._extension_spec(fullname, target)

    def _extension_spec(self, fullname, target):
        spec = super().find_spec(fullname, target)
        is_extension = spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
        return spec if is_extension else None


class _ArchiveFinder:
    """The modules of one zip file of the policy, or of one directory in it; importlib.resources does not see them."""

    def __init__(self, archive: str, data: bytes, place: str) -> None:
        """data: what is in the file.  Raises ImportError."""
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except zipfile.BadZipFile as problem:
            raise ImportError(f"{problem}: {archive}", path=archive) from problem
        self._members = {os.path.join(archive, name): name for name in self._zip.namelist()}
        self._place = place

    def find_spec(self, fullname, target=None):
        return _spec_among(self._members, self._place, fullname, _text_loaders(self._read))

    def invalidate_caches(self) -> None:
        """Nothing to forget: the content is fixed."""

    def _read(self, path: str) -> bytes:
        """Return the content of one member.  Raises OSError."""
        if path not in self._members:
            raise FileNotFoundError(path)
        try:
            data = self._zip.read(self._members[path])
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as problem:      # damaged, foreign, encrypted
            raise OSError(f"{path}: {problem}") from problem
        if path.endswith(".py"):
            _show_in_tracebacks(path, data)
        return data
