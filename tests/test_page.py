"""The chat page in a headless Chromium, against a server whose answers are scripted."""

import base64
import hashlib
import json
import math
import random
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium here")]
PAGE = (ROOT / "plainllama/generation/page.html").read_text("utf-8")


def policy() -> str:
    """The Content-Security-Policy with which the page is served: its own script and style alone."""
    def allowed(tag: str) -> str:
        inside, = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    return (f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")


class Stub(BaseHTTPRequestHandler):
    """Answers as the server does. What is asked is what is said: `slow`, `break`, `call` and some
    others stand for what can happen, any other text is echoed."""

    chat, key, seen, context = True, None, [], 1024

    def log_message(self, *args):
        pass

    def answer(self, status: int, kind: str, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", policy())
        self.end_headers()
        self.wfile.write(body.encode())

    def refuse(self, status: int, message: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.answer(status, "application/json", json.dumps({"error": error}))

    def do_GET(self):
        if self.path == "/":
            self.answer(200, "text/html; charset=utf-8", PAGE)
        elif self.key and self.headers["Authorization"] != f"Bearer {self.key}":
            self.refuse(401, "A key is needed.")
        else:
            model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "you",
                     "context_length": self.context, "chat": self.chat}
            self.answer(200, "application/json", json.dumps({"data": [model]}))

    def event(self, data: dict) -> None:
        self.wfile.write(f": alive\n\ndata: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def say(self, piece: str) -> None:
        """One token, with the probabilities of itself (a half) and of another (a quarter)."""
        other = math.log(0.25)
        if self.path.endswith("chat/completions"):
            token = {"token": piece, "logprob": math.log(0.5), "bytes": list(piece.encode())}
            token["top_logprobs"] = [token.copy(), {"token": "<other>", "logprob": other,
                                                    "bytes": []}]
            self.event({"choices": [{"delta": {"content": piece}, "finish_reason": None,
                                     "logprobs": {"content": [token]}}]})
        else:
            logprobs = {"tokens": [piece], "token_logprobs": [math.log(0.5)], "text_offset": [0],
                        "top_logprobs": [{piece: math.log(0.5), "<other>": other}]}
            self.event({"choices": [{"text": piece, "finish_reason": None, "logprobs": logprobs}]})

    def call(self) -> None:
        for i, name in enumerate(("add", "spell")):
            self.event({"choices": [{"delta": {"tool_calls": [
                {"index": i, "id": f"call_{i}", "type": "function",
                 "function": {"name": name, "arguments": ""}}]}, "finish_reason": None}]})
            for piece in ('{"a": ', "1}"):
                self.event({"choices": [{"delta": {"tool_calls": [
                    {"index": i, "function": {"arguments": piece}}]}, "finish_reason": None}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        last = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if last == "refused":
            return self.refuse(400, "The prompt of 2,000 tokens is longer than 1,024.")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if last == "break":
            self.say("Half an")
            return None
        if last == "late":
            self.say("Half an")
            return self.event({"error": {"message": "The model is gone.", "type": "server_error"}})
        try:
            for i in range(200 if last == "slow" else 0):
                self.say(f"{i} ")
                time.sleep(0.05)
        except OSError:
            Stub.seen.append("gone")
            return None
        if last == "call":
            self.call()
        elif last == "bytes":  # a character over two tokens
            for half in ([0xc3], [0xa9]):
                token = {"token": "\ufffd", "bytes": half, "logprob": -1.0, "top_logprobs": []}
                text = "é" if half == [0xa9] else ""
                self.event({"choices": [{"delta": {"content": text}, "finish_reason": None,
                                         "logprobs": {"content": [token]}}]})
        else:
            for piece in re.findall(r"\s*\S+\s*", f"Said: {last}" if self.chat else " and on"):
                self.say(piece)
        finish = {"call": "tool_calls", "long": "length"}.get(last, "stop")
        self.event({"choices": [{"delta": {}, "finish_reason": finish}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 156}})
        self.wfile.write(b"data: [DONE]\n\n")
        return None


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        one = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def server():
    Stub.chat, Stub.key, Stub.seen = True, None, []
    one = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    one.daemon_threads = True
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{one.server_port}/"
    one.shutdown()
    one.server_close()


@pytest.fixture
def opened(browser, server):
    """Opens pages; at the end none has asked anything elsewhere, nor complained of anything."""
    asked, complaints, contexts = [], [], []

    def open_page(width=1200, height=800, context=None, **options):
        if context is None:
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text)
                if message.type in ("error", "warning") else None)
        page.goto(server)
        expect(page.locator("#send")).to_be_enabled()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith((server, "blob:", "data:"))] == []
    told = ("400 (Bad Request)", "401 (Unauthorized)")  # Chromium tells of every such answer
    assert [text for text in complaints if not any(each in text for each in told)] == []


def say(page, text):
    """Sends a message and waits for the end of the answer."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_text("Send")


def answers(page):
    return page.get_by_role("article", name="Model")


def render(page, text, pieces=None):
    """The HTML that the page makes of a text, at once or of pieces as they come."""
    return page.evaluate("""pieces => {
        const element = document.createElement('div');
        const markdown = new Markdown(element);
        for (const piece of pieces) markdown.add(piece);
        return element.innerHTML;
    }""", [text] if pieces is None else pieces)


def plain(html):
    """HTML without what code and tables are wrapped in, and without the properties of links."""
    html = re.sub(r'<div class="code"><div class="row">.*?</div>(.*?)</div>', r"\1", html,
                  flags=re.DOTALL)
    html = re.sub(r'<div class="table">(.*?)</div>', r"\1", html)
    return re.sub(r' (title|target|rel)="[^"]*"', "", html)


def test_a_talk_by_keyboard_alone(opened):
    page = opened()
    page.keyboard.type("First line")  # the field has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and second")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("Said: First line and second")
    expect(page.get_by_role("status")).to_contain_text("Said: First line")
    expect(page.locator("#used")).to_have_text("256 of 1024 tokens")
    assert Stub.seen[0]["messages"] == [{"role": "user", "content": "First line\nand second"}]
    assert Stub.seen[0]["temperature"] == 0.8 and "top_k" not in Stub.seen[0]
    page.keyboard.type("Again")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(2)
    expect(page.locator("#send")).to_have_text("Send")
    assert [each["role"] for each in Stub.seen[1]["messages"]] == ["user", "assistant", "user"]
    reached = set()
    for _ in range(40):  # everything can be reached by Tab, and is seen to have the focus
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => {
            const at = document.activeElement;
            if (at === document.body) return ['', ''];
            return [at.ariaLabel || at.textContent.trim().slice(0, 30),
                    getComputedStyle(at).outlineStyle];
        }""")
        assert name in ("Message", "") or outline.startswith(("solid", "auto")), (name, outline)
        reached.add(name)
    assert {"New talk", "Export talk", "Talks", "Settings", "Copy", "Edit", "Retry", "Send",
            "Name of this talk", "Delete First line and second"} <= reached
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("temperature", exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()


def test_an_unfinished_character_is_not_sent(opened):
    page = opened()
    field = page.get_by_label("Message", exact=True)
    field.fill("にほん")
    field.evaluate("""field => field.dispatchEvent(new KeyboardEvent('keydown',
        {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))""")
    expect(field).to_have_value("にほん")
    assert Stub.seen == []
    field.press("Enter")
    expect(answers(page)).to_contain_text("にほん")


MARKDOWN = [
    ("# One\n### Three", "<h3>One</h3><h5>Three</h5>"),
    ("A *b* **c *d* e** _f_ __g__ ~~h~~ `i*j*`",
     "<p>A <em>b</em> <strong>c <em>d</em> e</strong> <em>f</em> <strong>g</strong> "
     "<del>h</del> <code>i*j*</code></p>"),
    ("***both*** and *(more)*.",
     "<p><strong><em>both</em></strong> and <em>(more)</em>.</p>"),
    ("2 * 3 * 4, a_b_c, **open, \\*no\\*", "<p>2 * 3 * 4, a_b_c, **open, *no*</p>"),
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("- a\n  - b\n    more\n- c\n\n1. x\n   ```py\n   y = 1\n   ```\n2. z",
     "<ul><li><p>a</p><ul><li><p>b\nmore</p></li></ul></li><li><p>c</p></li></ul>"
     '<ol start="1"><li><p>x</p><pre><code>y = 1</code></pre></li><li><p>z</p></li></ol>'),
    ("3) three\n4) four", '<ol start="3"><li><p>three</p></li><li><p>four</p></li></ol>'),
    ("> a\n> > b\n\nc",
     "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("```js\n<b>*x*</b>\n\n  y\n```\nafter",
     "<pre><code>&lt;b&gt;*x*&lt;/b&gt;\n\n  y</code></pre><p>after</p>"),
    ("~~~~\n```\n~~~\n~~~~", "<pre><code>```\n~~~</code></pre>"),
    ("```\nno end", "<pre><code>no end</code></pre>"),
    ("Text\n| a | b |\n|---|:-:|\n| 1 | `x` |\n| 2 \\| 3 | |\n\nend",
     "<p>Text</p><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td>"
     "<td><code>x</code></td></tr><tr><td>2 | 3</td><td></td></tr></tbody></table><p>end</p>"),
    ("a | b", "<p>a | b</p>"),
    ("---\n* * *", "<hr><hr>"),
    ('[t *u*](https://a.b/c_(d) "title") https://e.f/g_h_i. <mailto:x>',
     '<p><a href="https://a.b/c_(d)">t <em>u</em></a> <a href="https://e.f/g_h_i">'
     "https://e.f/g_h_i</a>. &lt;mailto:x&gt;</p>"),
    ("![alt](https://a.b/c.png)", '<p><a href="https://a.b/c.png">alt</a></p>'),
]


def test_markdown_becomes_what_it_says(opened):
    page = opened()
    for text, expected in MARKDOWN:
        assert plain(render(page, text)) == expected
    whole = "\n\n".join(text for text, _ in MARKDOWN if "no end" not in text)
    assert render(page, whole, list(whole)) == render(page, whole)
    link = render(page, "[x](https://a.b)")
    assert 'rel="noopener noreferrer"' in link and 'target="_blank"' in link


def test_markdown_is_that_of_another_reader(opened):
    """The same HTML as markdown-it's, where both mean the same: line ends within a paragraph and
    looseness of lists aside."""
    reader = pytest.importorskip("markdown_it").MarkdownIt(
        "commonmark", {"html": False}).enable(["table", "strikethrough"])
    page = opened()
    words = ["*a*", "**b c**", "`d*e`", "~~f~~", "g_h_i", "2 * 3", "[j](https://k.l/m)", "<n>",
             "& o", "**p *q* r**", "\\*s\\*", "_t_"]
    chosen = random.Random(0)

    def line():
        return " ".join(chosen.choices(words, k=chosen.randint(1, 6)))

    kinds = [lambda: line(), lambda: f"# {line()}", lambda: f"> {line()}\n>\n> - {line()}",
             lambda: f"- {line()}\n  - {line()}\n  - {line()}\n- {line()}",
             lambda: f"3. {line()}\n4. {line()}\n\n   ```\n   {line()}\n   ```",
             lambda: f"```py\n{line()}\n\n {line()}\n```", lambda: "***",
             lambda: f"| {line()} | u |\n|---|---|\n| {line()} | v |"]

    def level(html):
        html = re.sub(r' class="[^"]*"|</?p>|\n', "", html.replace("<s>", "<del>"))
        html = html.replace("</s>", "</del>").replace("<hr />", "<hr>").replace("&quot;", '"')
        return re.sub(r"(</?h)1", r"\g<1>3", html)

    for _ in range(200):
        text = "\n\n".join(chosen.choice(kinds)() for _ in range(chosen.randint(1, 5)))
        ours = plain(render(page, text))
        assert level(ours) == level(reader.render(text)), text


HOSTILE = """<img src=x onerror="hacked=1"> <script>hacked=1</script> <svg onload="hacked=1">

[a](javascript:hacked=1) [b](JAVASCRIPT:hacked=1) [c](data:text/html,<script>hacked=1</script>)
[d](java\tscript:hacked=1) [e](vbscript:x) [f](/v1/models) [g](file:///etc/passwd) [h](//x.y/z)
![i](https://elsewhere.example/pixel.png) ![j](data:image/png;base64,AA)
[k](&#106;avascript:hacked=1)
[l](https://elsewhere.example/"onmouseover="hacked=1) <a href="javascript:hacked=1">m</a>
<iframe src="https://elsewhere.example"></iframe><style>*{display:none}</style>

```html" onclick="hacked=1
</code></pre><script>hacked=1</script>
"""


def test_hostile_answers_are_inert(opened):
    page = opened()
    say(page, HOSTILE)
    body = answers(page).locator(".body")
    expect(body).to_contain_text('<img src=x onerror="hacked=1">')
    expect(body.locator("img, script, svg, iframe, style, object, [onclick], [onmouseover]")
           ).to_have_count(0)
    hrefs = body.locator("a").evaluate_all("all => all.map(each => each.protocol)")
    assert set(hrefs) == {"https:"} and len(hrefs) == 3  # i, l and the address in the iframe
    assert page.evaluate("typeof hacked") == "undefined"
    page.reload()
    expect(answers(page)).to_contain_text("<script>hacked=1</script>")
    assert page.evaluate("typeof hacked") == "undefined"
    assert "innerHTML" not in PAGE and "eval(" not in PAGE and "insertAdjacent" not in PAGE


@pytest.mark.parametrize("text", [
    "> " * 50_000 + "x", "- " * 50_000 + "x", "* a\n" * 20_000, "  " * 50_000 + "- x",
    "*" * 100_000, "*a " * 30_000, "**a " * 30_000, "_a __b " * 20_000, "`" * 100_000,
    "".join("`" * i + " " for i in range(1, 400)), "[" * 100_000, "[a](" * 30_000,
    "![a](b(" * 20_000, "](a" * 30_000, "https://" + "." * 100_000, "# " + " " * 100_000 + "x",
    "- - " * 30_000 + "x",
    "|" * 100_000 + "\n" + "|-" * 50_000, "| a |\n|---|\n" * 20_000, "```" + " " * 100_000 + "`",
    "~" * 100_000 + "`", "```\n" + "x\n" * 50_000, "\n".join(" " * i + "- a" for i in range(400)),
    "a\n" * 50_000, "\\" * 100_000, '[a](b "' * 20_000, "**a*" * 25_000, "1. " * 30_000],
    ids=lambda text: re.sub(r"\W", lambda found: f"{ord(found[0]):x}", text[:8]))
def test_enormous_markdown_ends_and_stays_flat(opened, text):
    """Time that grew with the square of these would take minutes, not the milliseconds it takes."""
    page = opened()
    depth, said = page.evaluate("""text => {
        const element = document.createElement('div');
        new Markdown(element).add(text);
        let deepest = 0;
        for (const leaf of element.querySelectorAll('*')) {
            let depth = 0;
            for (let at = leaf; at !== element; at = at.parentNode) depth++;
            deepest = Math.max(deepest, depth);
        }
        return [deepest, element.textContent.length];
    }""", text)
    assert depth < 40 and said >= 0


def test_stop_keeps_what_came(opened):
    page = opened()
    page.get_by_label("Message", exact=True).fill("slow")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("3 ")
    expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_have_text("Send")
    expect(answers(page)).to_contain_text("stopped")
    kept = answers(page).locator(".body").inner_text()
    assert kept.startswith("0 1 2 3") and "199" not in kept
    for _ in range(40):
        if "gone" in Stub.seen:
            break
        time.sleep(0.1)
    assert "gone" in Stub.seen  # the server was told
    page.reload()
    expect(answers(page).locator(".body")).to_have_text(kept)
    page.get_by_label("Message", exact=True).fill("slow")
    page.keyboard.press("Enter")
    expect(answers(page).last).to_contain_text("3 ")
    page.reload()  # as a browser that is closed
    expect(answers(page).last).to_contain_text("3 ")
    expect(answers(page).last).to_contain_text(re.compile("broke"))


def test_retry_and_edit_branch_off(opened):
    page = opened()
    say(page, "one")
    say(page, "two")
    page.get_by_role("button", name="Retry").last.click()
    expect(page.get_by_text("2 of 2")).to_be_visible()
    assert Stub.seen[2] == Stub.seen[1]
    page.get_by_role("button", name="Edit").first.click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("one")
    say(page, "three")
    expect(answers(page)).to_have_text([re.compile("Said: three")])
    assert Stub.seen[3]["messages"] == [{"role": "user", "content": "three"}]
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text([re.compile("Said: one"), re.compile("Said: two")])
    page.reload()
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Next version").first.click()
    expect(answers(page)).to_have_text([re.compile("Said: three")])
    page.get_by_label("Message", exact=True).fill("a draft")
    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")  # an edit that is given up changes nothing
    expect(page.get_by_label("Message", exact=True)).to_have_value("a draft")
    say(page, "four")
    assert len(Stub.seen[-1]["messages"]) == 3


def test_talks_are_kept_named_renamed_exported_and_deleted(opened):
    page = opened()
    say(page, "One two three four five six seven")
    page.get_by_role("button", name="New talk").first.click()
    say(page, "Another")
    names = page.locator("#list li button:first-child")
    expect(names).to_have_text(["Another", "One two three four five six"])
    page.get_by_label("Name of this talk").fill("Renamed")
    page.get_by_label("Name of this talk").press("Enter")
    expect(names.first).to_have_text("Renamed")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export talk").click()
    assert download.value.suggested_filename == "Renamed.json"
    exported = json.loads(download.value.path().read_text())
    assert [each["content"] for each in exported[0]["messages"]] == ["Another", "Said: Another"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    assert len(json.loads(download.value.path().read_text())) == 2
    page.reload()
    expect(names).to_have_text(["Renamed", "One two three four five six"])
    names.last.click()
    expect(answers(page)).to_contain_text("seven")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Delete Renamed").click()
    expect(names).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Renamed").click()
    expect(names).to_have_text(["One two three four five six"])
    page.reload()
    expect(names).to_have_text(["One two three four five six"])


def test_a_full_storage_is_said_and_a_damaged_talk_is_left(opened):
    page = opened()
    page.evaluate("""() => {
        localStorage.setItem('plainllama.talk.bad', '{"messages": ');
        localStorage.setItem('plainllama.talk.odd', '{"at": 0, "messages": [null]}');
        let room = 5e6;
        for (; room > 10; room = Math.floor(room / 2)) {
            try { localStorage.setItem('fill' + room, 'x'.repeat(room)); } catch { /* full */ }
        }
    }""")
    say(page, "No room for this " * 50)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("takes no more")
    with page.expect_download() as download:
        alert.get_by_role("button", name="Export").click()
    assert "No room" in download.value.path().read_text()
    page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('fill'))"
                  ".forEach(key => localStorage.removeItem(key))")
    say(page, "Room now")
    page.reload()
    expect(answers(page)).to_have_count(2)
    expect(alert).to_contain_text("cannot be read")
    assert page.evaluate("localStorage.getItem('plainllama.talk.bad')") == '{"messages": '


def test_two_tabs_lose_nothing_of_each_other(opened):
    one = opened()
    say(one, "first")
    two = opened(context=one.context)
    expect(answers(two)).to_have_count(1)
    one.get_by_label("Message", exact=True).fill("slow")
    one.keyboard.press("Enter")
    expect(answers(one).last).to_contain_text("2 ")
    say(two, "from two")
    one.keyboard.press("Escape")
    expect(one.locator("#send")).to_have_text("Send")
    one.reload()
    names = one.locator("#list li button:first-child")
    expect(names).to_have_count(2)
    said = []
    for each in names.all():
        each.click()
        said.append(one.locator("#thread").inner_text())
    assert any("from two" in text for text in said) and any("slow" in text for text in said)


def test_probabilities_on_hover_and_by_keyboard(opened):
    page = opened()
    say(page, "**bold**")
    expect(answers(page).locator("strong")).to_have_text("bold")
    page.get_by_label("Token probabilities").check()
    tokens = answers(page).locator(".tokens span")
    expect(tokens).to_have_text(["Said: ", "**bold**"])
    assert tokens.first.evaluate("node => node.style.getPropertyValue('--doubt')") == "0.50"
    tip = page.get_by_role("tooltip")
    tokens.last.hover()
    expect(tip.locator("div")).to_have_text(['"**bold**"50.0 %', '"<other>"25.0 %'])
    page.mouse.move(2, 2)
    expect(tip).to_be_hidden()
    tokens.first.focus()
    expect(tip).to_contain_text('"Said: "')
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text('"**bold**"')
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["y"] + box["height"] <= 800
    say(page, "bytes")
    expect(answers(page).last.locator(".tokens span")).to_have_text(["·", "é"])
    page.get_by_label("Token probabilities").uncheck()
    expect(answers(page).last.locator(".body")).to_have_text("é")


def test_errors_say_what_the_server_said(opened):
    page = opened()
    say(page, "refused")
    expect(page.locator(".error")).to_have_text("The prompt of 2,000 tokens is longer than 1,024.")
    say(page, "late")
    expect(page.locator(".error").last).to_have_text("The model is gone.")
    say(page, "break")
    expect(answers(page).last.locator(".body")).to_have_text("Half an")
    expect(page.locator(".error").last).to_contain_text("broke")
    say(page, "long")
    expect(answers(page).last).to_contain_text("cut: no more tokens allowed")
    page.get_by_role("button", name="Retry").last.click()
    expect(page.get_by_text("2 of 2")).to_be_visible()


def test_a_key_is_asked_for_and_kept_for_the_tab(opened, browser, server):
    Stub.key = "secret"
    context = browser.new_context()
    page = context.new_page()
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept(
        "secret" if len(asked) > 1 else "wrong")))
    page.goto(server)
    expect(page.locator("#send")).to_be_enabled()
    assert len(asked) == 2 and "A key is needed." in asked[0]
    page.reload()
    expect(page.locator("#send")).to_be_enabled()
    assert len(asked) == 2 and page.evaluate("Object.values({...localStorage}).join()"
                                             ).count("secret") == 0
    context.close()


