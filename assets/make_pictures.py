"""Make `lowbit_assets/data/emoji.npz.xz` from the two Debian packages that carry the pictures and their groups.

    python assets/make_pictures.py [--font fonts-noto-color-emoji.deb] [--names unicode-data.deb]

What is not given as a path is fetched with `apt-get download`. Needs fontTools and Pillow, which nothing else here does.

The font holds a PNG of 136 by 128 for every emoji; `emoji-test.txt` holds their groups. Taken are those of one code point
without a skin tone, so that no picture is another one in another colour; groups of fewer than 40 (flags are two code points
each) are left out. A picture is laid on white, made 32 by 32, and keeps 6 bits a colour. One in five validates, by the
digest of its code point.
"""

import argparse
import hashlib
import io
import lzma
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image

TARGET = Path(__file__).parent / "lowbit_assets" / "data" / "emoji.npz.xz"
SIDE = 32
FEWEST = 40
LOST_BITS = 2
VALID_SHARE = 5  # one picture in so many validates
SKIN_TONES = range(0x1F3FB, 0x1F400)
LOOKS_LIKE_A_PICTURE = 0xFE0F


def groups_of(file: Path) -> dict[int, str]:
    """The group of every emoji of one code point."""
    found: dict[int, str] = {}
    group = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif "; fully-qualified" in line:
            points = [int(word, 16) for word in line.partition(";")[0].split()]
            points = [point for point in points if point != LOOKS_LIKE_A_PICTURE]
            if len(points) == 1 and points[0] not in SKIN_TONES:
                found[points[0]] = group
    return found


def pictures_of(file: Path) -> dict[int, bytes]:
    """The PNG of every code point that the font draws."""
    font = TTFont(file)
    strike = font["CBDT"].strikeData[0]
    return {point: strike[glyph].imageData for point, glyph in font.getBestCmap().items() if glyph in strike}


def shrink(png: bytes) -> np.ndarray:
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    side = max(drawn.size)
    page = Image.new("RGBA", (side, side), "white")
    page.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    small = np.asarray(page.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
    return small >> LOST_BITS << LOST_BITS


def is_valid(point: int) -> bool:
    return hashlib.sha256(f"{point:x}".encode()).digest()[0] % VALID_SHARE == 0


def unpack(package: str, given: Path | None, folder: Path) -> Path:
    if given is None:
        subprocess.run(["apt-get", "download", package], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        given = next(folder.glob(f"{package}_*.deb"))
    target = folder / package
    subprocess.run(["dpkg-deb", "-x", str(given), str(target)], check=True)
    return target


def main() -> None:
    options = argparse.ArgumentParser(description="Make the pictures of lowbit_assets")
    options.add_argument("--font", type=Path, help="the Debian package fonts-noto-color-emoji, a .deb file")
    options.add_argument("--names", type=Path, help="the Debian package unicode-data, a .deb file")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        font = next(unpack("fonts-noto-color-emoji", chosen.font, folder).rglob("NotoColorEmoji.ttf"))
        names = next(unpack("unicode-data", chosen.names, folder).rglob("emoji-test.txt"))
        drawn, groups = pictures_of(font), groups_of(names)
    points = sorted(groups.keys() & drawn.keys())
    labels = sorted({group for group in groups.values() if sum(groups[p] == group for p in points) >= FEWEST})
    points = [point for point in points if groups[point] in labels]
    arrays = {
        "pictures": np.stack([shrink(drawn[point]) for point in points]),
        "labels": np.array([labels.index(groups[point]) for point in points], np.uint8),
        "points": np.array(points, np.uint32),
        "valid": np.array([is_valid(point) for point in points]),
        "names": np.array(labels),
    }
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    TARGET.write_bytes(lzma.compress(packed.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(
        f"{len(points)} pictures, {int(arrays['valid'].sum())} to validate, {TARGET.stat().st_size:,} bytes: {labels}"
    )


if __name__ == "__main__":
    main()
