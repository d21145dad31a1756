"""Objects of the stores that fsspec knows (s3://, gs://, https://): listed, and read by ranges.

An object is told from a later one of its name by its size and what its store says of its content;
whatever is read is taken only if that is still so afterwards.
"""

import io
import os
import posixpath
import re
import time
from collections.abc import Callable
from typing import Any

from plainllama.settings import Incomplete, UserError

WAITS = (1, 3, 9)  # seconds before a failed request is made again
FIRST, MOST = 64 << 10, 8 << 20  # bytes of a request: more each time, as long as they follow
# what tells an object's content, the best first, as the stores call it
TELLS = ("generation", "ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified",
         "last_modified", "mtime", "created")
NEVER = (UserError, Incomplete, FileNotFoundError, PermissionError, NotADirectoryError,
         NotImplementedError, ImportError, ValueError)  # errors that do not pass


class Url(str):
    """The address of an object, and what it was when it was surveyed."""

    size = 0  # bytes
    stamp = ""  # these, and what tells its content


def is_url(path: str) -> bool:
    """Whether a source lies in a store; hf:NAME does not, and no C:\\ does."""
    return bool(re.match(r"[a-z][a-z0-9+.-]+://", path))


def name_of(path: str) -> str:
    """Give a path without the query of an address, such as a signature."""
    return path.partition("?")[0] if re.match("https?://", path) else path


def store_of(url: str) -> tuple[Any, str]:
    """Give the store of an address, and the object's name there. UserError without its package."""
    import fsspec

    scheme = url.partition("://")[0]
    options: dict = {"use_listings_cache": False}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            patience = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
            options |= {"headers": {"Accept-Encoding": "identity"},
                        "client_kwargs": {"timeout": patience, "trust_env": True}}
        return fsspec.core.url_to_fs(url, **options)
    except ValueError:
        raise UserError(f"{url}: no store is known that begins with {scheme}://") from None
    except ImportError:
        from fsspec.registry import known_implementations

        module = known_implementations[scheme]["class"].partition(".")[0]
        package = f"'fsspec[{scheme}]'" if module == "fsspec" else module
        raise UserError(f"{url} needs a package: python -m pip install {package}") from None


def listed(url: str) -> tuple[Any, dict[str, str], bool]:
    """List {label: name} of an object, of all below a folder but the hidden, or of those that a
    glob meets; give their store before, and whether it is a folder behind. The labels are those of
    the same files on a disk."""
    (store, name), web, folder = store_of(url), url.startswith("http"), False
    if re.search(r"[*[]" if web else r"[*?[]", name):
        found, root = asked(url, store.glob, name, detail=True), ""
    elif url.endswith("/") or asked(url, store.info, name)["type"] == "directory":
        found, root = asked(url, store.find, name, detail=True), name_of(name).rstrip("/")
        folder = True
    else:
        found, root = {name: {}}, ""
    names = [name for name, info in found.items() if info.get("type") != "directory"]
    root = root or posixpath.commonpath([posixpath.dirname(name_of(name)) for name in names] or "/")
    labels = {posixpath.relpath(name_of(name), root): name for name in names}
    return store, {label: name for label, name in labels.items()
                   if not re.search(r"(^|/)\.", label)}, folder


def surveyed(store: Any, name: str) -> Url:
    """Give an object's address with what the store says of it now."""
    url = Url(name if "://" in name else store.unstrip_protocol(name))
    info = asked(url, store.info, name)
    if info.get("size") is None or info.get("partial") is False:
        raise UserError(f"{url}: its server gives no size or no ranges of bytes; download it")
    url.size, url.stamp = int(info["size"]), stamp_of(info)
    return url


def stamp_of(info: dict) -> str:
    """Tell an object from a later one of its name, by what its store says of it."""
    told = [f"{key} " + str(info[key]).strip('"') for key in TELLS if info.get(key)]
    return ", ".join([f"{info.get('size')} bytes", *told[:1]])


