"""Parser for the parts of a cubin (an ELF file) that the emulator needs.

These are sections, symbols, relocations and kernel parameters.
"""

import struct
from dataclasses import dataclass

SHT_SYMTAB, SHT_NOBITS = 2, 8

# Attributes in .nv.info sections.
ATTR_PARAM_CBANK, ATTR_KPARAM_INFO, ATTR_MIN_STACK_SIZE = 0x0A, 0x17, 0x12
FORMAT_SIZED = 4


@dataclass
class Section:
    name: str
    type: int
    offset: int
    size: int
    link: int
    info: int
    data: bytes


@dataclass
class Symbol:
    name: str
    value: int
    size: int
    section: str  # name of the section that contains it, or ""


@dataclass
class Parameter:
    offset: int  # in the parameter block
    size: int


class Cubin:
    """A parsed cubin."""

    def __init__(self, image: bytes):
        if image[:4] != b"\x7fELF":
            raise ValueError("not a cubin (no ELF header)")
        self.image = image
        self._sections = self._read_sections()
        self.sections = {s.name: s for s in self._sections}
        self.symbols = self._read_symbols()

    def _string(self, table_offset, offset):
        start = table_offset + offset
        return self.image[start : self.image.index(b"\0", start)].decode()

    def _read_sections(self):
        (start,) = struct.unpack_from("<Q", self.image, 0x28)
        entry, count, names = struct.unpack_from("<HHH", self.image, 0x3A)
        headers = [
            struct.unpack_from("<IIQQQQIIQQ", self.image, start + k * entry) for k in range(count)
        ]
        out = []
        for name, kind, _, _, offset, size, link, info, _, _ in headers:
            data = b"" if kind == SHT_NOBITS else self.image[offset : offset + size]
            out.append(
                Section(self._string(headers[names][4], name), kind, offset, size, link, info, data)
            )
        return out

    def _read_symbols(self):
        for section in self._sections:
            if section.type != SHT_SYMTAB:
                continue
            strings = self._sections[section.link].offset
            out = []
            for k in range(section.size // 24):
                name, _, _, index, value, size = struct.unpack_from("<IBBHQQ", section.data, 24 * k)
                home = self._sections[index].name if 0 < index < len(self._sections) else ""
                out.append(Symbol(self._string(strings, name), value, size, home))
            return out
        return []

    def _attributes(self, section_name):
        """(attribute, payload) pairs of an .nv.info section."""
        section = self.sections.get(section_name)
        data, pos = section.data if section else b"", 0
        while pos + 4 <= len(data):
            form, attribute, size = struct.unpack_from("<BBH", data, pos)
            pos += 4
            if form == FORMAT_SIZED:
                yield attribute, data[pos : pos + size]
                pos += size

    def kernels(self):
        """Names of the kernels, in file order."""
        return [
            s.name[len(".text.") :]
            for s in self._sections
            if s.name.startswith(".text.") and f".nv.info.{s.name[6:]}" in self.sections
        ]

    def registers(self, kernel):
        return self.sections[f".text.{kernel}"].info >> 24

    def static_shared(self, kernel):
        section = self.sections.get(f".nv.shared.{kernel}")
        return section.size if section else 0

    def stack_size(self, kernel):
        """Bytes of local memory per thread that the kernel needs, or None if not recorded."""
        for attribute, payload in self._attributes(".nv.info"):
            if attribute == ATTR_MIN_STACK_SIZE:
                index, size = struct.unpack("<II", payload)
                if index < len(self.symbols) and self.symbols[index].name == kernel:
                    return None if size == 0xFFFFFFFF else size
        return None

    def parameters(self, kernel):
        """(offset of the parameter block in constant bank 0, list of Parameter)."""
        base, found = 0x160, {}
        for attribute, payload in self._attributes(f".nv.info.{kernel}"):
            if attribute == ATTR_PARAM_CBANK:
                _, base, _ = struct.unpack("<IHH", payload)
            elif attribute == ATTR_KPARAM_INFO:
                _, ordinal, offset, flags = struct.unpack("<IHHI", payload)
                found[ordinal] = Parameter(offset, flags >> 18)
        return base, [found[k] for k in sorted(found)]

    def relocations(self, section_name):
        """(offset, symbol, addend) of each relocation of a section.

        The addend is None if it is stored in place.
        """
        for prefix, size in ((".rela", 24), (".rel", 16)):
            section = self.sections.get(prefix + section_name)
            if section is None:
                continue
            for pos in range(0, section.size, size):
                offset, info = struct.unpack_from("<QQ", section.data, pos)
                addend = struct.unpack_from("<q", section.data, pos + 16)[0] if size == 24 else None
                yield offset, self.symbols[info >> 32], addend
