"""C++ for the CPU: compiled by the user's compiler on first use, and kept in the user's cache folder.

    library("int4_linear")    # csrc/int4_linear.cpp as a ctypes.CDLL, or None: use torch's own operators

A plain C interface without torch's headers compiles in seconds, and is bound to no version of Python or torch. It is
compiled for the CPU at hand (-march=native), so the file's name is a hash of the sources, the compiler, the flags and
the CPU: whatever changes, another file is made.

Two processes at once: the second waits for the first at a lock file. A compiler that is killed leaves nothing that
would be taken for a library: files are renamed into place when they are complete, and the checksum beside a library is
compared before it is loaded, since a truncated one could end the process.

Where it does not work (no compiler, another processor, a folder that cannot be written), one RuntimeWarning says why.
LLMCOMPRESS_CPU_EXTENSION=0 switches it off without a word.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
SWITCH = "LLMCOMPRESS_CPU_EXTENSION"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-exceptions", "-fvisibility=hidden")
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
SECONDS = 120  # a compiler that takes longer is stopped


class Unavailable(Exception):
    """Why there is no library."""


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """csrc/`name`.cpp, compiled. None if it is switched off, or, after one warning, if it cannot be had."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        check_openmp()
        return load(SOURCES / f"{name}.cpp", FLAGS)
    except (Unavailable, OSError) as problem:
        warnings.warn(
            f"llmcompress_kernels: {name} was not compiled: {problem}. Slower operators of torch are used instead; "
            f"{SWITCH}=0 silences this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def check_openmp() -> None:
    """Raises Unavailable if this process has no OpenMP with the functions that csrc/common.h leaves to be found.

    The libraries are linked with none on purpose: the one that torch has loaded for all to see has the threads.
    """
    process = ctypes.CDLL(None)
    missing = [name for name in OPENMP if not hasattr(process, name)]
    if missing:
        raise Unavailable(f"torch has loaded no OpenMP library with {' and '.join(missing)}, as GNU's and LLVM's have")


def load(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of one source file, compiled unless the cache has it. Raises Unavailable, or OSError from files."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"this is {sys.platform} on {platform.machine()}, and there is code for linux on x86_64")
    compiler = find_compiler()
    path = cache_folder() / f"{source.stem}-{fingerprint(source, compiler, flags)}.so"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_owner(path.parent)
    if not is_whole(path):
        with locked(path.with_suffix(".lock")):
            if not is_whole(path):
                build(source, compiler, flags, path)
    return ctypes.CDLL(str(path))


def find_compiler() -> Path:
    """$CXX, g++, clang++ or c++. Raises Unavailable without one."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["g++", "clang++", "c++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise Unavailable(f"no C++ compiler ({' or '.join(names)}) was found; install g++")
    return Path(found)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/llmcompress, or ~/.cache/llmcompress. Raises Unavailable where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "llmcompress"
    except RuntimeError as problem:
        raise Unavailable("this user has no home folder; set XDG_CACHE_HOME") from problem


def check_owner(folder: Path) -> None:
    """Raises Unavailable if somebody else could have put a library into a folder."""
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o002:
        raise Unavailable(f"others may write to {folder}; make it yours alone, or set XDG_CACHE_HOME")


def fingerprint(source: Path, compiler: Path, flags: tuple[str, ...]) -> str:
    """A hash of everything that the library depends on."""
    real = compiler.resolve()
    state = real.stat()
    digest = hashlib.sha256(repr((str(real), state.st_size, state.st_mtime_ns, flags, processor())).encode())
    for file in sorted(source.parent.iterdir()):
        if file == source or file.suffix == ".h":
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:32]


@functools.cache
def processor() -> str:
    """Model and features of the first CPU, as Linux lists them; elsewhere what Python knows of it."""
    wanted: dict[str, str] = {}
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "flags"):
            wanted[key.strip()] = value.strip()
        if not line.strip():
            break
    return repr(wanted or (platform.machine(), platform.processor()))


@functools.cache
def sources() -> str:
    """A hash of all code in csrc/."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir()))).hexdigest()


def checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def is_whole(path: Path) -> bool:
    """Whether the library is there with the checksum that was written after it."""
    try:
        return checksum_file(path).read_text(encoding="utf-8") == checksum(path)
    except (OSError, UnicodeDecodeError):
        return False


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file; the system releases it if the process dies."""
    import fcntl  # which Windows lacks

    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(source: Path, compiler: Path, flags: tuple[str, ...], path: Path) -> None:
    """Compile `source` to `path`, beside its checksum."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        made, digest = Path(folder) / "made.so", Path(folder) / "made.sha256"
        run([compiler, *flags, source, "-o", made])
        digest.write_text(checksum(made), encoding="utf-8")
        os.replace(made, path)
        os.replace(digest, checksum_file(path))


def run(command: list[str | Path]) -> None:
    """Run a compiler. Raises Unavailable with its first error."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as failed:
        lines = failed.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise Unavailable(f"{command[0]} failed: {first.strip()}") from failed
    except subprocess.TimeoutExpired as slow:
        raise Unavailable(f"{command[0]} took longer than {SECONDS} seconds") from slow