def asked(what: str, call: Callable, *args: Any, refused: type[Exception] = UserError,
          **options: Any) -> Any:
    """call(...), as again() has it. What it raises is one line that names `what`: Incomplete if it
    may pass, else `refused`."""
    try:
        return again(what, call, *args, **options)
    except (UserError, Incomplete):
        raise
    except Exception as error:  # whatever the libraries of the stores raise
        if not may_pass(error):
            raise refused(f"{what}: {line_of(error)}") from None
        raise Incomplete(f"{what}: {line_of(error)}, {len(WAITS) + 1} times; the same command goes "
                         "on from what is complete") from None


def again(what: str, call: Callable, *args: Any, **options: Any) -> Any:
    """call(...), made again after WAITS where it fails and that may help."""
    for seconds in (*WAITS, None):
        try:
            return call(*args, **options)
        except Exception as error:
            if seconds is None or not may_pass(error):
                raise
            print(f"{what}: {line_of(error)}; again in {seconds} s", flush=True)
            time.sleep(seconds)


def line_of(error: BaseException) -> str:
    """Name an error, or what has caused it, in a line."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def may_pass(error: Exception) -> bool:
    """Whether a request that failed may succeed later, by what its server said."""
    cause: Any = error.__cause__ or error  # of a FileNotFoundError too
    answer = getattr(cause, "response", None)
    if isinstance(answer, dict):  # of S3
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(cause, "status", None) or getattr(answer, "status_code", None)
    if isinstance(status, int):
        return status >= 500 or status in (408, 429)
    offline = type(cause).__name__ == "OfflineModeIsEnabled"  # of the hub
    return not offline and not isinstance(cause, NEVER)


def look_at(path: str) -> int | str:
    """Tell what lies at a path or address now: a file's size, or an object's stamp."""
    if not is_url(path):
        return os.stat(path).st_size
    store, name = store_of(path)
    return surveyed(store, name).stamp


class Stream(io.RawIOBase):
    """The bytes of an object, read by ranges, each made again where it fails. Incomplete for what
    fails on and on, or is no longer what was surveyed."""

    def __init__(self, url: Url):
        self.url, self.at, self.ahead = url, 0, FIRST
        self.block = memoryview(b"")  # what has come from `at` on
        self.store, self.name = store_of(url)

    def readable(self) -> bool:
        """Say that it is for reading."""
        return True

    def seekable(self) -> bool:
        """Say that it may be read from anywhere."""
        return True

    def tell(self) -> int:
        """Give the place of the next byte."""
        return self.at

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a place, counted from the start, from here or from the end."""
        place += (0, self.at, self.url.size)[whence]
        ahead = place - self.at
        inside = 0 <= ahead <= len(self.block)
        self.block = self.block[ahead:] if inside else memoryview(b"")
        self.at, self.ahead = place, self.ahead if inside else FIRST
        return place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return how many bytes are new, 0 at the end."""
        if not self.block and self.at < self.url.size:
            self.block = memoryview(asked(f"{self.url} at byte {self.at:,}", self.fetch,
                                          refused=Incomplete))
            self.ahead = min(2 * self.ahead, MOST)
        count = min(len(buffer), len(self.block))
        buffer[:count], self.block = self.block[:count], self.block[count:]
        self.at += count
        return count

    def fetch(self) -> bytes:
        """Read a block of the object as it was surveyed."""
        count = min(self.ahead, self.url.size - self.at)
        with self.store.open(self.name, "rb", cache_type="none", size=self.url.size) as file:
            file.seek(self.at)
            try:
                data = file.read(count)
            except ValueError:
                if not self.url.startswith("http"):
                    raise
                raise UserError(f"{self.url}: its server sends no ranges of bytes; download "
                                "it") from None
        now = stamp_of(self.store.info(self.name))
        if now != self.url.stamp:
            raise Incomplete(f"{self.url} has changed since it was surveyed: {self.url.stamp}, now "
                             f"{now}; bring that one back, or begin another data set")
        if len(data) != count:  # cut short, or no range of it but some page
            raise EOFError(f"{len(data):,} bytes have come of {count:,}")
        return data
