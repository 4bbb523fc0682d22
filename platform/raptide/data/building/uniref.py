"""Which entries are in which UniRef cluster, from UniRef's XML: complete, also for UniParc alone.

The XML of UniRef50 is hundreds of gigabytes of elements like

    <entry id="UniRef50_P69905">
      <representativeMember> or <member>
        <dbReference type="UniProtKB ID" id="HBA_HUMAN">
          <property type="UniRef100 ID" value="UniRef100_P69905"/>
          <property type="UniRef90 ID" value="UniRef90_P69905"/>

No tree is built of it: expat calls a function at each start of an element, so memory knows neither
the file nor the size of a cluster. UniRef declares no entities; a file that does is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NoReturn
from xml.parsers import expat

from raptide.errors import InputError

READ_BYTES = 4 << 20


def read_members(file: BinaryIO, kind: str) -> Iterator[list[str]]:
    """Lines `cluster, tab, member`, some at a time; one that follows soon again is left out.

    Args:
        kind: the members that are named, `UniRef100` or `UniRef90`.

    Raises:
        InputError: the file is no XML of UniRef, is cut short, or declares entities.
    """
    parser = expat.ParserCreate()
    wanted, cluster = f"{kind} ID", ""
    lines: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal cluster
        if name == "property":
            if attributes.get("type") == wanted:
                lines.append(f"{cluster}\t{_sound(attributes.get('value', ''))}\n")
        elif name == "entry":
            cluster = _sound(attributes.get("id", ""))

    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = _refuse_doctype
    found = False
    try:
        while chunk := file.read(READ_BYTES):
            parser.Parse(chunk)
            yield list(dict.fromkeys(lines))
            found = found or bool(lines)
            lines.clear()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise InputError(f"this is no whole XML file ({error})") from None
    if not found:
        raise InputError(f"this is no XML of UniRef: no entry has a member with a {wanted}")


def _sound(name: str) -> str:
    if not name or not name.isprintable():
        raise InputError(f"an entry or a member is called {name!r}, which is no name")
    return name


def _refuse_doctype(*declaration: object) -> NoReturn:
    raise InputError("it declares a document type, which UniRef's XML does not; entities may hide")
