"""Reads a generated report.html as XML, as a browser without a network would have to.

    cargo test --test report_html && python scripts/check_html.py

The file is the one that tests/report_html.rs writes from tests/fixtures/report.json. Needs Python alone. Another file:
python scripts/check_html.py runs/NAME/report.html
"""

import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
GENERATED = ROOT / "target/tmp/report/report.html"
LOADS = {"src", "href", "srcset", "data", "poster", "action", "background", "{http://www.w3.org/1999/xlink}href"}


def main() -> None:
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GENERATED
    root = ElementTree.parse(path).getroot()
    elements = list(root.iter())
    names = {element.tag for element in elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "a"}, names
    for element in elements:
        loads = LOADS & set(element.attrib)
        assert not loads, (element.tag, element.attrib)
        assert not [name for name in element.attrib if name.startswith("on")], (element.tag, element.attrib)
    style = "".join(element.text or "" for element in root.iter("style"))
    assert not re.search(r"url\(|@import|//", style)
    ids = [element.attrib["id"] for element in elements if "id" in element.attrib]
    assert len(ids) == len(set(ids)), "an id stands twice"
    pictures = list(root.iter("svg"))
    for picture in pictures:
        assert picture.attrib["role"] == "img" and picture.find("title") is not None and picture.find("desc") is not None
        assert set(picture.attrib["aria-labelledby"].split()) <= set(ids)
    for element in root.iter("data"):
        float(element.attrib["value"])
    print(f"{path}: {len(elements)} elements, {len(pictures)} pictures, nothing loaded")


if __name__ == "__main__":
    main()
