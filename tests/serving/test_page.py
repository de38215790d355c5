"""The page at `/` of `agln-fast serve`, in a browser, with a server behind it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from browser import Browser, needs_browser
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from server import Server, until

from agln_fast.data.scenes import Scenes

PAGE = (resources.files("agln_fast.serving") / "page.html").read_text("utf-8")
SIZE = (120, 168)  # of the photograph: not the engine's


@pytest.fixture(scope="module")
def server(bundle) -> Iterator[Server]:
    """Takes one request at a time, of 1 MiB at most; asks its engine for nothing by itself."""
    yield from _serve(f"small={bundle.path}", "--max-body-mib", 1, "--queue", 1)


@pytest.fixture(scope="module")
def versions(bundle) -> Iterator[Server]:
    """Has a model in two versions."""
    yield from _serve(f"small:1={bundle.path}", f"small:2={bundle.path}")


def _serve(*arguments: object) -> Iterator[Server]:
    if find_spec("mlserver") is None:  # not imported here: its messages and those of tritonclient have one name
        pytest.skip("needs the package mlserver")
    running = Server(*arguments, "--backend", "onnxruntime", "--threads", 1, "--canary-s", 1000)
    yield running
    assert running.end() == 0


def about(server: Server) -> dict:
    """What the server says of its model: classes, palette and more."""
    parameters: dict = json.loads(server.ask("GET", "/v2/models/small")[2])["parameters"]
    return parameters


def labels_of(server: Server, file: Path) -> np.ndarray:
    """The server's class ids (H, W) of a photograph."""
    path, kind = "/v2/models/small/infer?output=labels_png", {"Content-Type": "image/png"}
    return np.array(Image.open(io.BytesIO(server.ask("POST", path, file.read_bytes(), kind)[2])))


@contextmanager
def stalled(server: Server) -> Iterator[None]:
    """Its engines do nothing."""
    workers = server.workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)


