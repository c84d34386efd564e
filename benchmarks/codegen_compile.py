"""Compile our Triton kernels for GPUs that need not be there, and read the machine code.

A child process of ``codegen.py``: a compiler may abort, and then takes this process alone. It prints one JSON line when
it begins a case and one when it is done.

Run: ``python benchmarks/codegen_compile.py "forward sm_90 hd128" ...``
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

TENSOR = r"\b(HGMMA|HMMA|WGMMA)\b"
LOCAL = r"\b(STL|LDL)\b"  # where spilled registers go


class Case(NamedTuple):
    """One kernel for one GPU: ``kernel`` forward, query or keys; ``variant`` "", "accumulate" or "persistent"."""

    kernel: str
    arch: int
    head_dim: int
    variant: str = ""

    @property
    def name(self) -> str:
        """How the case is written in results and on the command line."""
        return " ".join(filter(None, (self.kernel, f"sm_{self.arch}", f"hd{self.head_dim}", self.variant)))

    @classmethod
    def read(cls, name: str) -> Case:
        """Return the case of a name."""
        kernel, arch, dim, *variant = name.split()
        return cls(kernel, int(arch.removeprefix("sm_")), int(dim.removeprefix("hd")), *variant)


class Loop(NamedTuple):
    """An innermost loop of the machine code that has tensor-core instructions: one tile per round."""

    body: list[str]

    def count(self, pattern: str) -> int:
        """Return how many of its instructions match."""
        return sum(bool(re.search(pattern, line)) for line in self.body)


def figures(case: Case) -> dict[str, Any]:
    """Compile a case; return what the gate and the drawing need."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ringspan.kernels.triton_source import source

    one = source(
        case.kernel,
        case.arch // 10,
        case.head_dim,
        torch.bfloat16,
        persistent=case.variant == "persistent",
        accumulate=case.variant == "accumulate",
    )
    made = triton.compile(
        ASTSource(fn=one.fn, signature=one.signature, constexprs=one.constexprs, attrs=one.attrs),
        target=GPUTarget("cuda", case.arch, 32),
        options=one.options,
    )
    found = assembled(made.asm["ptx"], case.arch, str(one.options.get("ptx_options") or "").split())
    if (held := registers_of(made.asm["cubin"])) != found["registers"]:
        raise RuntimeError(f"ptxas says {found['registers']} registers, the compiled kernel has {held}")
    code = instructions(made.asm["cubin"])
    loops = tile_loops(code)
    # Both loops do the same products; the one without bounds to compare is the shorter.
    full, masked = (
        (min(loops, key=lambda x: len(x.body)), max(loops, key=lambda x: len(x.body))) if loops else (None,) * 2
    )
    return found | {
        "tile": _told(one.tile),
        "shared_bytes": made.metadata.shared,
        "tensor_instructions": sum(bool(re.search(TENSOR, line)) for line in code),
        "hgmma": sum("HGMMA" in line for line in code),
        "tma_loads": sum("UTMALDG" in line for line in code),
        "async_copies": sum("LDGSTS" in line for line in code),
        "loops": len(loops),
        "full_tile_instructions": len(full.body) if full else 0,
        "full_tile_tensor": full.count(TENSOR) if full else 0,
        "full_tile_exp2": full.count(r"MUFU\.EX2") if full else 0,
        "full_tile_local_memory": full.count(LOCAL) if full else 0,
        "masked_tile_instructions": len(masked.body) if masked else 0,
        "masked_tile_local_memory": masked.count(LOCAL) if masked else 0,
    }


def _told(tile: Any) -> str:
    loads = "descriptors" if tile.descriptors else "pointers"
    return f"{tile.rows}x{tile.columns}, {tile.warps} warps, {tile.stages} stages, {loads}"


def tools() -> Path:
    """Return the folder of NVIDIA's assembler and disassembler that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def assembled(ptx: str, arch: int, options: list[str]) -> dict[str, int]:
    """Return registers and spilled bytes by ptxas's own account, assembled as Triton does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = re.search(r"\.target (sm_\w+)", ptx)
        target = f"--gpu-name={name.group(1) if name else f'sm_{arch}'}"
        said = output("ptxas", "-v", *options, target, str(path), "-o", os.devnull)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas -v says nothing of registers and spills: {said[-300:]}")
    stack, stores, loads = map(int, spills.groups())
    return {
        "registers": int(registers.group(1)),
        "stack_bytes": stack,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
    }


def output(tool: str, *arguments: str) -> str:
    """Run one of the tools; return all it says."""
    done = subprocess.run([str(tools() / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def registers_of(cubin: bytes) -> int:
    """Return the registers per thread that the compiled kernel asks for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return int(re.findall(r"REG:(\d+)", output("cuobjdump", "-res-usage", str(path)))[0])


def instructions(cubin: bytes) -> list[str]:
    """Return the disassembly: labels and instructions, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = output("nvdisasm", "-c", str(path))
    found = []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label or code:
            found.append(f"{label.group(1)}:" if label else code.group(1) if code else "")
    return found


def tile_loops(code: list[str]) -> list[Loop]:
    """Return the innermost loops (from a label to the branch back to it) that have tensor-core instructions."""
    places: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for at, line in enumerate(code):
        if line.endswith(":"):
            places[line[:-1]] = at
        else:
            back = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
            if back and back.group(1) in places:
                spans.append((places[back.group(1)], at + 1))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = [Loop([line for line in code[start:stop] if not line.endswith(":")]) for start, stop in inner]
    return [loop for loop in loops if loop.count(TENSOR)]


def main(names: list[str]) -> int:
    """Compile the named cases one after the other."""
    for name in names:
        print(json.dumps({"begun": name}), flush=True)
        try:
            found = figures(Case.read(name))
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is this case's result
            found = {"failed": f"{type(error).__name__}: {str(error)[-300:]}"}
        print(json.dumps({"done": name, "figures": found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
