"""The page at `/` of `agln-fast serve`, in a browser, with a server behind it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, needs_browser
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from agln_fast.data.scenes import Scenes

PAGE = (resources.files("agln_fast.serving") / "page.html").read_text("utf-8")
SIZE = (120, 168)  # of the photograph: not the engine's


class Server:
    """`agln-fast serve` in a process of its own, on free ports."""

    def __init__(self, *arguments: object) -> None:
        ports = [word for kind in ("http", "grpc", "metrics") for word in (f"--{kind}-port", "0")]
        command = [sys.executable, "-m", "agln_fast.cli", "serve", *map(str, arguments), *ports, "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        told = "".join(iter(self.process.stdout.readline, "}\n"))
        addresses = json.loads(told + "}")
        self.url, self.metrics = addresses["http"], addresses["metrics"]

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """Bytes of an answer, or what they are in JSON."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = response.read()
        return json.loads(answer) if response.headers["Content-Type"] == "application/json" else answer

    def labels(self, file: Path) -> np.ndarray:
        answer = self.ask("/v2/models/small/infer?output=labels_png", file.read_bytes(), "image/png")
        return np.array(Image.open(io.BytesIO(answer)))

    def in_flight(self) -> float:
        """Requests that it has not answered yet."""
        with urllib.request.urlopen(self.metrics, timeout=60) as response:
            return sum(map(float, re.findall(r"^agln_fast_in_flight\{.*\} (.*)$", response.read().decode(), re.M)))

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """The engine's process does nothing."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGSTOP)
        try:
            yield
        finally:
            for child in children:
                os.kill(int(child), signal.SIGCONT)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(bundle) -> Iterator[Server]:
    """Takes one request at a time, of 1 MiB at most; asks its engine for nothing by itself."""
    server = Server(f"small={bundle.path}", "--max-body-mib", 1, "--queue", 1, "--canary-s", 1000)
    yield server
    server.close()


@pytest.fixture(scope="module")
def versions(bundle) -> Iterator[Server]:
    """Has a model in two versions."""
    server = Server(f"small:1={bundle.path}", f"small:2={bundle.path}", "--canary-s", 1000)
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photographs") / "street.png"
    Image.fromarray(Scenes("test", size=SIZE)[9].image).save(path)
    return path


def wait_for(browser: Browser, file: Path) -> None:
    """Until a photograph is shown."""
    browser.wait(f"document.querySelector('#status').innerText.startsWith({json.dumps(file.name + ',')})")


def give(browser: Browser, file: Path) -> None:
    """Choose a file, and wait until it is shown."""
    browser.choose("#file", file)
    wait_for(browser, file)


def slide(browser: Browser, key: str) -> np.ndarray:
    """The canvas (H, W, 3) with the slider at an end: "Home" or "End"."""
    browser.run("document.querySelector('#slider').focus()")
    browser.press(key)
    pixels = browser.canvas("#canvas")
    assert (pixels[..., 3] == 255).all()
    return pixels[..., :3]


def colours(server: Server, labels: np.ndarray) -> np.ndarray:
    """What the model's palette makes of class ids."""
    palette = server.ask("/v2/models/small")["parameters"]["palette"]
    return np.array(palette, np.uint8)[labels]


def rows(browser: Browser) -> list[list[str]]:
    """The words of the legend."""
    return [
        line.split("\n") for line in browser.run("[...document.querySelectorAll('#legend li')].map(x => x.innerText)")
    ]


def complaints(browser: Browser) -> list[str]:
    """What went wrong inside."""
    browser.run("0")  # what was told before is received with the answer
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [str(event["params"]) for event in browser.events if event.get("method") in kinds]


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_of_the_page_permits_its_own_script_and_style_and_no_others(tag):
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', PAGE)
    assert policy
    assert f"{tag}-src 'sha256-{digest}';" in policy[1]
    assert not re.search(r"\s(on\w+|style)=", PAGE.partition("<body>")[2].partition("<script>")[0])


