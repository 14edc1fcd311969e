"""`norm.c`, compiled for this machine by its own C compiler, each combination of dtypes and roundings when first used.

A compiled kernel is kept in the user's cache folder under a hash of everything it comes from: source, macros, compiler,
and the instructions of this processor, so that a home that several machines share is safe.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from normswap.errors import KernelError
from normswap.kernels.timing import cache_folder
from normswap.norms.spec import Casting, GainForm

_SOURCE = Path(__file__).with_name("norm.c")
_NAMES = {None: "NONE", torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
DTYPES = tuple(dtype for dtype in _NAMES if dtype is not None)
# no -ffast-math: infinities and NaN go through as they do in torch
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# the first that the compiler takes; 512 bits are 1.2 times as fast as its default of 256 on bf16 (Sapphire Rapids)
_MACHINE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())

pack = struct.Struct("10P3qPd").pack
"""`struct call` of norm.c: x, weight, bias, dy, y, dx, scale, mean, dgain, dbias (0 for none); rows, width, chunks; the
address of `GOMP_parallel`; eps."""


@dataclass(frozen=True)
class Variant:
    """What one compiled kernel computes.

    Attributes:
        x, y: dtypes of input and output.
        weight, bias: theirs, None where there is none.
    """

    kind: str
    gain: GainForm | None
    casting: Casting
    x: torch.dtype
    weight: torch.dtype | None
    bias: torch.dtype | None
    y: torch.dtype

    def macros(self) -> dict[str, str]:
        """Of `norm.c`. A half value is rounded on the way only where the module does so and the next step sees it."""
        through = {"ROUND_H": torch.float32, "ROUND_GAIN": torch.float32, "ROUND_PRODUCT": torch.float32}
        through["ROUND_SUM"] = torch.float32
        if self.casting == "float32-before-gain":
            through["ROUND_H"] = last = self.x
            if self.weight is not None:
                through["ROUND_GAIN"] = self.weight
                through["ROUND_PRODUCT"] = last = torch.promote_types(last, self.weight)
            if self.bias is not None:
                through["ROUND_SUM"] = last = torch.promote_types(last, self.bias)
            if last == self.y:  # the last rounding is that of the output
                final = "ROUND_H" if self.weight is None else "ROUND_PRODUCT"
                through["ROUND_SUM" if self.bias is not None else final] = torch.float32
        return {
            "X": _NAMES[self.x],
            "Y": _NAMES[self.y],
            "W": _NAMES[self.weight],
            "B": _NAMES[self.bias],
            "CENTRED": str(int(self.kind == "layernorm")),
            "ONE_PLUS": str(int(self.gain == "1 + w")),
            **{name: _NAMES[dtype] for name, dtype in through.items()},
        }


@cache
def load(variant: Variant) -> ctypes.CDLL:
    """The library with `forward` and `backward` (norm.c) for a variant; compiled, unless it was before.

    Raises:
        KernelError: there is no compiler, or it failed.
    """
    compiler, machine, identity = _compiler()
    macros = tuple(f"-D{name}={value}" for name, value in variant.macros().items())
    flags = (*_FLAGS, *machine, *macros)
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), identity, *flags]).encode()).hexdigest()[:32]
    folder = _folder()
    built = folder / f"norm-{key}.so"
    if not built.exists():
        # several processes may do this at once: each writes its own file, and the rename is atomic
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "norm.so"
            command = [*compiler, *flags, str(_SOURCE), "-lm", "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise KernelError(
                    f"{' '.join(compiler)} could not compile {_SOURCE.name}: {done.stderr.strip()[-500:]}"
                )
            made.replace(built)
    library = ctypes.CDLL(str(built))
    library.forward.argtypes = library.backward.argtypes = [ctypes.c_void_p]
    library.forward.restype = library.backward.restype = None
    return library


@cache
def available() -> str | None:
    """Why nothing can be compiled on this machine, and what to do; None where it can."""
    try:
        load(Variant("rmsnorm", "w", "float32", torch.float32, torch.float32, None, torch.float32))
    except (KernelError, OSError) as error:
        return str(error)
    return None


@cache
def threads_of_torch() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime that torch runs on; None where there is none to be seen.

    GNU's, LLVM's and Intel's runtimes all have it. Another copy of one would be a second pool of threads that spin on
    the same cores.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists() or "OpenMP" not in torch.__config__.parallel_info():
        return None
    found = re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)[-.\w]*\.so\S*)", maps.read_text())
    own = str(Path(torch.__file__).parent)
    for path in sorted(set(found), key=lambda path: not path.startswith(own)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


@cache
def _compiler() -> tuple[list[str], tuple[str, ...], str]:
    """The compiler, the flags it takes for this machine, and all it predefines with them: its version and the ISA."""
    if sys.platform == "win32":
        raise KernelError("normswap's CPU kernels are compiled by a Unix C compiler: on Windows there are none")
    named = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [["cc"], ["gcc"], ["clang"]]
    found = next((words for words in named if shutil.which(words[0])), None)
    if found is None:
        raise KernelError(
            f"normswap's CPU kernels need a C compiler, and {', '.join(words[0] for words in named)} is not on the "
            "PATH: install gcc or clang, or name one in CC"
        )
    for machine in _MACHINE:
        asked = [*found, *_FLAGS, *machine, "-dM", "-E", "-x", "c", os.devnull]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode == 0:
            return found, machine, done.stdout
    raise KernelError(f"{' '.join(found)} is no C compiler that works: {done.stderr.strip()[-500:]}")


@cache
def _folder() -> Path:
    """Where compiled kernels are kept. It must be the user's alone, since they are run; else one of this process."""
    folder = cache_folder() / "cpu"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and not folder.stat().st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="normswap-"))