def test_calls_are_folded_and_their_results_asked_for(opened):
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Tools of this talk").click()
    page.locator("#tools").fill("{")
    page.locator("#tools").blur()
    expect(page.get_by_role("alert")).to_contain_text("not taken")
    page.locator("#tools").fill('[{"type": "function", "function": {"name": "add"}}]')
    page.locator("#tools").blur()
    page.locator("#system").fill("Be brief.")
    page.locator("#system").blur()
    say(page, "call")
    call = answers(page).locator("details")
    expect(call.locator("summary")).to_have_text(["Calls add", "Calls spell"])
    expect(call.locator("pre").first).to_be_hidden()
    call.locator("summary").first.click()
    expect(call.locator("pre").first).to_have_text('{"a": 1}')
    for name, result in (("add", "3"), ("spell", "x")):
        page.get_by_label(f'Result of {name}({{"a": 1}})').fill(result)
        page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(2)
    expect(page.locator("#send")).to_have_text("Send")
    first, second = Stub.seen
    assert first["tools"][0]["function"]["name"] == "add"
    assert [each["role"] for each in second["messages"]] == [
        "system", "user", "assistant", "tool", "tool"]
    assert second["messages"][0]["content"] == "Be brief."
    assert [each["tool_call_id"] for each in second["messages"][3:]] == ["call_0", "call_1"]
    assert second["messages"][2]["tool_calls"][1]["function"]["arguments"] == '{"a": 1}'


