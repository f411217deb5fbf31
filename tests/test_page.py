"""The page in a real browser: live version, a user, a click, a rollback, with the keyboard and on a phone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import TOKEN, process, stored

from freshrec.store.versions import open_store

CHROMIUM = Path("/usr/bin/chromium")
IMSR = "imsr:fit.base_epochs=2:fit.epochs=1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser, and there is no {CHROMIUM}: run scripts/install-test-tools.sh")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        found = running.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """`visit(address, width)` opens a page, which must cause no error and no request to another server.

    `failure` is the status of the requests that fail on purpose.
    """
    pages: list[Any] = []
    wrong: list[str] = []

    expected = ["401"]

    def open_page(address: str, width: int = 1200, scheme: str = "light", failure: str = "401") -> Any:
        expected.append(failure)
        own = "/".join(address.split("/")[:3])
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((own, "data:")) or wrong.append(asked.url))
        page.goto(address)
        pages.append(context)
        return page

    yield open_page
    for context in pages:
        context.close()
    assert [line for line in wrong if not any(status in line for status in expected)] == []


def test_looking_up_a_user_adding_a_click_and_rolling_back_work_with_the_keyboard_alone(
    visit: Any, tmp_path: Path
) -> None:
    stored(tmp_path, "comirec-dr:d=8", IMSR, n=2)
    (tmp_path / "token").write_text(TOKEN)
    with process(tmp_path, "--token-file", str(tmp_path / "token")) as (address, _):
        page = visit(address)
        page.locator("#key").wait_for()
        page.locator("#token").focus()
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        page.get_by_text("version 2 is live").wait_for()
        assert page.locator("#key").is_hidden()
        page.keyboard.press("Home")
        page.locator("#user").focus()
        page.keyboard.type("user-1")
        page.keyboard.press("Enter")
        page.locator("#list li").first.wait_for()
        before = page.locator("#list li > span:first-of-type").all_inner_texts()
        page.locator("#cards .card").first.wait_for()
        assert "created in span" in page.locator("#cards .card").first.inner_text()
        page.locator("#item").focus()
        page.keyboard.type(before[0])
        page.keyboard.press("Enter")
        page.get_by_text("is stored, and the list was updated").wait_for()
        after = page.locator("#list li > span:first-of-type").all_inner_texts()
        assert before[0] not in after and page.locator("#events li").first.inner_text().startswith(before[0])
        page.locator("#compare").focus()
        page.keyboard.press("Enter")
        page.locator("#changes").get_by_text("version 1").first.wait_for()
        page.get_by_role("button", name="Roll back to 1").focus()
        page.keyboard.press("Enter")
        page.keyboard.type("looked wrong")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_text("version 1 is live").wait_for()
        moves = open_store(tmp_path / "s").moves()
        assert (moves[-1].action, moves[-1].to, moves[-1].reason) == ("rollback", 1, "looked wrong")
        page.close()  # before the server stops, because the page polls the live version


def test_a_phone_in_dark_mode_needs_no_horizontal_scrolling_and_ids_are_never_markup(
    visit: Any, tmp_path: Path
) -> None:
    stored(tmp_path, "blend", n=2)
    with process(tmp_path) as (address, _):
        page = visit(address, 390, "dark")
        page.get_by_text("version 2 is live").wait_for()
        for user in ("user-1", "<img src=x onerror=alert(1)>"):
            page.locator("#user").fill(user)
            page.locator("#user").press("Enter")
            page.wait_for_function("user => state.user === user", arg=user)
            page.locator("#ask button:enabled").wait_for()  # all of it is there
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert "no events yet" in page.locator("#why").inner_text()
        page.locator("#item").fill("item-1")
        page.locator("#item").press("Enter")
        page.get_by_text("is stored, and the list was updated").wait_for()
        assert page.locator("main img").count() == 0
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert page.locator("#locked").is_visible()  # no token, so rolling back is not possible
        api = visit(f"{address}/docs", 390)
        api.get_by_text("/recommend/{user}").first.click()
        api.get_by_text("exclude_seen").first.wait_for()
        k = api.locator("#routes details[open] li", has=api.get_by_text("k", exact=True)).first
        assert "integer from 1 to 500, default 10" in k.inner_text()
        for path in ("/events", "/recommend"):
            route = api.locator("#routes details").filter(has_text="POST").filter(has=api.get_by_text(path, exact=True))
            route.locator("summary").click()
            body = json.loads(route.locator("pre").inner_text())
            assert body and all(name in route.inner_text() for name in body)
        assert "events[].timestamp" in api.locator("#routes").inner_text()
        assert api.evaluate("document.documentElement.scrollWidth") <= 390
        page.close()


def test_a_failed_or_late_look_up_leaves_nothing_of_another_user(visit: Any, tmp_path: Path) -> None:
    stored(tmp_path, "blend", n=2)
    with process(tmp_path) as (address, _):
        page = visit(address, failure="500")
        held: list[Any] = []

        def look(user: str) -> None:
            page.locator("#user").fill(user)
            page.locator("#user").press("Enter")

        def shown() -> tuple[Any, ...]:
            lines = [page.locator(f"#{part} > *").count() > 0 for part in ("list", "events", "cards")]
            return page.locator("#found").is_visible(), page.locator("#whose").inner_text(), *lines

        def after(answer: Any) -> None:
            """Send an answer, and wait until the page has it."""
            answer()
            page.evaluate("fetch('health/live').then((answer) => answer.text())")

        def hold(route: Any) -> None:
            held.append(route)

        def let_go(route: Any) -> None:
            route.continue_()

        def fail(route: Any) -> None:
            route.fulfill(status=500, json={"detail": "It broke."})

        of_user_1 = (True, "user-1", True, True, True)
        look("user-1")
        page.locator("#cards .card").first.wait_for()
        assert shown() == of_user_1
        # A look-up fails at its first or at its second request.
        for path in ("recommend", "users/interests"):
            page.route(f"**/{path}?user=user-2*", fail)
            look("user-2")
            page.get_by_text("It broke.").wait_for()
            assert not page.locator("#found").is_visible() and page.locator("#found li, #cards > *").count() == 0
            assert page.evaluate("[state.user, state.list.length]") == ["", 0]
            page.unroute(f"**/{path}?user=user-2*")
            look("user-1")
            page.locator("#cards .card").first.wait_for()
        # An earlier look-up answers, or fails, after a later one.
        for path, answer in (("recommend", let_go), ("users/interests", let_go), ("recommend", fail)):
            page.route(f"**/{path}?user=user-3*", hold)
            with page.expect_request(f"**/{path}?user=user-3*"):
                look("user-3")
            look("user-1")
            page.locator("#cards .card").first.wait_for()
            after(lambda answer=answer: answer(held.pop()))
            assert shown() == of_user_1 and not page.locator("#said").is_visible()
            page.unroute(f"**/{path}?user=user-3*")
        # The changes of an earlier user come late.
        page.route("**/users/changes?user=user-1*", hold)
        with page.expect_request("**/users/changes?user=user-1*"):
            page.locator("#compare").click()
        look("..")
        page.get_by_text("no events yet").wait_for()
        after(lambda: let_go(held.pop()))
        assert shown() == (True, "..", True, False, False) and page.locator("#changes > *").count() == 0
        # The boxes of the versions: an answer that fails, and one that is late.
        page.route("**/versions", fail)
        page.evaluate("refresh().catch((why) => why)")
        assert page.locator("#facts > *, #versions > *, #moves > *, #verdict > *").count() == 0
        assert page.locator("#live").inner_text() == "The live version is unknown."
        page.unroute("**/versions")
        page.route("**/version", lambda route: let_go(route) if held else hold(route))
        with page.expect_request("**/version"):
            page.evaluate("void refresh()")
        page.evaluate("refresh()")
        after(lambda: held[0].fulfill(json={"version": 77}))
        assert "Version 2 is live" in page.locator("#live").inner_text()
        page.close()