@needs_browser
@pytest.mark.slow
class TestInABrowser:
    def test_the_slider_goes_from_the_photograph_to_the_palette(self, browser, server, photograph):
        browser.open(server.url)
        give(browser, photograph)
        image, labels = np.array(Image.open(photograph)), server.labels(photograph)
        assert len(np.unique(labels)) > 1
        assert (slide(browser, "Home") == image).all()
        assert (slide(browser, "End") == colours(server, labels)).all()
        browser.run("document.querySelector('#slider').value = 0.5; draw()")
        middle = (image.astype(int) + colours(server, labels)) / 2
        # An opacity is a number of 255ths, which is off by 0.5 at most, and two products are rounded.
        assert np.abs(browser.canvas("#canvas")[..., :3] - middle).max() <= 1.5
        assert not complaints(browser)

    def test_everything_comes_from_the_server(self, browser, server, photograph):
        browser.open(server.url)
        give(browser, photograph)
        asked = [
            e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
        ]
        paths = {url.removeprefix(server.url) for url in asked if not url.startswith("data:")}
        assert paths == {"/", "/v2/repository/index", "/v2/models/small", "/v2/models/small/infer"}

    def test_the_legend_has_the_shares_largest_first(self, browser, server, photograph):
        browser.open(server.url)
        give(browser, photograph)
        classes = server.ask("/v2/models/small")["parameters"]["classes"]
        counts = np.bincount(server.labels(photograph).reshape(-1), minlength=len(classes))
        largest = [each for each in np.argsort(-counts, kind="stable") if counts[each]]
        assert rows(browser) == [[classes[i], f"{counts[i] / counts.sum():.1%}"] for i in largest]
        drawn = browser.run("[...document.querySelectorAll('#legend .swatch')].map(x => x.style.background)")
        expected = colours(server, np.array(largest))
        assert [tuple(map(int, re.findall(r"\d+", each))) for each in drawn] == [tuple(each) for each in expected]

    def test_stages_have_their_times_and_these_are_the_whole(self, browser, server, photograph):
        browser.open(server.url)
        give(browser, photograph)
        lines = browser.text("#stages").splitlines()
        times = {name: float(ms.removesuffix(" ms")) for name, ms in (line.split("\t") for line in lines)}
        assert list(times) == ["queue", "decode", "engine", "encode", "network and rest"]
        assert all(times[name] > 0 for name in ("decode", "engine", "encode", "network and rest"))
        assert float(browser.text("#total").removesuffix(" ms")) == pytest.approx(sum(times.values()), abs=0.3)
        widths = browser.run("[...document.querySelectorAll('#bar > *')].map(x => x.getBoundingClientRect().width)")
        largest = max(times, key=times.__getitem__)
        assert widths[list(times).index(largest)] == max(widths)

    def test_a_pixel_under_the_mouse_has_its_name(self, browser, server, photograph):
        browser.open(server.url)
        give(browser, photograph)
        classes, labels = server.ask("/v2/models/small")["parameters"]["classes"], server.labels(photograph)
        left, top, width = browser.run("(box => [box.x, box.y, box.width])(canvas.getBoundingClientRect())")
        inner = sliding_window_view(labels, (5, 5))  # a mouse may be told of in whole pixels
        uniform = (inner == inner[..., 2:3, 2:3]).all((-2, -1))
        assert len(np.unique(labels[2:-2, 2:-2][uniform])) > 1
        for label in np.unique(labels[2:-2, 2:-2][uniform]):
            y, x = np.argwhere(uniform & (labels[2:-2, 2:-2] == label))[0] + 2
            scale = width / labels.shape[1]
            browser.point(left + (x + 0.5) * scale, top + (y + 0.5) * scale)
            assert browser.text("#tip") == classes[label]
            assert browser.text("#legend .here").startswith(classes[label] + "\n")
        browser.point(left, top - 20)
        assert browser.run("tip.hidden && !document.querySelector('#legend .here')")

    def test_a_class_under_the_mouse_stands_alone_and_a_click_keeps_it(self, browser, server, photograph):
        browser.open(server.url)
        give(browser, photograph)
        slide(browser, "End")
        image, labels = np.array(Image.open(photograph)), server.labels(photograph)
        largest = np.bincount(labels.reshape(-1)).argmax()
        alone = np.where((labels == largest)[..., np.newaxis], colours(server, labels), image)
        everything = colours(server, labels)

        def seen() -> np.ndarray:
            return browser.canvas("#canvas")[..., :3]

        browser.point(*browser.middle("#legend li:first-child"))
        assert (seen() == alone).all()
        browser.point(1, 1)
        assert (seen() == everything).all()
        browser.click("#legend li:first-child")
        browser.point(1, 1)
        browser.run("document.activeElement.blur()")
        assert (seen() == alone).all()
        browser.run("document.querySelector('#legend button').focus()")
        browser.press("Enter")
        browser.run("document.activeElement.blur()")
        assert (seen() == everything).all()

    @pytest.mark.parametrize("orientation", [3, 6, 7])
    def test_photographs_are_upright_as_the_camera_says(self, browser, server, photograph, tmp_path, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = tmp_path / f"turned{orientation}.jpg"
        lying = Image.open(photograph)
        lying.save(turned, quality=95, exif=exif)
        upright = {
            3: Image.Transpose.ROTATE_180,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
        }[orientation]
        browser.open(server.url)
        give(browser, turned)
        expected = np.array(lying.transpose(upright)).astype(int)
        assert np.abs(slide(browser, "Home") - expected).mean() < 4
        assert np.abs(np.rot90(expected, 2) - expected).mean() > 20
        assert (slide(browser, "End") == colours(server, server.labels(turned))).all()

    def test_dropped_and_pasted_files_are_taken(self, browser, server, photograph, tmp_path):
        browser.open(server.url)
        browser.drop("#drop", photograph)
        wait_for(browser, photograph)
        first = slide(browser, "End")
        data = base64.b64encode(photograph.read_bytes()).decode()
        browser.run(
            f"""{{
              const bytes = Uint8Array.from(atob("{data}"), character => character.charCodeAt(0));
              const clipboardData = new DataTransfer();
              clipboardData.items.add(new File([bytes], "pasted.png"));
              document.dispatchEvent(new ClipboardEvent("paste", {{clipboardData}}));
            }}"""
        )
        wait_for(browser, Path("pasted.png"))
        assert (browser.canvas("#canvas")[..., :3] == first).all()

    def test_what_is_saved_has_all_pixels(self, browser, server, photograph, tmp_path):
        large = tmp_path / "large.png"  # larger than what is drawn on the page
        Image.open(photograph).resize((2400, 1600), Image.Resampling.NEAREST).save(large)
        browser.open(server.url)
        give(browser, large)
        drawn = slide(browser, "End") @ np.array([1 << 16, 1 << 8, 1])
        assert set(np.unique(drawn)) <= {
            red << 16 | green << 8 | blue
            for red, green, blue in server.ask("/v2/models/small")["parameters"]["palette"]
        }
        assert slide(browser, "Home").shape == (1365, 2048, 3)
        browser.run("document.querySelector('#slider').value = 0.5")
        overlay = Image.open(io.BytesIO(browser.download("#save-overlay", "large.overlay.png")))
        middle = (np.array(Image.open(large)).astype(int) + colours(server, server.labels(large))) / 2
        assert np.abs(np.array(overlay.convert("RGB")) - middle).max() <= 1.5
        labels = Image.open(io.BytesIO(browser.download("#save-labels", "large.labels.png")))
        assert (np.array(labels) == server.labels(large)).all()

    def test_a_format_that_the_browser_cannot_show_has_its_classes_alone(self, browser, server, photograph, tmp_path):
        scan = tmp_path / "scan.tif"
        Image.open(photograph).save(scan)
        browser.open(server.url)
        browser.choose("#file", scan)
        browser.wait("document.querySelector('#status').innerText.includes('the classes stand alone')")
        assert (browser.canvas("#canvas")[..., :3] == colours(server, server.labels(scan))).all()

    def test_what_is_no_picture_is_told_and_the_last_one_stays(self, browser, server, photograph, tmp_path):
        (tmp_path / "notes.png").write_text("no picture")
        browser.open(server.url)
        give(browser, photograph)
        browser.choose("#file", tmp_path / "notes.png")
        browser.wait("!document.querySelector('#error').hidden")
        assert re.match(r"notes\.png: 10 bytes: is not an image of a known format .*\.$", browser.text("#message"))
        assert browser.text("#status") == "street.png, 168×120"
        give(browser, photograph)
        assert browser.run("document.querySelector('#error').hidden")

    def test_a_photograph_beyond_the_servers_limit_is_told_so(self, browser, server, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise.png")
        browser.open(server.url)
        browser.choose("#file", tmp_path / "noise.png")
        browser.wait("!document.querySelector('#error').hidden")
        assert browser.text("#message") == (
            "noise.png: 1.2 MB are too large: a request has 1048576 bytes at most here, and base64 adds a third."
        )

    def test_a_busy_server_is_asked_again_by_the_button(self, browser, server, photograph):
        browser.open(server.url)
        browser.wait("document.querySelector('#engine').innerText")
        with server.stalled():
            other = threading.Thread(target=server.labels, args=(photograph,))
            other.start()
            while not server.in_flight():
                time.sleep(0.02)
            browser.choose("#file", photograph)
            browser.wait("!document.querySelector('#error').hidden")
            assert browser.text("#message") == "street.png: not now: 1 requests wait already; try again in 1 s."
        other.join()
        browser.click("#retry")
        wait_for(browser, photograph)
        assert browser.run("document.querySelector('#error').hidden")

    def test_the_photograph_that_came_last_is_shown(self, browser, versions, photograph, tmp_path):
        second = tmp_path / "second.png"
        Image.open(photograph).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(second)
        browser.open(versions.url)
        with versions.stalled():
            browser.choose("#file", photograph)
            while not versions.in_flight():
                time.sleep(0.02)
            browser.choose("#file", second)
            browser.wait("document.querySelector('#status').innerText == 'second.png …'")
        wait_for(browser, second)
        assert (slide(browser, "Home") == np.array(Image.open(second))).all()
        assert browser.run("document.querySelector('#error').hidden")

    def test_a_server_that_is_gone_is_told(self, browser, server, photograph):
        browser.open(server.url)
        browser.wait("document.querySelector('#engine').innerText")
        browser.offline(True)
        browser.choose("#file", photograph)
        browser.wait("!document.querySelector('#error').hidden")
        assert browser.text("#message") == "street.png: the server does not answer."
        browser.offline(False)
        browser.click("#retry")
        wait_for(browser, photograph)

    def test_a_version_can_be_chosen(self, browser, versions, photograph):
        browser.open(versions.url)
        browser.wait("document.querySelectorAll('#model option').length == 2")
        assert browser.text("#choice").split() == ["Model", "small:1", "small:2"]
        give(browser, photograph)
        asked = (
            "performance.getEntriesByType('resource').filter(x => x.name.endsWith('/small/versions/%s/infer')).length"
        )
        other = 3 - int(browser.run("model.selectedOptions[0].innerText.at(-1)"))
        assert browser.run(asked % (3 - other)) == 1
        browser.run(f"model.selectedIndex = {other - 1}; model.dispatchEvent(new Event('change'))")
        browser.wait(f"{asked % other} == 1")

    @pytest.mark.parametrize("width", [320, 390])
    def test_on_a_phone_nothing_is_wider_than_the_screen(self, browser, server, photograph, tmp_path, width):
        long = tmp_path / f"{'a-long-name-' * 12}.png"
        long.write_bytes(photograph.read_bytes())
        browser.open(server.url, width=width, height=740, phone=True)
        for file in (None, long):
            if file:
                give(browser, file)
            assert browser.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
            box = browser.run(
                "(box => [box.left, box.right, box.height])"
                "(document.querySelector('#drop .button').getBoundingClientRect())"
            )
            assert 0 <= box[0] < box[1] <= width
            assert box[2] > 0

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_text_can_be_read_in_light_and_dark(self, browser, server, photograph, tmp_path, dark):
        browser.open(server.url, dark=dark)
        give(browser, photograph)
        browser.screenshot(tmp_path / "page.png")
        paper = np.array(Image.open(tmp_path / "page.png").convert("L"))[5, 5]
        assert paper < 50 if dark else paper > 200
        for selector in ("h1", "#engine", "#status", "#legend button", "#legend .number", "#save-labels"):
            assert contrast(browser, selector) >= 4.5, selector  # WCAG 2.2, AA

    def test_everything_is_reached_by_the_keyboard(self, browser, server, photograph):
        browser.open(server.url)
        give(browser, photograph)
        browser.run("document.activeElement.blur()")
        reached = []
        for _ in range(20):
            browser.press("Tab")
            reached.append(browser.run("document.activeElement.id || document.activeElement.innerText.split('\\n')[0]"))
        wanted = ["file", "slider", "save-overlay", "save-labels", *(name for name, _ in rows(browser))]
        start = reached.index("file")
        assert reached[start : start + len(wanted)] == wanted


def contrast(browser: Browser, selector: str) -> float:
    """WCAG's ratio of an element's text to the page."""
    ink, paper = browser.run(
        f"[getComputedStyle(document.querySelector({json.dumps(selector)})).color,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    lights = []
    for colour in (ink, paper):
        parts = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(lights) + 0.05) / (min(lights) + 0.05)
