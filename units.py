"""Units: base SI inside (s, B, FLOP); GiB and GB are converted here and nowhere else."""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9

DTYPE_BYTES = {
    "float64": 8,
    "complex64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "complex128": 16,
}


def gib(n_bytes: float) -> float:
    """Bytes in GiB.

    >>> gib(3 * 2**30)
    3.0
    """
    return n_bytes / GIB


def format_bytes(n_bytes: float) -> str:
    """Bytes for people, in binary units.

    >>> format_bytes(1536)
    '1.5 KiB'
    >>> format_bytes(80 * 2**30)
    '80.0 GiB'
    """
    for unit, size in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds for people.

    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.1f} us"


def format_count(n: float) -> str:
    """A large count for people, in powers of a thousand.

    >>> format_count(8.03e9)
    '8.03 B'
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"
