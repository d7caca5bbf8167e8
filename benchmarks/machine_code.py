"""What the CUDA toolkit's tools tell about machine code: registers, stack and shared memory of each kernel, and its instructions."""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

# Instructions that move registers or shared memory from or to global memory; LD and ST are those of pointers whose space is not known.
ACCESS = re.compile(r"(LDG|LDGSTS|LD|STG|ST)\.")


def cuda_tool(name: str, nvcc: Path | None = None) -> str | None:
    """Beside nvcc, on PATH, or in the Triton package."""
    folders = [nvcc.resolve().parent, nvcc.parent] if nvcc else []
    on_path = shutil.which(name)
    folders += [Path(on_path).parent] if on_path else []
    triton = importlib.util.find_spec("triton")
    for origin in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(origin) / "backends" / "nvidia" / "bin")
    candidates = [path / name if (path := folder / name).is_dir() else path for folder in folders]
    return next((str(c) for c in candidates if os.access(c, os.X_OK) and c.is_file()), None)


def resource_usage(printed: str) -> list[dict[str, object]]:
    """A row a kernel from what `cuobjdump -res-usage` prints, most registers first. `stack` holds spilled registers and local arrays."""
    pattern = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    rows, arch = [], None
    for part in re.split(r"(?=^\s*Function )|(?=^arch = )", printed, flags=re.MULTILINE):
        named = re.match(r"arch = (\S+)", part)
        arch = named[1] if named else arch
        match = pattern.search(part)
        if match:
            registers, stack, shared, local = map(int, match.groups()[1:])
            rows.append({
                "kernel": match[1], "arch": arch, "registers": registers, "shared": shared, "stack": stack + local,
            })  # fmt: skip
    return sorted(rows, key=lambda row: (-row["registers"], row["kernel"]))


def functions(sass: str) -> dict[str, list[str]]:
    """{function: its instructions, as "LDG.E.128"} from what `cuobjdump -sass` prints."""
    _, *parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)
    return {name: instructions(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def instructions(sass: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)


def facts(found: list[str]) -> dict[str, object]:
    """Of a kernel's instructions: how many, accesses to global memory by their names, products by matrix units, accesses to local memory."""
    counts = collections.Counter(instruction.split(".")[0] for instruction in found)
    return {
        "instructions": len(found) - counts["NOP"],
        "accesses": dict(collections.Counter(i for i in found if ACCESS.match(i))),
        "products": {name: n for name, n in counts.items() if name.endswith("MMA")},
        "local": counts["LDL"] + counts["STL"],
    }


def bits(access: str) -> int:
    """How many an access moves: "LDG.E.U16" -> 16."""
    found = re.search(r"\.(?:[US]?(8|16|64|128|256))(?=\.|$)", access)
    return int(found[1]) if found else 32


def source(name: str) -> str | None:
    """The file of a kernel that no other file can name (of an anonymous namespace), from its mangled name."""
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+)_cu_[0-9a-f]{8}", name)
    return f"{found[1]}.cu" if found else None


def readable(names: Iterable[str]) -> list[str]:
    """Demangled, without arguments and our own namespaces."""
    plain = [_demangled(name) for name in names]
    short = [re.sub(r"stackbert::|cuda::|\(anonymous namespace\)::|^void ", "", name) for name in plain]
    return [re.sub(r"\([^()]*\)$", "", name).replace("> >", ">>") for name in short]


def _demangled(name: str) -> str:
    demangle = _demangler()
    text = demangle(name.encode(), None, None, None) if demangle else None
    return text.decode() if text else name


@cache
def _demangler() -> ctypes._CFuncPtr | None:
    """__cxa_demangle, which every C++ runtime has; what it allocates for a name is not given back."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return None
    demangle.restype = ctypes.c_char_p
    demangle.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return demangle
