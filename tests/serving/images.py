"""Encoded images, valid ones and malicious ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photo(number: int = 0, kind: str = "JPEG", width: int = 80, height: int = 60) -> bytes:
    """A smooth image, different for each number."""
    levels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def compress_zeros(count: int) -> bytes:
    """Zlib data of `count` zeros, a thousandth as long: one compressed block is repeated, in no time."""
    size = 2**20
    packer = zlib.compressobj(9)
    first = packer.compress(b"\0" * size) + packer.flush(zlib.Z_FULL_FLUSH)  # with the header
    block = packer.compress(b"\0" * size) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(b"\0" * (count % size)) + packer.flush()
    adler = count % 65521 << 16 | 1  # the checksum of zeros (RFC 1950, section 9)
    return first + block * (count // size - 1) + end[:-4] + struct.pack(">I", adler)


def bomb(width: int, height: int) -> bytes:
    """A valid PNG of one colour, a small file, of at least a megabyte of pixels."""
    return png(width, height, compress_zeros((1 + 3 * width) * height))


def huge(width: int, height: int) -> bytes:
    """A PNG with this size in its header and almost no pixels."""
    return png(width, height, zlib.compress(b"\0" * 100))


def huge_jpeg(width: int, height: int) -> bytes:
    """A small JPEG with this size in its header."""
    data = bytearray(photo())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def text_bomb() -> bytes:
    """A PNG with a comment that decompresses to 200 MB."""
    data = photo(kind="PNG")
    comment = b"Comment\0\0" + compress_zeros(200_000_000)
    return data[:33] + chunk(b"zTXt", comment) + data[33:]


def animation(kind: str, frames: int = 3) -> bytes:
    """An animated GIF or WebP."""
    images = [Image.open(io.BytesIO(photo(i))) for i in range(frames)]
    out = io.BytesIO()
    images[0].save(out, kind, save_all=True, append_images=images[1:])
    return out.getvalue()


def cut(data: bytes) -> bytes:
    """The first half, with a valid header."""
    return data[: len(data) // 2]


def mutated(data: bytes, number: int) -> bytes:
    """Some bytes changed, dropped or doubled, differently for each number."""
    draw = np.random.default_rng(number)
    out = bytearray(data)
    for _ in range(int(draw.integers(1, 12))):
        at = int(draw.integers(0, len(out)))
        match int(draw.integers(0, 4)):
            case 0:
                out[at] = int(draw.integers(0, 256))
            case 1:
                del out[at : at + int(draw.integers(1, 40))]
            case 2:
                out[at:at] = out[at : at + int(draw.integers(1, 40))]
            case _:
                out[at:at] = draw.bytes(int(draw.integers(1, 8)))
        if not out:
            break
    return bytes(out)
