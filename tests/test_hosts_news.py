"""How processes agree where to stop, over a link that fails for a moment."""

import threading
import time

import pytest

from jaxtax.hosts import news, store


class Store:
    """A coordination service in memory, which fails when it is told to."""

    def __init__(self, monkeypatch, count):
        self.texts, self.put_to, self.failing = {}, [], threading.Event()
        self.loses_an_answer = False
        for name, stand_in in (
            ("put", self.put), ("get", self.get), ("under", self.under), ("count", lambda: count),
            ("index", lambda: 0),
        ):  # fmt: skip
            monkeypatch.setattr(store, name, stand_in)

    def _answer(self):
        if self.failing.is_set():
            raise RuntimeError("UNAVAILABLE: failed to connect to all addresses")

    def put(self, key, text):
        self._answer()
        self.put_to.append((key, text))
        self.texts[key] = text
        if self.loses_an_answer:
            self.loses_an_answer = False
            raise RuntimeError("UNAVAILABLE: socket closed")

    def get(self, key):
        self._answer()
        return self.texts.get(key)

    def under(self, directory):
        self._answer()
        found = {key: text for key, text in self.texts.items() if key.startswith(f"{directory}/")}
        return {key.removeprefix(f"{directory}/"): text for key, text in found.items()}


def await_that(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("said_before", [True, False])
def test_a_link_that_fails_while_processes_agree_changes_no_number(monkeypatch, said_before):
    service = Store(monkeypatch, 2)
    monkeypatch.setattr(news, "_LOOK", 0.01)
    listener = news.News()
    steps, goes_on = [], threading.Event()

    def work():
        while not listener.stop_wanted(False, len(steps)):
            steps.append(None)
            time.sleep(0.001)
        goes_on.set()

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        await_that(lambda: len(steps) > 3)
        service.loses_an_answer = not said_before
        service.texts["news/stop"] = "1"
        if said_before:
            await_that(lambda: "stop_at/0" in service.texts)
            service.failing.set()
            time.sleep(0.2)
            service.failing.clear()
        await_that(lambda: "stop_at/0" in service.texts)
        said = int(service.texts["stop_at/0"])
        time.sleep(0.05)
        assert len(steps) == said  # this process has begun no other step
        service.texts["stop_at/1"] = str(said - 1)
        assert goes_on.wait(10)
        assert len(steps) == said
        assert {*service.put_to} == {("stop_at/0", str(said))}
    finally:
        service.failing.clear()
        listener.close()