def is_asked(server: Server) -> bool:
    """Whether there is a request without an answer."""
    with urlopen(server.metrics, timeout=60) as response:
        return re.search(r"^agln_fast_in_flight{.*} [1-9]", response.read().decode(), re.MULTILINE) is not None


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
    palette = about(server)["palette"]
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
        browser.open(server.http)
        give(browser, photograph)
        image, labels = np.array(Image.open(photograph)), labels_of(server, photograph)
        assert len(np.unique(labels)) > 1
        assert (slide(browser, "Home") == image).all()
        assert (slide(browser, "End") == colours(server, labels)).all()
        browser.run("document.querySelector('#slider').value = 0.5; draw()")
        middle = (image.astype(int) + colours(server, labels)) / 2
        # An opacity is a number of 255ths, which is off by 0.5 at most, and two products are rounded.
        assert np.abs(browser.canvas("#canvas")[..., :3] - middle).max() <= 1.5
        assert not complaints(browser)

    def test_everything_comes_from_the_server(self, browser, server, photograph):
        browser.open(server.http)
        give(browser, photograph)
        asked = [
            e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
        ]
        paths = {url.removeprefix(server.http) for url in asked if not url.startswith("data:")}
        assert paths == {"/", "/v2/repository/index", "/v2/models/small", "/v2/models/small/infer"}

    def test_the_legend_has_the_shares_largest_first(self, browser, server, photograph):
        browser.open(server.http)
        give(browser, photograph)
        classes = about(server)["classes"]
        counts = np.bincount(labels_of(server, photograph).reshape(-1), minlength=len(classes))
        largest = [each for each in np.argsort(-counts, kind="stable") if counts[each]]
        assert rows(browser) == [[classes[i], f"{counts[i] / counts.sum():.1%}"] for i in largest]
        drawn = browser.run("[...document.querySelectorAll('#legend .swatch')].map(x => x.style.background)")
        expected = colours(server, np.array(largest))
        assert [tuple(map(int, re.findall(r"\d+", each))) for each in drawn] == [tuple(each) for each in expected]

    def test_stages_have_their_times_and_these_are_the_whole(self, browser, server, photograph):
        browser.open(server.http)
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
        browser.open(server.http)
        give(browser, photograph)
        classes, labels = about(server)["classes"], labels_of(server, photograph)
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
        browser.open(server.http)
        give(browser, photograph)
        slide(browser, "End")
        image, labels = np.array(Image.open(photograph)), labels_of(server, photograph)
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
        browser.open(server.http)
        give(browser, turned)
        expected = np.array(lying.transpose(upright)).astype(int)
        assert np.abs(slide(browser, "Home") - expected).mean() < 4
        assert np.abs(np.rot90(expected, 2) - expected).mean() > 20
        assert (slide(browser, "End") == colours(server, labels_of(server, turned))).all()

    def test_dropped_and_pasted_files_are_taken(self, browser, server, photograph, tmp_path):
        browser.open(server.http)
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
        browser.open(server.http)
        give(browser, large)
        drawn = slide(browser, "End") @ np.array([1 << 16, 1 << 8, 1])
        assert set(np.unique(drawn)) <= {red << 16 | green << 8 | blue for red, green, blue in about(server)["palette"]}
        assert slide(browser, "Home").shape == (1365, 2048, 3)
        browser.run("document.querySelector('#slider').value = 0.5")
        overlay = Image.open(io.BytesIO(browser.download("#save-overlay", "large.overlay.png")))
        middle = (np.array(Image.open(large)).astype(int) + colours(server, labels_of(server, large))) / 2
        assert np.abs(np.array(overlay.convert("RGB")) - middle).max() <= 1.5
        labels = Image.open(io.BytesIO(browser.download("#save-labels", "large.labels.png")))
        assert (np.array(labels) == labels_of(server, large)).all()

    def test_a_format_that_the_browser_cannot_show_has_its_classes_alone(self, browser, server, photograph, tmp_path):
        scan = tmp_path / "scan.tif"
        Image.open(photograph).save(scan)
        browser.open(server.http)
        browser.choose("#file", scan)
        browser.wait("document.querySelector('#status').innerText.includes('the classes stand alone')")
        pixels = browser.canvas("#canvas")
        assert (pixels[..., :3] == colours(server, labels_of(server, scan))).all()
        assert (pixels[..., 3] == 255).all()

    def test_what_is_no_picture_is_told_and_the_last_one_stays(self, browser, server, photograph, tmp_path):
        (tmp_path / "notes.png").write_text("no picture")
        browser.open(server.http)
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
        browser.open(server.http)
        browser.choose("#file", tmp_path / "noise.png")
        browser.wait("!document.querySelector('#error').hidden")
        assert browser.text("#message") == (
            "noise.png: 1.2 MB are too large: a request has 1048576 bytes at most here, and base64 adds a third."
        )

    def test_a_busy_server_is_asked_again_by_the_button(self, browser, server, photograph):
        browser.open(server.http)
        browser.wait("document.querySelector('#engine').innerText")
        with stalled(server):
            other = threading.Thread(target=labels_of, args=(server, photograph))
            other.start()
            until(lambda: is_asked(server))
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
        browser.open(versions.http)
        with stalled(versions):
            browser.choose("#file", photograph)
            until(lambda: is_asked(versions))
            browser.choose("#file", second)
            browser.wait("document.querySelector('#status').innerText == 'second.png …'")
        wait_for(browser, second)
        assert (slide(browser, "Home") == np.array(Image.open(second))).all()
        assert browser.run("document.querySelector('#error').hidden")

    def test_a_server_that_is_gone_is_told(self, browser, server, photograph):
        browser.open(server.http)
        browser.wait("document.querySelector('#engine').innerText")
        browser.offline(True)
        browser.choose("#file", photograph)
        browser.wait("!document.querySelector('#error').hidden")
        assert browser.text("#message") == "street.png: the server does not answer."
        browser.offline(False)
        browser.click("#retry")
        wait_for(browser, photograph)

    def test_a_version_can_be_chosen(self, browser, versions, photograph):
        browser.open(versions.http)
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
        long = tmp_path / f"{'a_long_name_' * 12}.png"
        long.write_bytes(photograph.read_bytes())
        browser.open(server.http, width=width, height=740, phone=True)
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
        browser.open(server.http, dark=dark)
        give(browser, photograph)
        browser.screenshot(tmp_path / "page.png")
        paper = np.array(Image.open(tmp_path / "page.png").convert("L"))[5, 5]
        assert paper < 50 if dark else paper > 200
        for selector in ("h1", "#engine", "#status", "#legend button", "#legend .number", "#save-labels"):
            assert contrast(browser, selector) >= 4.5, selector  # WCAG 2.2, AA

    def test_everything_is_reached_by_the_keyboard(self, browser, server, photograph):
        browser.open(server.http)
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
