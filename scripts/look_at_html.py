#!/usr/bin/env python3
"""Opens pages in headless Chromium as a person would, checks what can be measured and leaves pictures to look at.

    python3 scripts/look_at_html.py FOLDER PAGE.html [PAGE.html ...]

For each page: a phone of 360 px and a desk of 1200 px, light and dark, and the printed pages, as PNG files in FOLDER (printed ones
need pdftoppm). It fails where a page asks for anything but itself, scrolls sideways, where a chart's texts overlap or leave
their picture, where a chart's text is smaller than 10 px, or where text stands out from its background by less than 4.5 to 1 (WCAG 2.1, 1.4.3).

Needs a `chromium` on the PATH (Debian: apt-get install chromium poppler-utils) and Python alone. Chromium gets a new, empty
profile and no network.
"""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars"]
SCREENS = [("phone-light", 360, "light"), ("phone-dark", 360, "dark"), ("desk-light", 1200, "light"), ("desk-dark", 1200, "dark")]

# Runs in the page: what is wrong with it, in words.
CHECK = r"""
(() => {
  const wrong = [], root = document.scrollingElement;
  if (root.scrollWidth > root.clientWidth) wrong.push(`scrolls sideways: ${root.scrollWidth} px in ${root.clientWidth}`);
  const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.match(/[\d.]+/g).map(Number).map(channel); return 0.2126*r + 0.7152*g + 0.0722*b; };
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)]; return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05); };
  const behind = el => { for (; el; el = el.parentElement) {
    const color = getComputedStyle(el).backgroundColor; if (!/, 0\)$|transparent/.test(color)) return color; } return 'rgb(255,255,255)'; };
  const seen = el => { const box = el.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  for (const el of document.querySelectorAll('p, li, td, th, dt, dd, small, code, figcaption, h1, h2, pre, footer, svg text')) {
    if (!seen(el) || !el.textContent.trim()) continue;
    const style = getComputedStyle(el), color = el.closest('svg') ? style.fill : style.color, ratio = contrast(color, behind(el));
    if (ratio < 4.5) wrong.push(`"${el.textContent.trim().slice(0, 30)}" has a contrast of ${ratio.toFixed(2)}`);
  }
  for (const svg of document.querySelectorAll('svg')) {
    if (!seen(svg)) continue;
    const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
    const texts = [...svg.querySelectorAll('text')].map(el => [el, el.getBoundingClientRect()]);
    const name = svg.querySelector('title').textContent;
    for (const [el, box] of texts) {
      const size = parseFloat(getComputedStyle(el).fontSize) * scale;
      if (size < 10) wrong.push(`${name}: "${el.textContent}" is ${size.toFixed(1)} px high`);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        wrong.push(`${name}: "${el.textContent}" leaves the picture`);
    }
    texts.forEach(([a, x], i) => texts.slice(i + 1).forEach(([b, y]) => {
      const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left), high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
      if (wide > 1 && high > 3) wrong.push(`${name}: "${a.textContent}" and "${b.textContent}" overlap`);
    }));
  }
  return wrong;
})()
"""


class Browser:
    """Chromium over its debugging pipe: JSON messages that end with a zero byte, on descriptors 3 and 4."""

    def __init__(self, profile):
        program = shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("there is no `chromium` on the PATH")
        to_child, self.write = os.pipe()
        self.read, from_child = os.pipe()

        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # The shell puts our two descriptors where Chromium looks for them.
        shell = ["sh", "-c", f'exec "$@" 3<&{to_child} 4>&{from_child}', "sh", *command]
        self.process = subprocess.Popen(shell, pass_fds=(to_child, from_child), stderr=subprocess.DEVNULL)
        os.close(to_child)
        os.close(from_child)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.read, 1 << 16)
            if not piece:
                sys.exit("chromium ended")
            self.buffer += piece
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                if "error" in message:
                    sys.exit(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, url):
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        return [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]

    def close(self):
        self.process.terminate()
        self.process.wait()


def look(browser, page, folder):
    """Every screen of one page; returns what is wrong."""
    wrong = []
    url = page.resolve().as_uri()
    for screen, width, scheme in SCREENS:
        phone = width < 600
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2 if phone else 1, mobile=phone)
        browser.call("Emulation.setEmulatedMedia", media="screen", features=[{"name": "prefers-color-scheme", "value": scheme}])
        asked = browser.open(url)
        wrong += [f"{screen}: asks for {other}" for other in asked if other != url]
        found = browser.call("Runtime.evaluate", expression=CHECK, returnByValue=True)
        if "exceptionDetails" in found:
            sys.exit(f"{page}: {found['exceptionDetails']}")
        wrong += [f"{screen}: {what}" for what in found["result"]["value"]]
        picture = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        (folder / f"{page.stem}-{screen}.png").write_bytes(base64.b64decode(picture["data"]))
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    pdf = folder / f"{page.stem}.pdf"
    printed = browser.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69)
    pdf.write_bytes(base64.b64decode(printed["data"]))
    if shutil.which("pdftoppm"):
        subprocess.run(["pdftoppm", "-r", "70", "-png", str(pdf), str(folder / f"{page.stem}-print")], check=True)
    return wrong


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(profile)
        for page in map(pathlib.Path, sys.argv[2:]):
            wrong = look(browser, page, folder)
            failed |= bool(wrong)
            print(f"{page}: {'nothing wrong' if not wrong else f'{len(wrong)} things wrong'}")
            for what in wrong:
                print(f"  {what}")
        browser.close()
    print(f"pictures in {folder}: look at them")
    sys.exit(failed)


if __name__ == "__main__":
    main()