def test_settings_are_sent_and_kept(opened):
    page = opened()
    page.get_by_role("button", name="Settings").click()
    for name, value in (("temperature", "0"), ("top_k", "40"), ("max_tokens", "9999"),
                        ("min_p", "0.1"), ("top_p", "0.9")):
        page.get_by_label(f"{name} as a number").fill(value)
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Seed").blur()
    page.get_by_label("temperature", exact=True).press("ArrowRight")
    expect(page.get_by_label("temperature as a number")).to_have_value("0.05")
    page.reload()
    say(page, "x")
    wanted = {"temperature": 0.05, "top_k": 40, "max_tokens": 1024, "min_p": 0.1, "top_p": 0.9,
              "seed": 7}
    assert {key: Stub.seen[0][key] for key in wanted} == wanted
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("")
    page.get_by_label("top_k", exact=True).press("Home")
    say(page, "y")
    assert "seed" not in Stub.seen[1] and "top_k" not in Stub.seen[1]


def test_a_model_without_chat_goes_on_with_text(opened):
    Stub.chat = False
    page = opened()
    page.get_by_label("Text to go on from").fill("Once **upon**\n")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_text("Go on")
    expect(page.locator("#thread .body")).to_have_text(["Once **upon**\n", " and on"])
    page.keyboard.press("Enter")  # nothing more is said: the model goes on
    expect(page.locator("#thread .body")).to_have_count(3)
    assert [each["prompt"] for each in Stub.seen] == ["Once **upon**\n", "Once **upon**\n and on"]
    assert Stub.seen[0]["logprobs"] == 5 and Stub.seen[0]["max_tokens"] == 100
    page.get_by_label("Token probabilities").check()
    page.locator(".tokens span").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text('" and "50.0 %')
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#system")).to_be_hidden()


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_needs_no_sideways_scrolling(opened, width):
    page = opened(width, 700, has_touch=True, is_mobile=True)
    expect(page.locator("#talks")).to_be_hidden()
    say(page, "```\n" + "x" * 300 + "\n```\n\n" + "y" * 300 + "\n\n| a | b |\n|---|---|\n| "
        + "z" * 100 + " | " + "w " * 50 + "|\n\n`" + "v" * 200 + "`")

    def fits():
        return page.evaluate("""() => document.documentElement.scrollWidth <= innerWidth
            && document.getElementById('thread').scrollWidth <= innerWidth""")
    assert fits()
    for name in ("Talks", "Settings"):
        page.get_by_role("button", name=name, exact=True).click()
        assert fits()
        page.get_by_role("button", name=name, exact=True).click()
    page.get_by_label("Token probabilities").check()
    page.locator(".tokens span").last.tap()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert fits()


def test_dark_and_light(opened):
    page = opened(color_scheme="dark")

    def luminance():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))
    assert luminance() < 150
    page.emulate_media(color_scheme="light")
    assert luminance() > 600
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Colours").select_option("dark")
    assert luminance() < 150
    page.reload()
    assert luminance() < 150


def test_every_control_has_a_name(opened):
    page = opened()
    say(page, "Hello `x`\n\n```\ny\n```")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Tools of this talk").click()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    kinds = ("button", "textbox", "slider", "spinbutton", "checkbox", "combobox", "article",
             "navigation", "complementary", "progressbar", "region")
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree
             if not node["ignored"] and node["role"]["value"] in kinds]
    assert len(found) > 25 and [role for role, name in found if not name] == []
    assert page.locator("[role=status]").count() == 1 and page.locator("h1, main").count() >= 1
